"""One stage made by several processes, on several machines over a shared file system, and then committed.

A shard makes the tasks whose key falls to it and writes no manifest. Nothing but the store tells the shards of each
other: which parts are there, and which tasks somebody has claimed (`store.claims`). So they may start, end and die in
any order, and be started again; what is left is the bytes of an ordinary run, which `commit` names in the manifest.
"""

from __future__ import annotations

import json
import logging
import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from negpipe.config.schema import Config
from negpipe.engine import pipeline, versions
from negpipe.engine.manifest import Books, Manifest, Part
from negpipe.engine.progress import Reporter, Silent
from negpipe.engine.stage import Context, Executor, Graph, Progressed, Stage, Task
from negpipe.engine.state import State, blocked, identity_of
from negpipe.errors import ConfigError, MissingPartsError, MissingStageError
from negpipe.store.claims import PATIENCE, Claims
from negpipe.store.files import json_bytes

logger = logging.getLogger(__name__)
_SHARD = re.compile(r"(\d+)/(\d+)")
_NAMED = 5  # of what is missing, in an error
_LOOK = 2.0  # seconds between two looks at what others work on


@dataclass(frozen=True)
class Shard:
    """Number `number` of `of` shards, from 0."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read "3/16".

        Raises:
            ConfigError: that is no shard.
        """
        named = _SHARD.fullmatch(text)
        if not named or int(named[1]) >= int(named[2]):
            raise ConfigError(f"--shard {text}: expected I/N with I from 0 to N - 1; of 16 shards the last is 15/16")
        return cls(int(named[1]), int(named[2]))

    def has(self, key: str) -> bool:
        """Whether the task of a key falls to it."""
        return shard_of(key, self.of) == self.number

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def shard_of(key: str, of: int) -> int:
    """The shard that a task falls to: the same for every process, whatever has been made."""
    return int(key, 16) % of


@dataclass(frozen=True)
class Worked:
    """What became of a shard: how many parts it made, found, and saw others make. All of its tasks have theirs."""

    stage: str
    shard: Shard
    made: int = 0
    found: int = 0
    others: int = 0


def work(
    config: Config,
    graph: Graph,
    name: str,
    shard: Shard,
    *,
    reporter: Reporter | None = None,
    rehash: bool = False,
    once: bool = False,
    patience: float = PATIENCE,
) -> Worked:
    """Make what is missing of a shard of a stage. What another process works on is waited for.

    A stage that plans in rounds goes on when a round is complete: there, a shard also makes what nobody works on.

    Args:
        config: what to make.
        graph: the stages that make it.
        name: the stage; its inputs must be there.
        shard: which of its tasks.
        reporter: where progress goes.
        rehash: read every source file again instead of trusting its modification time.
        once: leave the rounds to come to who submits the shards.
        patience: seconds without a sign of life after which another process counts as dead.

    Raises:
        NegpipeError: a task failed; finished parts stay.
        MissingStageError: an input has not been made.
        VersionsError: other versions of libraries are installed than where the first shard began.
    """
    stage = graph[name]
    if stage.place(config) == "caller":
        raise ConfigError(f"{name} does not run in shards: run `negpipe {name} CONFIG`")
    with pipeline.opened(config, graph, rehash=rehash, hold="shared") as first:
        context, current = _reached(stage, graph, first)
        if current:
            logger.info("%s: up to date", name)
            return Worked(name, shard, found=sum(shard.has(part.key) for part in current.parts))
        stage.examine(context)
        pipeline.check_inputs(stage, graph, context)
        key = identity_of(stage, context).key
        own = replace(stage.within(context), key=key, shard=f"{shard.number}-of-{shard.of}")
        claims = Claims(own.store, own.own.folder, patience)
        job = _Job(stage, own, shard, claims, reporter or Silent(), once)
        with pipeline.damage_named(stage, own), claims.kept():
            return job.done()


def commit(config: Config, graph: Graph, name: str, shards: int | None = None, **options: Any) -> pipeline.Result:
    """Write the manifest of a stage whose parts are all there. Makes none.

    Args:
        config: what was made.
        graph: the stages that made it.
        name: the stage.
        shards: how many there were, to name those that lack parts.
        options: `rehash` and `rebuild` of `pipeline.mine`.

    Raises:
        MissingPartsError: parts are missing; the message says how many, and which.
        LockedError: a shard is at work.
    """
    if graph[name].place(config) == "caller":
        raise ConfigError(f"{name} does not run in shards: run `negpipe {name} CONFIG`, which also commits it")
    return pipeline.mine(config, graph, only=name, executor=_refusing(shards), **options)


def _refusing(shards: int | None) -> Executor:
    """In place of an executor: what there is for one to do is missing."""

    def run(stage: Stage, tasks: Iterator[Task], context: Context, progress: Progressed) -> None:
        missing = [*tasks]
        if not missing:
            return
        named = some([f"{task.key} ({task.kind}, {task.rows:,} rows)" for task in missing])
        which = "I/N` for the shards that failed"
        if shards:
            lacking = sorted({shard_of(task.key, shards) for task in missing})
            which = f"I/{shards}` for I = {','.join(map(str, lacking))}"
        raise MissingPartsError(
            f"{stage.name}: {len(missing):,} parts are missing: {named}. Run `negpipe work {stage.name} CONFIG"
            f" --shard {which}, which makes only the missing parts, then commit again"
        )

    return run


def _reached(stage: Stage, graph: Graph, context: Context) -> tuple[Context, Manifest | None]:
    """The context with the stages before a stage, and its own manifest where it is current.

    Raises:
        MissingStageError: one before it is not current.
    """
    for before in graph.values():
        if before.name == stage.name:
            break
        state = pipeline.looked(before, context)
        if state.state != "current" or state.manifest is None:
            raise MissingStageError(blocked(state, stage.name))
        context = context.after(before, state.manifest)
    # Where there is no manifest, a look would read all parts, those of the other shards too.
    state = pipeline.looked(stage, context) if context.books(stage.name).content() else State(stage.name, "missing")
    return context, state.manifest if state.state == "current" else None


@dataclass
class _Job:
    """A shard at work."""

    stage: Stage
    context: Context
    shard: Shard
    claims: Claims
    reporter: Reporter
    once: bool = False
    made: int = 0
    found: int = 0
    others: int = 0

    @property
    def books(self) -> Books:
        return self.context.own

    def done(self) -> Worked:
        """Make the tasks of one round after the other."""
        known: set[str] = set()
        while True:
            planned = [task for task in self.stage.plan(self.context) if task.key not in known]
            known |= {task.key for task in planned}
            mine = [task for task in planned if self.shard.has(task.key)]
            rest = [task for task in planned if not self.shard.has(task.key)] if self.stage.rounds else []
            self._make([*mine, *rest])
            if self.once or not (planned and self.stage.rounds):
                return Worked(self.stage.name, self.shard, self.made, self.found, self.others)

    def _make(self, tasks: list[Task]) -> None:
        """Make what nobody works on, and wait for what others do, until every task has its part."""
        present = self.books.found([task.key for task in tasks])
        left = [task for task in tasks if task.key not in present]
        self.found += len(present)
        if left:
            self._agree(present)
        told = False
        while left:
            before, claimed = self.made, self._claimed(left)
            if first := next(claimed, None):
                total = sum(task.rows for task in left)
                pipeline.run_tasks(
                    self.stage, chain([first], claimed), self.context, self.reporter, total, ended=self._ended
                )
            elif not told:
                who = sorted({owner for task in left if (owner := self.claims.owner(task.key))})
                logger.info("%s: waiting for %d parts of other processes: %s", self.stage.name, len(left), some(who))
                told = True
            if not first:
                time.sleep(min(_LOOK, self.claims.patience / 4))
            there = self.books.found([task.key for task in left])
            missing = [task for task in left if task.key not in there]
            self.others += len(left) - len(missing) - (self.made - before)
            left = missing

    def _claimed(self, tasks: Sequence[Task]) -> Iterator[Task]:
        """Those that nobody works on, claimed when they are asked for. It waits for nobody: what runs must be heard."""
        for task in tasks:
            if self.books.part(task.key) is None and self.claims.take(task.key):
                if self.books.part(task.key):  # it was made, and its claim given up, while we looked
                    self.claims.release(task.key)
                else:
                    yield task

    def _ended(self, task: Task) -> None:
        pipeline.part_of(self.stage, self.context, task.key)
        self.claims.release(task.key)
        self.made += 1

    def _agree(self, present: Mapping[str, Part]) -> None:
        """Have the libraries that the first shard of the stage began with; parts of earlier runs may have others.

        Raises:
            VersionsError: this one has not.
        """
        now = versions.installed(self.stage.libraries(self.context.config))
        if said := versions.describe(present.values(), now):
            logger.warning("%s: %s", self.stage.name, said)
        store, name = self.context.store, self.books.agreed(self.context.key)
        if (there := store.read(name)) is None and store.replace(name, json_bytes(now), None):
            return
        versions.check_same(
            json.loads(there or store.read(name) or b"{}"),
            now,
            f"{self.stage.name}: its shards",
            platform.node(),
            ". To start over with other versions, run"
            f" `negpipe commit {self.stage.name} CONFIG --rebuild` there while no shard is running",
        )


def some(names: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else "")
