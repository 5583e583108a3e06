"""Any sequence of runs, deaths, edits and damage: what a complete manifest lists is what a fresh run would make.

Everything happens in this process, on some rows with brought vectors. A death is an exception at one of the
changes a run makes to the disk; from then on it changes nothing more, as a killed process would not.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from real_runs import STAGES
from small_source import DIMENSION, write_qrels, write_rows
from upkeep_of import config_of

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.engine import upkeep
from negpipe.errors import DamagedError, MissingStageError

pytestmark = pytest.mark.guarantee(
    "settings, source, parts and deaths come in any order",
    "a current stage contains what a fresh run would make",
)

SETTINGS: dict[str, list[Any]] = {
    "mining.num_negatives": [3, 2],
    "mining.relative_margin": [None, 0.2],
    "mining.range_max": [6, 10],
    "mining.max_depth": [0, 60],
    "mining.on_shortage": ["keep", "random"],
    "search.depth": [10, 40],
    "output.format": ["triplet", "n-tuple"],
    "index.kind": ["flat", "stream", "IVF4,Flat", "IVF2,SQ4"],
    "encoder.storage": ["float16", "float32"],
    "data.part_rows": [16, 24],
}
_MEMORY = Path("/dev/shm")


class Killed(BaseException):
    """The run died here."""


_left: int | None = None


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    global _left  # noqa: PLW0603
    if _left is None:
        return
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
        _left -= 1
        if _left < 0:
            raise Killed


sys.addaudithook(_watch)


@contextmanager
def death_after(changes: int) -> Iterator[None]:
    """Die at one of the next changes to the disk, and change nothing more."""
    global _left  # noqa: PLW0603
    _left = changes
    try:
        with suppress(Killed):
            yield
    finally:
        _left = None
        gc.collect()  # a dead process holds no lock


def vector(text: str) -> list[float]:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return list(np.random.default_rng(seed).normal(size=DIMENSION))


class Machine(RuleBasedStateMachine):
    """A run directory, its source and its settings, and whatever may happen to them."""

    steps = 0
    fresh: ClassVar[dict[str, dict[str, list[str]]]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="negpipe-", dir=_MEMORY if _MEMORY.is_dir() else None))
        self.choice = dict.fromkeys(SETTINGS, 0)
        self.before: list[dict[str, int]] = []
        self.documents = [f"document {i}" for i in range(160)]
        self.queries = [f"query {i}" for i in range(30)]
        self.unseen = False  # damage that only reading everything finds
        self.write_source()

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    # --- what the machine is made of ---------------------------------------------------------------------

    def write_source(self) -> None:
        data = self.root / "data"
        write_rows(data / "corpus.jsonl", [{"_id": f"d{i}", "text": text} for i, text in enumerate(self.documents)])
        write_rows(data / "queries.jsonl", [{"_id": f"q{i}", "text": text} for i, text in enumerate(self.queries)])
        write_qrels(data / "qrels/train.tsv", [(f"q{i}", f"d{i}", 1) for i in range(len(self.queries))])
        for name, texts in (("corpus", self.documents), ("queries", self.queries)):
            np.save(self.root / f"{name}.npy", np.array([vector(text) for text in texts], np.float32))

    def config(self, run_dir: str = "run") -> Any:
        chosen = [f"{name}={json.dumps(SETTINGS[name][at])}" for name, at in self.choice.items()]
        return load_config(
            {
                "run_dir": str(self.root / run_dir),
                "data": {"path": str(self.root / "data")},
                "encoder": {
                    "backend": "precomputed",
                    "corpus_vectors": str(self.root / "corpus.npy"),
                    "anchor_vectors": str(self.root / "queries.npy"),
                },
                "index": {"min_recall": 0.6, "recall_anchors": 20},
                "executor": {"kind": "inline"},
                "resources": {"cpus": 1},
            },
            chosen,
        )

    def content(self, run_dir: str, stage: str) -> list[str]:
        """Digests of the files that a manifest lists, in order, read from the disk."""
        folder = self.root / run_dir
        parts = json.loads((folder / ".negpipe" / stage / "manifest.json").read_text())["parts"]
        paths = [folder / file["path"] for part in parts for file in part["files"]]
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]

    def wanted(self) -> dict[str, list[str]]:
        """What a run from nothing makes."""
        name = json.dumps([self.choice, self.documents, self.queries])
        if name not in self.fresh:
            graph.mine(self.config("fresh"))
            self.fresh[name] = {stage: self.content("fresh", stage) for stage in STAGES}
            shutil.rmtree(self.root / "fresh")
        return self.fresh[name]

    def files(self, stage: str) -> list[Path]:
        folders = [stage] if stage != "triplets" else [stage, "ledger"]
        return sorted(path for folder in folders for path in (self.root / "run" / folder).glob("[!.]*"))

    # --- what happens ------------------------------------------------------------------------------------

    @invariant()
    def what_is_current_is_what_a_fresh_run_makes(self) -> None:
        type(self).steps += 1
        if self.unseen:
            return
        config = self.config()
        current = [state.stage for state in graph.status(config) if state.state == "current"]
        for stage in current:
            # Exact candidates stored deeper than asked for serve as well: what is taken from them is compared.
            if stage != "search" or config.index.approximate or config.depth == max(SETTINGS["search.depth"]):
                assert self.content("run", stage) == self.wanted()[stage], stage

    @rule()
    def run(self) -> None:
        try:
            graph.mine(self.config())
        except DamagedError:
            assert self.unseen
        else:
            assert {state.state for state in graph.status(self.config())} == {"current"}

    @rule(changes=st.integers(0, 250))
    def kill(self, changes: int) -> None:
        with death_after(changes), suppress(*([DamagedError] if self.unseen else [])):
            graph.mine(self.config())

    @rule(stage=st.sampled_from(STAGES))
    def run_one_stage(self, stage: str) -> None:
        with suppress(MissingStageError, *([DamagedError] if self.unseen else [])):
            graph.mine(self.config(), only=stage)

    @rule(name=st.sampled_from(sorted(SETTINGS)), by=st.integers(1, 3))
    def change_setting(self, name: str, by: int) -> None:
        self.before.append(dict(self.choice))
        self.choice[name] = (self.choice[name] + by) % len(SETTINGS[name])

    @precondition(lambda self: self.before)
    @rule()
    def change_back(self) -> None:
        self.choice = self.before.pop()

    @rule(count=st.integers(1, 6))
    def append_rows(self, count: int) -> None:
        self.documents += [f"document {len(self.documents) + i}" for i in range(count)]
        self.write_source()

    @rule(at=st.integers(0, 17), word=st.sampled_from(["document", "changed"]))
    def edit_row(self, at: int, word: str) -> None:
        self.documents[at] = f"{word} {at}"
        self.write_source()

    @rule(at=st.integers(0, 8), word=st.sampled_from(["query", "asked"]))
    def edit_query(self, at: int, word: str) -> None:
        self.queries[at] = f"{word} {at}"
        self.write_source()

    # What hides the traces of unseen damage from a repair is only done where there is none.
    @precondition(lambda self: not self.unseen)
    @rule(stage=st.sampled_from(STAGES), at=st.integers(0, 99))
    def delete_a_part(self, stage: str, at: int) -> None:
        if files := self.files(stage):
            files[at % len(files)].unlink()

    @precondition(lambda self: not self.unseen)
    @rule(stage=st.sampled_from(STAGES), at=st.integers(0, 99), whole=st.booleans())
    def truncate_a_part(self, stage: str, at: int, whole: bool) -> None:
        if files := self.files(stage):
            path = files[at % len(files)]
            os.truncate(path, 0 if whole else path.stat().st_size // 2)

    @rule(stage=st.sampled_from(STAGES), at=st.integers(0, 99), byte=st.integers(0, 10**6))
    def flip_a_byte(self, stage: str, at: int, byte: int) -> None:
        if files := [path for path in self.files(stage) if path.stat().st_size]:
            path = files[at % len(files)]
            content = bytearray(path.read_bytes())
            content[byte % len(content)] ^= 1
            path.write_bytes(content)
            self.unseen = True

    @rule(stage=st.sampled_from(STAGES), at=st.integers(0, 99))
    def swap_two_of_a_size(self, stage: str, at: int) -> None:
        files = self.files(stage)
        pairs = [(a, b) for a in files for b in files if a < b and a.stat().st_size == b.stat().st_size]
        if pairs:
            one, other = pairs[at % len(pairs)]
            content = one.read_bytes()
            one.write_bytes(other.read_bytes())
            other.write_bytes(content)
            self.unseen = True

    @precondition(lambda self: not self.unseen)
    @rule(stage=st.sampled_from(STAGES), how=st.sampled_from(["remove", "cut", "change"]))
    def damage_a_manifest(self, stage: str, how: str) -> None:
        path = self.root / "run" / ".negpipe" / stage / "manifest.json"
        if not path.exists():
            return
        if how == "remove":
            path.unlink()
        elif how == "cut":
            os.truncate(path, path.stat().st_size // 2)
        else:
            path.write_text(
                re.sub(r'"rows": (\d)', lambda match: f'"rows": {int(match[1]) + 1}', path.read_text(), count=1)
            )

    @precondition(lambda self: not self.unseen)
    @rule()
    def clean(self) -> None:
        with suppress(DamagedError):
            graph.clean(config_of(self.root / "run"))

    @rule()
    def repair(self) -> None:
        graph.mine(self.config(), repair=True)
        self.unseen = False
        assert {state.state for state in graph.status(self.config())} == {"current"}
        assert not upkeep.verify(config_of(self.root / "run"), graph.inventory(config_of(self.root / "run")))


@pytest.mark.slow
@pytest.mark.torture
def test_what_is_complete_is_what_a_fresh_run_makes(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    full = request.config.getoption("--torture")
    Machine.steps = 0
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=100 if full else 4,
            stateful_step_count=30 if full else 10,
            deadline=None,
            phases=[Phase.generate],
            derandomize=not full,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    record_property("count: steps of the state machine", Machine.steps)
