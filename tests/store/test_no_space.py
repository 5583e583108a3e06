"""A file system that refuses, in every stage: an error that says what, no half file, and a run that goes on after."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import small_source as small
from as_root import PRIVILEGED, needs_a_namespace, needs_root, run_in_a_namespace
from real_runs import STAGES

from negpipe.store.files import explained

pytestmark = [
    pytest.mark.slow,
    pytest.mark.guarantee(
        "no space, quota, read-only, no permission",
        "an error with path, free bytes, and those needed (of what is compressed: more than those so far); no"
        " half file; goes on after",
    ),
]

WRITTEN = {"ingest": "ingest", "encode": "encode", "index": "index", "search": "search", "triplets": "ledger"}


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A folder in which nothing has run."""
    small.build(tmp_path)
    return tmp_path


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Callable[..., None]]:
    """A file system of its own in a folder; what it yields mounts it again, with other options."""

    def mount(*options: str) -> None:
        subprocess.run(["mount", *options, str(folder)], check=True, capture_output=True)

    folder.mkdir(exist_ok=True)
    try:
        mount(*options)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("nothing can be mounted here")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@needs_a_namespace
def test_as_root_of_a_namespace() -> None:
    run_in_a_namespace(__file__)


def check_refusal(outcome: small.Outcome, run_dir: Path) -> None:
    """A clear error, and on disk only whole files under final names."""
    assert outcome.code == 1, outcome.err
    # Known before, or met while writing.
    assert re.search(
        r"negpipe: (cannot write |.* take about [\d,]+ bytes|.* writes( about)? [\d,]+ bytes)", outcome.err
    )
    assert "run the same command again" in outcome.err
    assert not [path for path in run_dir.rglob("*") if path.name.endswith(".tmp") or path.name.startswith("spool-")]
    for path in run_dir.rglob(".negpipe/*/*.json"):
        entry = json.loads(path.read_text(encoding="utf-8"))
        for file in [file for part in entry.get("parts", [entry]) for file in part["files"]]:
            made = run_dir / file["path"]
            assert made.stat().st_size == file["bytes"]


@needs_root
def test_no_space_left_wherever_it_ends(finished: Path, tmp_path: Path) -> None:
    config, run_dir = small.build(tmp_path), tmp_path / "run"
    with mounted(run_dir, "-t", "tmpfs", "-o", "size=4k", "tmpfs") as mount:
        stopped = set()
        for size in range(16, 1000, 4):
            outcome = small.run("mine", config, "--log-format", "json")
            if outcome.code == 0:
                break
            lines = [json.loads(line) for line in outcome.err.splitlines()]
            assert lines[-1]["error"] == "storage"
            assert "no space left" in lines[-1]["message"] or "bytes are free there" in lines[-1]["message"]
            check_refusal(small.Outcome(outcome.code, "", "negpipe: " + lines[-1]["message"]), run_dir)
            stopped.add(lines[-2:][0]["message"].partition(":")[0])  # what it was at, if it came as far as to say so
            mount("-o", f"remount,size={size}k")
        assert outcome.code == 0
        # How many places it meets depends on when the disk is asked; each stage by itself is the next test.
        assert len(stopped) > 1, stopped
        assert small.output(run_dir) == small.output(finished / "run")


@needs_root
@pytest.mark.parametrize("stage", STAGES)
def test_no_space_left_in_a_stage(stage: str, finished: Path, tmp_path: Path) -> None:
    """The disk is full to the last page when the stage begins."""
    config, run_dir = small.build(tmp_path), tmp_path / "run"
    with mounted(run_dir, "-t", "tmpfs", "-o", "size=4m", "tmpfs"):
        for earlier in STAGES[: STAGES.index(stage)]:
            assert small.run(earlier, config).code == 0
        before = small.output(run_dir)
        with (run_dir / "ballast").open("wb", buffering=0) as ballast, pytest.raises(OSError, match="No space"):
            while True:
                ballast.write(bytes(4096))
        # Room for what is written before the stage itself.
        os.truncate(run_dir / "ballast", (run_dir / "ballast").stat().st_size - 2 * 4096)
        outcome = small.run("mine", config)
        check_refusal(outcome, run_dir)
        assert "bytes are free there" in outcome.err.replace("\n", " ")
        (run_dir / "ballast").unlink()
        assert before.items() <= small.output(run_dir).items()
        assert small.run("mine", config).code == 0
        assert small.output(run_dir) == small.output(finished / "run")


@needs_root
def test_the_bytes_needed_are_named(finished: Path, fresh: Path) -> None:
    config, run_dir = fresh / "config.yaml", fresh / "run"
    manifest = json.loads((finished / "run/.negpipe/ingest/manifest.json").read_text(encoding="utf-8"))
    (run_dir / "ingest").mkdir(parents=True)
    with mounted(run_dir / "ingest", "-t", "tmpfs", "-o", "size=4k", "tmpfs"):
        (run_dir / "ingest" / "ballast").write_bytes(bytes(4096))
        outcome = small.run("mine", config)
        check_refusal(outcome, run_dir)
    needed = manifest["parts"][0]["files"][0]["bytes"]
    assert f"{needed:,} bytes are needed. 0 bytes are free there" in outcome.err.replace("\n", " ")


@needs_root
@pytest.mark.parametrize("linked", [False, True], ids=["mounted", "linked"])
def test_the_disk_of_a_stage_is_asked_before_it_begins(linked: bool, fresh: Path) -> None:
    """Where vectors go to a disk of their own, that one must have room for them, and for nothing else."""
    config, run_dir, scratch = fresh / "config.yaml", fresh / "run", fresh / "scratch"
    assert small.run("ingest", config).code == 0
    place = scratch if linked else run_dir / "encode"
    place.mkdir()
    with mounted(place, "-t", "tmpfs", "-o", "size=4k", "tmpfs") as mount:
        if linked:
            (run_dir / "encode").symlink_to(scratch)
        (place / "ballast").write_bytes(bytes(4096))
        outcome = small.run("mine", config)
        check_refusal(outcome, run_dir)
        vectors = (small.DOCUMENTS + small.QUERIES) * small.DIMENSION * 2
        told = f"take about {vectors:,} bytes in {run_dir}/encode, 0 bytes are free there"
        assert told in outcome.err.replace("\n", " ")
        mount("-o", "remount,size=100k")
        assert small.run("mine", config).code == 0
        assert small.run("verify", config).code == 0


@needs_root
def test_rows_on_a_disk_of_their_own_cannot_be_published(finished: Path, fresh: Path) -> None:
    config, run_dir = fresh / "config.yaml", fresh / "run"
    (run_dir / "triplets").mkdir(parents=True)
    with mounted(run_dir / "triplets", "-t", "tmpfs", "tmpfs"):
        outcome = small.run("mine", config)
        assert outcome.code == 1
        assert f"{run_dir}/triplets cannot be replaced" in outcome.err.replace("\n", " ")
    made = {path.stat().st_ino for path in run_dir.glob(".triplets/*/*")}
    assert small.run("mine", config).code == 0
    assert small.output(run_dir) == small.output(finished / "run")
    assert {path.stat().st_ino for path in (run_dir / "triplets").iterdir()} == made


@needs_root
@pytest.mark.parametrize("stage", STAGES)
def test_read_only_in_a_stage(stage: str, finished: Path, fresh: Path) -> None:
    config, run_dir = fresh / "config.yaml", fresh / "run"
    folder = run_dir / WRITTEN[stage]
    folder.mkdir(parents=True)
    with mounted(folder, "-t", "tmpfs", "tmpfs") as mount:
        mount("-o", "remount,ro")
        outcome = small.run("mine", config)
        check_refusal(outcome, run_dir)
        assert f"cannot write {folder}: the file system is read-only" in outcome.err.replace("\n", "")
        mount("-o", "remount,rw")
        assert small.run("mine", config).code == 0
        assert small.output(run_dir) == small.output(finished / "run")


@contextmanager
def read_only_after(verb: str, fresh: Path) -> Iterator[tuple[Path, Path]]:
    """The config and the run directory, which nobody can write to any more after the command."""
    config, run_dir = fresh / "config.yaml", fresh / "run"
    with mounted(run_dir, "-t", "tmpfs", "tmpfs") as mount:
        assert small.run(verb, config).code == 0
        mount("-o", "remount,ro")
        yield config, run_dir


@needs_root
def test_the_whole_run_directory_read_only(fresh: Path) -> None:
    with read_only_after("ingest", fresh) as (config, _):
        outcome = small.run("mine", config)
        assert outcome.code == 1
        assert "the file system is read-only" in outcome.err
        # Looking needs no writing.
        assert small.run("status", config).code == 0
        assert small.run("verify", config).code == 0


@needs_root
def test_audit_of_a_run_directory_read_only(fresh: Path) -> None:
    with read_only_after("mine", fresh) as (config, run_dir):
        check_refusal(small.run("audit", config), run_dir)
        assert small.run("diff", run_dir, run_dir).code == 0  # it writes to the system's temporary folder


UNPRIVILEGED = """
import json, sys
from pathlib import Path

tests, written, *configs = sys.argv[1:]
sys.path.insert(0, tests)
import small_source

for config, folder in zip(configs, json.loads(written)):
    folder = Path(config).parent / "run" / folder
    folder.mkdir(parents=True)
    folder.chmod(0o555)
    outcome = small_source.run("mine", config)
    folder.chmod(0o755)
    print(json.dumps([outcome.code, outcome.err]))
"""


def test_no_permission_in_any_stage(finished: Path, tmp_path: Path) -> None:
    for stage in STAGES:
        (tmp_path / stage).mkdir()
    configs = {stage: small.build(tmp_path / stage) for stage in STAGES}
    written = json.dumps([WRITTEN[stage] for stage in STAGES])
    command = [sys.executable, "-c", UNPRIVILEGED, str(Path(__file__).parents[1]), written, *map(str, configs.values())]
    if PRIVILEGED:  # root without the right to pass by permissions
        if not shutil.which("setpriv"):
            pytest.skip("root passes by permissions")
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for stage, line in zip(STAGES, done.stdout.splitlines(), strict=True):
        code, log = json.loads(line)
        run_dir = tmp_path / stage / "run"
        check_refusal(small.Outcome(code, "", log), run_dir)
        assert f"cannot write {run_dir / WRITTEN[stage]}: no permission to write" in log.replace("\n", "")
        assert small.run("mine", configs[stage]).code == 0
        assert small.output(run_dir) == small.output(finished / "run")


@pytest.mark.parametrize("stage", STAGES)
def test_quota_used_up_in_a_stage(stage: str, finished: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS tells it: when the file is synced."""
    config, run_dir = fresh / "config.yaml", fresh / "run"
    sync = os.fsync

    def refuse(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").readlink().parent == run_dir / WRITTEN[stage]:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        outcome = small.run("mine", config)
    check_refusal(outcome, run_dir)
    assert "the disk quota is exceeded" in outcome.err
    assert small.run("mine", config).code == 0
    assert small.output(run_dir) == small.output(finished / "run")


def test_a_file_larger_than_the_process_may_write(fresh: Path, finished: Path) -> None:
    config = fresh / "config.yaml"
    assert [small.run(stage, config).code for stage in ("ingest", "encode")] == [0, 0]
    before = small.made(fresh / "run")
    limit = 1200  # bytes: too few for the index

    def refuse() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "negpipe", "mine", str(config)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, preexec_fn=refuse, timeout=120)
    check_refusal(small.Outcome(done.returncode, done.stdout, done.stderr), fresh / "run")
    assert f"cannot write {fresh}/run/index: the file is larger than" in done.stderr
    assert before.items() <= small.made(fresh / "run").items()
    outcome = small.run("mine", config)
    assert outcome.code == 0, outcome.err
    assert small.output(fresh / "run") == small.output(finished / "run")


def test_a_source_that_may_not_be_read_is_not_a_run_directory_that_may_not_be_written(tmp_path: Path) -> None:
    def read(**where: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "source.jsonl"))

    with pytest.raises(PermissionError), explained(tmp_path / "run"):
        read()
