"""Blows against real runs, and an independent look at what they leave.

`blow` says what `injected/sitecustomize.py` does in every process of a run. The truth about a run directory is read
here from the files alone: JSON, sizes and sha256, nothing of the package.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real_runs import PATIENCE, STAGES, Run, kill

BOUNDARIES = ("before write", "mid-write", "before rename", "after rename")
WORKERS = 2
_INJECTED = Path(__file__).with_name("injected")


def blow(**what: Any) -> dict[str, str]:
    """The environment of a run that is struck."""
    return {"PYTHONPATH": str(_INJECTED), "BLOW": json.dumps(what)}


@dataclass(frozen=True)
class Boundary:
    """A named place in the writing of the n-th file of a kind in a stage."""

    stage: str
    what: str
    boundary: str
    nth: int

    def __str__(self) -> str:
        return f"{self.stage} {self.what} {self.nth} {self.boundary}"

    @property
    def environment(self) -> dict[str, str]:
        return blow(stage=self.stage, what=self.what, boundary=self.boundary, nth=self.nth)


def boundaries() -> Iterator[Boundary]:
    """Every boundary of every kind of file in every stage, at a file drawn by seed."""
    draw = random.Random(0)
    for stage in STAGES:
        for what in ("part", "sidecar", "manifest"):
            for boundary in BOUNDARIES:
                if what == "manifest" and boundary.endswith("write"):
                    continue  # a manifest has no name before it is renamed; before the rename is before the manifest
                yield Boundary(stage, what, boundary, 1 if what == "manifest" else draw.randint(1, 4))


def forget_from(run: Run, stage: str) -> None:
    """Take a run back to where a stage has not begun."""
    for later in STAGES[STAGES.index(stage) :]:
        forget(run, later)


def forget(run: Run, stage: str) -> None:
    """Take one stage away; what was made from its output waits for it."""
    run.forget(stage)


def killed_at(run: Run, boundary: Boundary) -> None:
    """Run until the boundary, where the whole process group dies."""
    process = run.start("mine", f"executor.workers={WORKERS}", environment=boundary.environment)
    try:
        assert process.wait(PATIENCE) == -9, run.log.read_text(encoding="utf-8")
    finally:
        kill(process)
        _wait_for_the_group(process.pid)


def killed_after(run: Run, seconds: float) -> bool:
    """Run, and kill the whole process group after so long; whether it was still running."""
    process = run.start("mine", f"executor.workers={WORKERS}")
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    finally:
        kill(process)
        _wait_for_the_group(process.pid)
    assert process.returncode == 0, run.log.read_text(encoding="utf-8")
    return False


def _wait_for_the_group(group: int) -> None:
    """A killed process lives until the system call it is in, a sync perhaps, comes back."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(_members(group)):
        time.sleep(0.01)


def _members(group: int) -> Iterator[int]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, of_group = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:3]
            if int(of_group) == group and state not in "ZX":
                yield int(path.parent.name)


def seconds_of(run: Run, stage: str, scratch: Path) -> float:
    """How long a run takes that lacks one stage."""
    copy = run.copied(scratch)
    forget(copy, stage)
    started = time.monotonic()
    assert not killed_after(copy, PATIENCE)
    return time.monotonic() - started


# --- the disk, read independently -------------------------------------------------------------------------


def _whole(run: Run, file: dict[str, Any]) -> bool:
    path = run.folder / file["path"]
    return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == str(file["digest"])


def truth(run: Run) -> dict[str, tuple[str, int]]:
    """State and number of finished parts of every stage, with the settings the run was started with."""
    told: dict[str, tuple[str, int]] = {}
    blocked = False
    for stage in STAGES:
        books = run.folder / ".negpipe" / stage
        finished = [part for part in run.committed(stage) if all(_whole(run, file) for file in part["files"])]
        if (books / "manifest.json").exists():
            parts = json.loads((books / "manifest.json").read_text(encoding="utf-8"))["parts"]
            assert all(_whole(run, file) for part in parts for file in part["files"])
            told[stage] = ("blocked" if blocked else "current"), 0
        elif blocked:
            told[stage] = "blocked", 0
        else:
            told[stage] = ("partial" if finished else "missing"), len(finished)
            blocked = True
    return told


def status(run: Run) -> dict[str, tuple[str, int]]:
    """The same as `negpipe status` tells it."""
    return {name: (state.state, state.done) for name, state in run.states().items()}


def sidecars(run: Run) -> dict[str, tuple[int, int]]:
    """Inodes and times of the records of finished parts: one that is made again gets others."""
    books = run.folder / ".negpipe"
    paths = [path for stage in STAGES for path in (books / stage).glob("[!.]*.json") if path.name != "manifest.json"]
    return {str(path.relative_to(books)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def begun(run: Run) -> int:
    """How many tasks were begun and not finished: the most files of a folder that no record names."""
    named = {
        str(run.folder / file["path"]) for stage in STAGES for part in run.committed(stage) for file in part["files"]
    }
    views = ("triplets", ".triplets", ".negpipe")
    folders = [path for path in run.folder.iterdir() if path.is_dir() and path.name not in views]
    counts = [sum(str(path) not in named for path in folder.iterdir()) for folder in folders]
    return max(counts, default=0)


def survives(run: Run, undisturbed: Run, *, by_command: bool) -> None:
    """After a blow: status tells the truth; the resumed run makes nothing twice and ends with the same bytes."""
    assert status(run) == truth(run)
    assert begun(run) <= WORKERS
    before = sidecars(run)
    finished = {stage for stage, (state, _) in truth(run).items() if state == "current"}
    kept = {stage: run.inodes(stage) for stage in finished}
    if by_command:
        code, _, log = run.command("mine", f"executor.workers={WORKERS}")
        assert code == 0, log
    else:
        run.mine()
    assert run.content() == undisturbed.content()
    after = sidecars(run)
    assert {name: after[name] for name in before} == before
    assert {stage: run.inodes(stage) for stage in finished} == kept
    assert not [p for p in run.folder.rglob("*") if p.name.endswith(".tmp") or p.name.startswith("spool-")], "left over"
    assert sorted(path.name for path in run.folder.glob(".*")) == [".negpipe", ".triplets"]
    assert status(run) == truth(run)
    assert {state for state, _ in truth(run).values()} == {"current"}


def alive(processes: list[int]) -> list[int]:
    return [process for process in processes if os.path.exists(f"/proc/{process}")]  # noqa: PTH110
