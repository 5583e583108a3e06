"""Runs one stage in several processes, possibly on several machines over a shared file system, then commits it.

A shard makes the tasks whose keys fall to it and writes no manifest. Shards learn about each other only from the store:
which parts exist, and which tasks are claimed (`store.claims`). They may start, end and die in any order, and be
restarted; the result has the bytes of an ordinary run, and `commit` lists it in the manifest.
"""

from __future__ import annotations

import json
import logging
import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from negpipe.config.schema import Config
from negpipe.engine import pipeline, versions
from negpipe.engine.manifest import Books, Manifest, Part
from negpipe.engine.progress import Reporter, Silent
from negpipe.engine.stage import Context, Graph, Progressed, Stage, Task, TaskExecutor
from negpipe.engine.state import State, blocked, identity_of
from negpipe.errors import ConfigError, DamagedError, MissingPartsError, MissingStageError, count_of
from negpipe.store.claims import PATIENCE, Claims
from negpipe.store.files import json_bytes

logger = logging.getLogger(__name__)
_SHARD = re.compile(r"([0-9]{1,9})/([0-9]{1,9})")
_NAMED = 5  # missing parts listed in an error
_LOOK = 2.0  # seconds between two checks of other processes' work


@dataclass(frozen=True)
class Shard:
    """Number `number` of `of` shards, from 0."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Parse "3/16".

        Raises:
            ConfigError: not a shard.
        """
        named = _SHARD.fullmatch(text)
        if not named or int(named[1]) >= int(named[2]):
            raise ConfigError(f"--shard {text}: expected I/N with I from 0 to N - 1; of 16 shards the last is 15/16")
        return cls(int(named[1]), int(named[2]))

    def has(self, key: str) -> bool:
        """Whether the task with this key falls to this shard."""
        return shard_of(key, self.of) == self.number

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def shard_of(key: str, of: int) -> int:
    """The shard that a task falls to: the same in every process, regardless of finished parts."""
    return int(key, 16) % of


@dataclass(frozen=True)
class Worked:
    """Result of a shard: how many parts it made, found, and saw others make. All its tasks have their parts."""

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
    """Make the missing parts of a shard of a stage, and wait for those that other processes work on.

    A stage planned in rounds continues once a round is complete: there, a shard also makes unclaimed parts.

    Args:
        config: the config to run.
        graph: its stages.
        name: the stage; its inputs must exist.
        shard: the shard of its tasks to run.
        reporter: receives progress.
        rehash: read every source file again instead of trusting its modification time.
        once: run one round only; the process that submits the shards starts the next.
        patience: seconds without a sign of life until another process counts as dead.

    Raises:
        NegpipeError: a task failed; finished parts stay.
        MissingStageError: an input has not been made.
        VersionsError: other library versions are installed than where the first shard started.
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
        key = identity_of(stage, context).key
        own = replace(stage.within(context), key=key, shard=f"{shard.number}-of-{shard.of}")
        claims = Claims(own.store, own.own.folder, patience)
        job = _Job(stage, graph, own, shard, claims, reporter or Silent(), once)
        with pipeline.damage_named(stage, own), claims.kept():
            return job.done()


def commit(config: Config, graph: Graph, name: str, shards: int | None = None, **options: Any) -> pipeline.Finished:
    """Write the manifest of a stage whose parts all exist. Makes no parts.

    Args:
        config: the config of the run.
        graph: its stages.
        name: the stage.
        shards: number of shards, to name those with missing parts.
        options: `rehash` and `rebuild` of `pipeline.mine`.

    Raises:
        MissingPartsError: parts are missing; the message says how many and which.
        LockedError: a shard is running.
    """
    if graph[name].place(config) == "caller":
        raise ConfigError(f"{name} does not run in shards: run `negpipe {name} CONFIG`, which also commits it")
    return pipeline.mine(config, graph, only=name, executor=_refusing(shards), **options)


def _refusing(shards: int | None) -> TaskExecutor:
    """An executor that runs nothing and reports its tasks as missing."""

    def run(stage: Stage, tasks: Iterator[Task], context: Context, progress: Progressed) -> None:
        missing = [*tasks]
        if not missing:
            return
        named = some([f"{task.key} ({task.kind}, {count_of(task.rows, 'row')})" for task in missing])
        which = "I/N` for the shards that failed"
        if shards:
            lacking = sorted({shard_of(task.key, shards) for task in missing})
            which = f"I/{shards}` for I = {','.join(map(str, lacking))}"
        raise MissingPartsError(
            f"{stage.name}: {count_of(len(missing), 'part is', 'parts are')} missing: {named}. Run `negpipe work"
            f" {stage.name} CONFIG --shard {which}, which makes only the missing parts, then commit again"
        )

    return run


def _reached(stage: Stage, graph: Graph, context: Context) -> tuple[Context, Manifest | None]:
    """The context with the stages before a stage, and the stage's manifest if it is current.

    Raises:
        MissingStageError: an earlier stage is not current.
    """
    for before in graph.values():
        if before.name == stage.name:
            break
        state = pipeline.looked(before, context)
        if state.state != "current" or state.manifest is None:
            raise MissingStageError(blocked(state, stage.name))
        context = context.after(before, state.manifest)
    # Without a manifest, looking would read all parts, including those of other shards.
    state = pipeline.looked(stage, context) if context.books(stage.name).content() else State(stage.name, "missing")
    return context, state.manifest if state.state == "current" else None


@dataclass
class _Job:
    """A running shard."""

    stage: Stage
    graph: Graph
    context: Context
    shard: Shard
    claims: Claims
    reporter: Reporter
    once: bool = False
    there: set[str] = field(default_factory=set)
    """Keys of parts that were asked for and exist: a list of names may be late."""
    made: int = 0
    found: int = 0
    others: int = 0

    @property
    def books(self) -> Books:
        return self.context.own

    def done(self) -> Worked:
        """Make the tasks, round by round."""
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
        """Make unclaimed tasks and wait for claimed ones until every task has its part."""
        present = self.books.found([task.key for task in tasks])
        left = [task for task in tasks if task.key not in present]
        self.found += len(present)
        if left:  # a shard with nothing to do reads no input
            pipeline.check_inputs(self.stage, self.graph, self.context)
            self._agree(present)
        told = False
        while left:
            before, claimed = self.made, self._claimed(left)
            if first := next(claimed, None):
                total = sum(task.rows for task in left)
                pipeline.run_tasks(
                    self.stage, chain([first], claimed), self.context, self.reporter, total, ended=self._ended
                )
            missing = [task for task in left if task.key not in self.there]
            self.others += len(left) - len(missing) - (self.made - before)
            left = missing
            if left and not first:
                if not told:
                    who = some(sorted({owner for task in left if (owner := self.claims.owner(task.key))}))
                    parts = count_of(len(left), "part")
                    logger.info("%s: waiting for %s of other processes: %s", self.stage.name, parts, who)
                    told = True
                time.sleep(min(_LOOK, self.claims.patience / 4))

    def _claimed(self, tasks: Sequence[Task]) -> Iterator[Task]:
        """Unclaimed tasks, each claimed when it is requested. Never blocks: running workers must be listened to."""
        for task in tasks:
            if self.books.part(task.key):
                self.there.add(task.key)
            elif self.claims.take(task.key):
                if self.books.part(task.key):  # it was finished and its claim released in the meantime
                    self.there.add(task.key)
                    self.claims.release(task.key)
                else:
                    yield task

    def _ended(self, task: Task) -> None:
        pipeline.part_of(self.stage, self.context, task.key)
        self.claims.release(task.key)
        self.there.add(task.key)
        self.made += 1

    def _agree(self, present: Mapping[str, Part]) -> None:
        """Require the library versions of the stage's first shard; parts of earlier runs may have others.

        Raises:
            VersionsError: this shard has others.
        """
        now = versions.installed(self.stage.libraries(self.context.config))
        if said := versions.describe(present.values(), now):
            logger.warning("%s: %s", self.stage.name, said)
        store, name = self.context.store, self.books.agreed(self.context.key)
        if (there := store.read(name)) is None and store.replace(name, json_bytes(now), None):
            return
        there = there or store.read(name)
        try:
            agreed = {str(library): str(version) for library, version in json.loads(there or b"{}").items()}
        except (ValueError, AttributeError, RecursionError):
            raise DamagedError(f"{store}/{name} is damaged: delete it while no shard is running") from None
        versions.check_same(
            agreed,
            now,
            f"{self.stage.name}: its shards",
            platform.node(),
            ". To start over with other versions, run"
            f" `negpipe commit {self.stage.name} CONFIG --rebuild` there while no shard is running",
        )


def some(names: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else "")
