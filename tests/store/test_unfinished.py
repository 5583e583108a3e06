"""Leftovers of killed processes are deleted; files of live processes, on any host, and files of others are kept."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from negpipe.store.files import publish, remove_temporaries
from negpipe.store.unfinished import is_unfinished, owner, temporary

DAY = 86400


def file_of(folder: Path, who: str) -> Path:
    """An unfinished file of somebody."""
    path = folder / f".{uuid.uuid4().hex}-{who}.tmp"
    path.touch()
    return path


def spool_of(folder: Path, who: str) -> Path:
    """A folder of somebody who reads a source."""
    path = folder / f"spool-{who}-ab_12xyz"
    (path / "spill").mkdir(parents=True)
    (path / "ingest.duckdb").touch()
    return path


def changed(pid: int | None = None, started: int = 0, place: str | None = None) -> str:
    """Another owner on this machine."""
    own_pid, own_start, own_place = re.split("[.@]", owner(), maxsplit=2)
    return f"{pid or own_pid}.{int(own_start) + started}@{place or own_place}"


def start_of(pid: int) -> int:
    """When a process began, as far behind the begin of this one."""
    begun = [
        int(Path(f"/proc/{each}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        for each in (pid, os.getpid())
    ]
    return begun[0] - begun[1]


def test_only_what_the_dead_left_is_removed(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    parent = os.getppid()
    dead, given_again, own = (changed(process.pid), changed(parent, start_of(parent) - 1), owner())
    living = changed(parent, start_of(parent))
    for who in (dead, given_again, own):
        file_of(tmp_path, who)
        spool_of(tmp_path, who)
    kept = {make(tmp_path, living) for make in (file_of, spool_of)}
    remove_temporaries(tmp_path)
    assert set(tmp_path.iterdir()) == kept


def test_what_stands_elsewhere_is_dead_after_a_day_without_a_write(tmp_path: Path) -> None:
    """In another container, on another machine, after another boot; and what earlier versions wrote."""
    host = owner().partition("@")[2].rpartition(".")[0]
    places = [changed(place=f"{host}.0123abcd"), changed(place="other.host.0123abcd"), f"{os.getpid()}@{host}"]
    elsewhere = {make(tmp_path, who) for who in places for make in (file_of, spool_of)}
    remove_temporaries(tmp_path)
    assert set(tmp_path.iterdir()) == elsewhere
    for path in tmp_path.rglob("*"):
        os.utime(path, (time.time() - 2 * DAY,) * 2)
    written = next(path for path in elsewhere if path.is_dir()) / "ingest.duckdb"
    os.utime(written)
    remove_temporaries(tmp_path)
    assert set(tmp_path.iterdir()) == {written.parent}


def test_what_is_somebody_elses_stays(tmp_path: Path) -> None:
    hexadecimal = uuid.uuid4().hex
    names = [".notes.tmp", "x.tmp", ".hidden", f".{hexadecimal}.tmp", f".{hexadecimal}-1.tmp", "spool-of-thread"]
    names += [f".{hexadecimal}-{owner()}.tmp.bak", f"my-spool-{owner()}-ab_12xyz", f".notes-{owner()}.tmp"]
    for name in names:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / ".export.tmp").mkdir()
    remove_temporaries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*names, ".export.tmp"}


def test_a_link_that_is_left_over_goes_without_what_it_points_at(tmp_path: Path) -> None:
    """The pointer to rows is a link under such a name until it is moved into place."""
    folder, file, inside = tmp_path / "folder", tmp_path / "file", tmp_path / "run"
    folder.mkdir()
    inside.mkdir()
    for path in (folder / "kept", file):
        path.touch()
    for target in (folder, file, tmp_path / "nothing"):
        temporary(inside).symlink_to(target)
    remove_temporaries(inside)
    assert not list(inside.iterdir())
    assert (folder / "kept").exists() and file.exists()


def test_a_file_that_is_being_published_has_such_a_name(tmp_path: Path) -> None:
    seen: list[str] = []
    publish(tmp_path, lambda _: "final", lambda file: seen.append(Path(file.name).name))
    assert is_unfinished(seen[0])
    assert not is_unfinished("final")


CONTAINER = """
import sys
from pathlib import Path
from negpipe.store.files import publish, remove_temporaries
import os

folder, does = Path(sys.argv[1]), sys.argv[2]

def write(file):
    print("begun", flush=True)
    sys.stdin.readline()
    file.write(b"whole")

if does == "write":
    publish(folder, lambda _: "file", write)
else:
    remove_temporaries(folder)
print(os.getpid(), flush=True)
"""


def test_two_containers_in_which_everybody_is_process_1(tmp_path: Path) -> None:
    """With one host name: namespaces of process numbers, as containers have them."""
    unshare = ["unshare", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("there can be no namespaces here")
    command = [*unshare, sys.executable, "-c", CONTAINER, str(tmp_path)]
    writing = subprocess.Popen([*command, "write"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with writing:
        assert writing.stdin is not None and writing.stdout is not None
        assert writing.stdout.readline() == "begun\n"
        cleaning = subprocess.run([*command, "clean"], capture_output=True, text=True, check=True)
        assert cleaning.stdout == "1\n"
        writing.stdin.write("\n")
        writing.stdin.close()
        assert writing.stdout.read() == "1\n"
    assert writing.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
