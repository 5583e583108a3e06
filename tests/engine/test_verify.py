"""`negpipe verify` reads several files at a time, and says how far it is."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import small_source as small
from rich.console import Console
from upkeep_of import config_of

from negpipe import graph
from negpipe.cli import console
from negpipe.engine import upkeep

pytestmark = pytest.mark.guarantee(
    "`verify` runs",
    "several files are read at a time; the bar goes up to the total",
)

AT_ONCE = 2


@pytest.fixture(scope="module")
def mined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config whose run is complete."""
    folder = tmp_path_factory.mktemp("verified")
    config = small.build(folder)
    outcome = small.run("mine", config)
    assert outcome.code == 0, outcome.err
    return config


def recorded(run_dir: Path) -> dict[str, int]:
    """Bytes of every file that a manifest names."""
    books = [json.loads(path.read_text(encoding="utf-8")) for path in run_dir.glob(".negpipe/*/manifest.json")]
    return {file["path"]: file["bytes"] for one in books for part in one["parts"] for file in part["files"]}


def test_several_files_are_read_at_a_time(mined: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first file that is opened is not read before a second one is open too."""
    read, names, threads = hashlib.file_digest, list[str](), set[int]()
    together = threading.Barrier(AT_ONCE)
    begun = threading.Lock()

    def wait_for_another(file: Any, kind: Any) -> Any:
        with begun:
            first = len(names) < AT_ONCE
            names.append(str(Path(file.name).relative_to(mined.parent / "run")))
            threads.add(threading.get_ident())
        if first:
            together.wait(timeout=20)
        return read(file, kind)

    monkeypatch.setattr(hashlib, "file_digest", wait_for_another)
    outcome = small.run("verify", mined)
    assert outcome.code == 0, outcome.err
    files = recorded(mined.parent / "run")
    assert f"{len(files)} files in" in outcome.out
    assert sorted(names) == sorted(files)
    assert len(threads) >= AT_ONCE and threading.get_ident() not in threads


def test_progress_comes_file_by_file_and_ends_at_the_total(mined: Path) -> None:
    run_dir = mined.parent / "run"
    files = recorded(run_dir)
    found = graph.inventory(config_of(run_dir))
    assert found.bytes == sum(files.values()) == sum((run_dir / name).stat().st_size for name in files)
    told: list[int] = []
    assert upkeep.verify(config_of(run_dir), found, told.append) == []
    assert sorted(told) == sorted(files.values())
    assert sum(told) == found.bytes


def test_progress_reaches_the_total_where_files_are_damaged_or_gone(tmp_path: Path) -> None:
    config, run_dir = small.build(tmp_path), tmp_path / "run"
    assert small.run("mine", config).code == 0
    files = sorted(recorded(run_dir))
    os.truncate(run_dir / files[0], 1)
    (run_dir / files[1]).unlink()
    found, told = graph.inventory(config_of(run_dir)), list[int]()
    assert len(upkeep.verify(config_of(run_dir), found, told.append)) == 2
    assert sum(told) == found.bytes


def test_a_terminal_shows_the_bar_up_to_the_total(mined: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=screen, force_terminal=True, width=100, highlight=False))
    outcome = small.run("verify", mined)
    assert outcome.code == 0
    total = sum(recorded(mined.parent / "run").values())
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    done = re.findall(r"verify .*?(\d+\.\d)/(\d+\.\d) kB", shown)
    assert done[-1] == (f"{total / 1000:.1f}",) * 2, shown


def test_elsewhere_there_is_no_bar_but_a_line(mined: Path) -> None:
    (line,) = small.run("verify", mined).err.splitlines()
    count = len(recorded(mined.parent / "run"))
    assert re.search(rf"verify: reading {count} files, [\d.]+ kB$", line)
