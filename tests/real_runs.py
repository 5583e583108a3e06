"""Starting runs and looking at what they left on disk, without the package's own readers."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.engine.state import State
from negpipe.stages import STAGES as STAGES_OF_NEGPIPE

STAGES = ("ingest", "encode", "index", "search", "triplets")
PATIENCE = 120


def sealed(book: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest or a record with the digest that belongs to it."""
    value = {name: value for name, value in book.items() if name != "digest"}
    return value | {"digest": hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()}


@dataclass(frozen=True)
class Run:
    """A config and the run directory it names."""

    config: dict[str, Any]

    @property
    def folder(self) -> Path:
        return Path(self.config["run_dir"])

    def at(self, folder: Path) -> Run:
        """The same config for another, new run directory."""
        return replace(self, config={**self.config, "run_dir": str(folder)})

    def copied(self, folder: Path) -> Run:
        """The same config, and everything it has made so far, in another run directory."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return self.at(folder)

    def mine(self, *overrides: str, only: str | None = None) -> graph.Result:
        """Run in this process, tasks inline where the stage allows."""
        return graph.mine(load_config(self.config, ["executor.kind=inline", *overrides]), only=only)

    def states(self, *overrides: str) -> dict[str, State]:
        return {state.stage: state for state in graph.status(load_config(self.config, list(overrides)))}

    def start(
        self, verb: str, *overrides: str, flags: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """`python -m negpipe VERB CONFIG` in a process group of its own; its standard error goes to `log`."""
        options = [option for override in overrides for option in ("--set", override)]
        command = [sys.executable, "-m", "negpipe", *verb.split(), str(self.file()), *options, *flags]
        return self.started(command, environment)

    def started(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """The same of any command."""
        with self.log.open("w", encoding="utf-8") as log:
            return subprocess.Popen(
                command,
                env={**os.environ, **(environment or {})},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                preexec_fn=_heed_ctrl_c,  # noqa: PLW1509 — it takes no lock
            )

    def file(self, path: Path | None = None) -> Path:
        """The config as a file, without the report: it takes seconds, which tests of other things need not pay."""
        path = path or self.folder.with_name(f"{self.folder.name}.yaml")
        output = {"report": False, **self.config.get("output", {})}
        path.write_text(json.dumps({**self.config, "output": output}), encoding="utf-8")
        return path

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    def command(
        self, verb: str, *overrides: str, flags: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of a command run to its end."""
        process = self.start(verb, *overrides, flags=flags, environment=environment)
        output, _ = process.communicate(timeout=PATIENCE)
        return process.returncode, output, self.log.read_text(encoding="utf-8")

    # --- the disk ---------------------------------------------------------------------------------------

    def manifest(self, stage: str) -> Any:
        return json.loads((self.folder / ".negpipe" / stage / "manifest.json").read_text(encoding="utf-8"))

    def change_manifest(self, stage: str, manifest: Any) -> None:
        """Write it with the digest that belongs to it, as negpipe would have written it."""
        path = self.folder / ".negpipe" / stage / "manifest.json"
        path.write_text(json.dumps(sealed(manifest)), encoding="utf-8")

    def parts(self, stage: str, kind: str | None = None) -> list[Any]:
        """The parts of a stage's current output, in order."""
        return [part for part in self.manifest(stage)["parts"] if kind in (None, part["kind"])]

    def files(self, stage: str, kind: str | None = None) -> list[Path]:
        """The first file of every part, of triplets that of its rows."""
        files = [
            next((file for file in part["files"] if file["role"].startswith("rows")), part["files"][0])
            for part in self.parts(stage, kind)
        ]
        return [self.folder / file["path"] for file in files]

    def paths(self, stage: str, folder: str) -> list[Path]:
        """The files of a stage's current output that lie in a folder of the run directory."""
        files = [file["path"] for part in self.parts(stage) for file in part["files"]]
        return [self.folder / path for path in files if path.startswith(f"{folder}/")]

    def tables(self, kind: str) -> pa.Table:
        """What ingest wrote of a kind; `documents` is corpus and added positives."""
        kinds = ("corpus", "added") if kind == "documents" else (kind,)
        paths = [path for name in kinds for path in self.files("ingest", name)]
        return pa.concat_tables([pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in paths])

    def namesakes(self) -> dict[int, list[int]]:
        """Rows that the queries of a normalised text are known to have, by its hash, where there are several."""
        found: dict[int, list[int]] = {}
        for path in self.files("ingest", "namesakes"):
            for pair in pa.ipc.open_file(pa.memory_map(str(path))).read_all().to_pylist():
                found.setdefault(pair["normalized"], []).append(pair["row"])
        return found

    def content(self, *stages: str) -> dict[str, bytes]:
        """Every file of the current output, by path."""
        paths = [file["path"] for stage in stages or STAGES for part in self.parts(stage) for file in part["files"]]
        return {path: (self.folder / path).read_bytes() for path in paths}

    def inodes(self, *stages: str) -> dict[str, int]:
        return {path: (self.folder / path).stat().st_ino for path in self.content(*stages)}

    def committed(self, stage: str) -> list[Any]:
        """The sidecars of a stage that never completed."""
        folder = self.folder / ".negpipe" / stage
        names = [path for path in folder.glob("*.json") if path.name != "manifest.json"] if folder.is_dir() else []
        return [json.loads(path.read_text(encoding="utf-8")) for path in names if not path.name.startswith(".")]

    def begun(self, stage: str, parts: int) -> Callable[[], bool]:
        """Whether so many parts of a stage are committed, asked as quickly as the disk answers."""
        folder = self.folder / ".negpipe" / stage

        def asked() -> bool:
            try:
                names = [path.name for path in folder.iterdir()]
            except FileNotFoundError:
                return False
            return sum(name.endswith(".json") and name != "manifest.json" and name[0] != "." for name in names) >= parts

        return asked

    def complete(self, stage: str) -> bool:
        return (self.folder / ".negpipe" / stage / "manifest.json").exists()

    def forget(self, stage: str) -> None:
        """Take a stage back to where it has not begun."""
        for path in [self.folder / stage, self.folder / ".negpipe" / stage, *self.folder.glob(f".{stage}-*")]:
            shutil.rmtree(path, ignore_errors=True)
        if stage == "triplets":
            (self.folder / stage).unlink(missing_ok=True)
            for folder in ("rows", "ledger", "deeper", ".triplets"):
                shutil.rmtree(self.folder / folder, ignore_errors=True)


@contextmanager
def encoding_here() -> Iterator[None]:
    """The real encode stage in this process: one of its own imports the model library anew, for ten seconds.

    For tests that are not about processes; what a process of its own makes is in the run `golden`.
    """
    stage = replace(STAGES_OF_NEGPIPE["encode"], place=lambda config: "worker")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STAGES_OF_NEGPIPE, "encode", stage)
        yield


def programs(folder: Path, **scripts: str) -> Path:
    """A folder with the program negpipe, as this Python runs it, and others by name."""
    folder.mkdir(parents=True)
    for name, text in {"negpipe": f'#!/bin/sh\nexec {sys.executable} -m negpipe "$@"\n', **scripts}.items():
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)
    return folder


def _heed_ctrl_c() -> None:
    # Tests that a shell runs in the background hand down that Ctrl-C is to be ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def wait(process: subprocess.Popen[str], asked: Callable[[], bool]) -> bool:
    """Wait until the answer is yes (True) or the process has ended (False)."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if asked():
            return True
        if process.poll() is not None:
            return asked()
        time.sleep(0.0005)
    raise TimeoutError(f"nothing happened for {PATIENCE} s: {process.args!r}")


def interrupted(
    run: Run, stage: str, *overrides: str, parts: int = 2, how: Callable[[subprocess.Popen[str]], None]
) -> subprocess.Popen[str]:
    """Start `mine`, and do something to it as soon as a stage has so many parts and is not complete.

    Stages are quick on small data: where the stage was over before the blow fell, it is taken back and tried again.
    """
    for _ in range(10):
        process = run.start("mine", *overrides)
        try:
            if wait(process, run.begun(stage, parts)):
                how(process)
            process.wait(PATIENCE)
        finally:
            kill(process)
        if not run.complete(stage):
            assert len(run.committed(stage)) >= parts, run.log.read_text(encoding="utf-8")
            return process
        for later in STAGES[STAGES.index(stage) :]:
            run.forget(later)
    raise AssertionError(f"{stage} was always over before it could be interrupted")


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the whole process group: nothing is let go of in order."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(PATIENCE)
    if process.stdout is not None:
        process.stdout.close()
