"""The one contract: a stage is a frozen value that plans tasks and turns each task into one part.

A task's key covers everything that can change its part's bytes. What is already on disk under that key
is done; nothing else is asked.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, Protocol

from negpipe.config import machine
from negpipe.config.schema import Config
from negpipe.engine import versions
from negpipe.engine.budget import Budget
from negpipe.engine.devices import CPU
from negpipe.engine.fingerprint import DigestCache, digest
from negpipe.engine.manifest import Books, File, Manifest, Part
from negpipe.errors import MissingStageError
from negpipe.store.files import BOOKS
from negpipe.store.opening import run_of, store_of
from negpipe.store.store import Store

Progress = Callable[[int, str], None]
"""Called with units finished since the last call, and a note for people ("58 texts/s")."""

Shown = File | Mapping[str, File] | None
"""What a name of the run directory shows: a file, a folder of files by name, or nothing."""


Place = Literal["caller", "light", "worker", "apart"]
"""Where tasks run.

caller: in the calling process, whatever the executor; payloads need not be JSON. light: there too where a single worker
would take longer to start than to work. worker: where the executor says. apart: in a process of their own even where
the executor says inline, as torch and FAISS never share one.
"""


def _cores(_: Config | None = None) -> tuple[str, ...]:
    return (CPU,)


@dataclass(frozen=True)
class Task:
    """One part to make.

    `rows` sizes the progress bar. `payload` is what `run` needs: plain JSON for stages that run in
    workers, anything for a stage that runs here.
    """

    key: str
    kind: str
    rows: int
    payload: Mapping[str, Any]


@dataclass(frozen=True)
class Context:
    """What plan, open and run may look at: the config, the run directory and the stages before."""

    config: Config
    run_dir: Path
    digest_file: DigestCache
    manifests: Mapping[str, Manifest] = field(default_factory=dict)
    stage: str = ""
    """Name of the stage that is looked at or run, under which its own parts are."""
    key: str = ""
    """Its key."""
    granted: Budget | None = None
    """What the executor gives each of its tasks."""
    devices: Callable[[], tuple[str, ...]] = _cores
    """Those that its workers compute on, in turn. Asked when they are needed, as it may take seconds."""
    shard: str = ""
    """Which of several processes on this run directory it is, for names of logs."""

    def manifest(self, stage: str) -> Manifest:
        """The manifest of an earlier stage.

        Raises:
            MissingStageError: it is not there; the message says which command makes it.
        """
        if stage not in self.manifests:
            raise MissingStageError(
                f"no output of {stage} in {self.config.place}: run `negpipe {stage}` first"
            )
        return self.manifests[stage]

    def after(self, stage: Stage, manifest: Manifest) -> Context:
        """The same, with one more stage complete. Settings that depend on its output are decided."""
        config, _ = stage.settle(self.config, manifest)
        return replace(self, config=config, manifests={**self.manifests, stage.provides or stage.name: manifest})

    @property
    def store(self) -> Store:
        """Where the parts are."""
        return store_of(self.config)

    @property
    def run(self) -> Store:
        """Where manifests are, and what people look at."""
        return run_of(self.config)

    def books(self, stage: str) -> Books:
        """The records of a stage."""
        return Books(self.run, stage, self.store)

    @property
    def own(self) -> Books:
        """The records of the stage that is looked at or run."""
        return self.books(self.stage)

    def path(self, part: Part, role: str) -> Path:
        """Where this machine reads a file of a part."""
        return self.store.path(part.file(role).path)

    @property
    def whole(self) -> Budget:
        """All that the run may use on this machine; on a cluster, all that each of its workers may."""
        return Budget(self.config.resources.memory_budget, self.config.resources.cpus or machine.cores())

    @property
    def budget(self) -> Budget:
        """What one task may use: what it was granted, or before that a worker's share of the whole."""
        whole, workers = self.whole, 1 if self.config.executor.kind == "ray" else self.workers
        return self.granted or Budget(whole.memory // workers, whole.threads // workers)

    @property
    def workers(self) -> int:
        """Processes that work at a time: on this machine no more than threads, on a cluster as many as are set."""
        settings = self.config.executor
        if settings.kind == "ray":
            return settings.workers or 1
        return min(settings.workers or len(self.devices()), self.whole.threads) if settings.kind != "inline" else 1

    def on(self, device: str) -> Context:
        """The same for tasks that compute on this device."""
        return replace(self, granted=replace(self.budget, device=device))


class Publisher:
    """Publishes the files of one task under their final names."""

    def __init__(self, context: Context, stage: Stage, key: str, opened: Opened) -> None:
        self._store, self._stage, self._key = context.store, stage, key
        self._libraries, self._begun = digest(opened.libraries)[:12], opened.begun
        self._checkpoints: set[Path] = set()
        self.files: list[File] = []

    def __call__(
        self,
        role: str,
        suffix: str,
        write: Callable[[BinaryIO], None],
        *,
        needed: int | None = None,
        aside: bool = False,
    ) -> Path:
        """Publish one file as `FOLDER/KEY-DIGEST12SUFFIX`, and return where it can be read.

        Args:
            role: what it is to the part; of several in one role "rows-00000" and so on.
            suffix: of its name.
            write: writes its content.
            needed: its bytes, where known before they are written.
            aside: it says something of circumstance and is in no identity.
        """
        own = role.partition("-")[0]
        folder = own if own in self._stage.folders else self._stage.name
        made = self._store.put(folder, lambda digest: f"{self._key}-{digest[:12]}{suffix}", write, needed)
        name = PurePosixPath(folder, made.name).as_posix()
        self.files.append(File(path=name, bytes=made.bytes, digest=made.digest, role=role, aside=aside))
        return self._store.path(name)

    def checkpoint(self, name: str = "") -> Path:
        """Where the task may leave what it goes on from if it is cut short.

        The versions of libraries are in the path: what another one began would be part of a part with no record of it.
        """
        file = "-".join(filter(None, (self._key, self._libraries, name)))
        path = self._store.scratch / BOOKS / self._stage.name / f"{file}.npz"
        self._checkpoints.add(path)
        return path

    def drop_checkpoints(self) -> None:
        """Delete what the task left to go on from, and what it left before this process began, under any versions.

        The folder is not listed for it: it may hold a record of every task, so that all of them would take a time that
        grows with their square.
        """
        before = {self._store.scratch / name for name in self._begun if f"/{self._key}" in name}
        for path in self._checkpoints | before:
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Made:
    """What `run` says of the part it published: rows, and facts about its content."""

    rows: int
    meta: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)


def _as_it_is(config: Config) -> Config:
    return config


def _nothing(_: Context) -> AbstractContextManager[None]:
    return nullcontext()


def _no_identity(_: Context) -> dict[str, str]:
    return {}


def _no_parts(_: Context) -> list[Part]:
    return []


def _no_check(_: Context) -> None: ...


def _as_asked(_: Mapping[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    return wanted


def _no_libraries(_: Config) -> tuple[str, ...]:
    return ()


def _settled(config: Config, _: Manifest) -> tuple[Config, str]:
    return config, ""


def _no_remarks(_: Any) -> list[tuple[int, str]]:
    return []


def _fits(_: Store, __: Part) -> str | None:
    return None


def _shows_nothing(_: Sequence[Part]) -> dict[str, Shown]:
    return {}


def _in_a_worker(_: Config) -> Place:
    return "worker"


def _sum_meta(_: Context, parts: list[Part]) -> dict[str, Any]:
    return {"rows": sum(part.rows for part in parts), "bytes": sum(file.bytes for p in parts for file in p.files)}


@dataclass(frozen=True)
class Stage:
    """A stage as a value.

    Attributes:
        name: also its folder in the run directory.
        version: raised when the same settings give other bytes.
        inputs: the stages whose content it reads, all of them before it.
        settings: the slice of the config that can change its bytes, plain JSON.
        sources: digests of what it reads from outside the run directory, by name.
        plan: its tasks in order; may be lazy.
        open: a context manager with what all tasks of a process share (a model, opened files).
        run: (task, shared, context, publish, progress) → what was made.
        stats: facts of the finished stage for manifest, log and people.
        check: raises InputError for what is wrong and can be known before the stages ahead of it have run; called
            before every stage that is about to run, with the manifests there are by then.
        serving: (settings of an output, settings asked for) → settings whose output serves as well as what was asked
            for; candidates stored deeper serve a shallower window.
        shared: parts of other stages that `run` may read for any task, beside those its payload names.
        place: where its tasks run, see `Place`.
        resources: memory and threads that each of its tasks is to be given, where that is not a worker's share.
        devices: those that its tasks may compute on, each of them on one; see `engine.devices`.
        rounds: its plan names more tasks once those before are done, and is asked until it names no new ones.
        views: (its parts) → what people see of them in the run directory, by name: a file, files by the names they have
            in a folder, or None where there is nothing to show.
        folders: folders of the store, beside its own, that hold its files of the role of their name.
        libraries: distributions whose versions may change its bytes; recorded, in no key.
        settle: (config, its manifest) → the config with the settings that depend on its output decided, and what is to
            be said of that.
        remarks: what its statistics say beside counts: levels of logging, and sentences.
        outlook: (the context with its output) → what that means for the stages to come, said once it is made.
        misfit: (store, one of its parts) → what the headers of the part's files say that its record does not.
        provides: the name under which later stages find its output, where it takes another's place.
        kind: the stage whose functions it has, by name, where it is a second one of a kind; a worker finds them by it.
        reads: the names by which its functions know its inputs, where those are others: a second search knows as encode
            what a second encode made.
        config: the config as its functions see it, where that differs: a second ingest reads another split.
    """

    name: str
    version: int
    inputs: tuple[str, ...]
    settings: Callable[[Config], dict[str, Any]]
    plan: Callable[[Context], Iterable[Task]]
    run: Callable[[Task, Any, Context, Publisher, Progress], Made]
    sources: Callable[[Context], dict[str, str]] = _no_identity
    open: Callable[[Context], AbstractContextManager[Any]] = _nothing
    stats: Callable[[Context, list[Part]], dict[str, Any]] = _sum_meta
    check: Callable[[Context], None] = _no_check
    serving: Callable[[Mapping[str, Any], dict[str, Any]], dict[str, Any]] = _as_asked
    shared: Callable[[Context], list[Part]] = _no_parts
    place: Callable[[Config], Place] = _in_a_worker
    resources: Callable[[Context], Budget] | None = None
    devices: Callable[[Config], tuple[str, ...]] = _cores
    rounds: bool = False
    views: Callable[[Sequence[Part]], Mapping[str, Shown]] = _shows_nothing
    folders: tuple[str, ...] = ()
    libraries: Callable[[Config], tuple[str, ...]] = _no_libraries
    settle: Callable[[Config, Manifest], tuple[Config, str]] = _settled
    remarks: Callable[[Mapping[str, Any]], Iterable[tuple[int, str]]] = _no_remarks
    outlook: Callable[[Context], Iterable[tuple[int, str]]] = _no_remarks
    misfit: Callable[[Store, Part], str | None] = _fits
    provides: str = ""
    kind: str = ""
    reads: Mapping[str, str] = field(default_factory=dict)
    config: Callable[[Config], Config] = _as_it_is

    def within(self, context: Context) -> Context:
        """What the stage's own functions are given: its name, config and inputs as it knows them, what its tasks may
        use."""
        context = replace(context, config=self.config(context.config))
        known = {name: context.manifests[real] for name, real in self.reads.items() if real in context.manifests}
        return replace(
            context,
            stage=self.name,
            manifests={**context.manifests, **known},
            granted=self.resources(context) if self.resources else context.granted,
            devices=partial(self.devices, context.config),
        )

    def examine(self, context: Context) -> None:
        """Raise what is wrong and can be known before it runs: its devices are there, and see `check`."""
        context = self.within(context)
        context.devices()
        self.check(context)


Graph = Mapping[str, Stage]
"""Stages by name, in the order they run; the engine knows them by nothing else."""


def linkable(graph: Graph) -> set[str]:
    """Folders that may be links to another disk: all that parts lie in."""
    return set(graph) - {name for stage in graph.values() for name in stage.views(())} | {
        folder for stage in graph.values() for folder in stage.folders
    }


Progressed = Callable[[Task, int, str, bool], None]
"""Called with a task, units finished since the last call, a note for people, and whether its part is made."""


class Executor(Protocol):
    """Runs tasks somewhere, each within `context.budget`. Its word is advice: the pipeline looks at the store."""

    def __call__(self, stage: Stage, tasks: Iterator[Task], context: Context, progress: Progressed) -> None:
        """Run tasks until none is left."""


@dataclass(frozen=True)
class Opened:
    """A stage in a process that runs its tasks: what they share, the libraries' versions, checkpoints that were there
    before the first of them."""

    stage: Stage
    context: Context
    shared: Any
    libraries: Mapping[str, str]
    begun: Collection[str]

    def run(self, task: Task, progress: Progress) -> Part:
        """Make one part: its files first, then the sidecar."""
        started, context = time.monotonic(), self.context
        publisher = Publisher(context, self.stage, task.key, self)
        made = self.stage.run(task, self.shared, context, publisher, progress)
        part = Part(
            key=task.key,
            kind=task.kind,
            rows=made.rows,
            files=tuple(publisher.files),
            meta=made.meta,
            provenance={
                "pid": os.getpid(),
                "host": platform.node(),
                "device": context.budget.device,
                "seconds": round(time.monotonic() - started, 3),
                "peak_memory": machine.peak_memory(),
                "libraries": dict(self.libraries),
                **made.provenance,
            },
        )
        context.books(self.stage.name).write_part(part)
        return part


@contextmanager
def opened(stage: Stage, context: Context) -> Iterator[Opened]:
    """Open a stage in this process, for all of its tasks that run here."""
    libraries = versions.installed(stage.libraries(context.config))
    begun = context.books(stage.name).checkpoints()
    with stage.open(context) as shared:
        yield Opened(stage, context, shared, libraries, begun)


def cache_path(run_dir: Path) -> Path:
    """Where content digests of sources are remembered."""
    return run_dir / BOOKS / "digests.json"
