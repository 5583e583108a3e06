"""The central contract: a stage is a frozen value that plans tasks and turns each task into one part.

A task's key covers everything that can change its part's bytes. If a part with that key is on disk, the task is done;
nothing else is checked.
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
from negpipe.errors import InputError, MissingStageError, beneath
from negpipe.store.files import BOOKS
from negpipe.store.opening import run_of, store_of
from negpipe.store.store import Store

Progress = Callable[[int, str], None]
"""Called with units finished since the last call, and a note for display ("58 texts/s")."""

Shown = File | Mapping[str, File] | None
"""What a name in the run directory shows: a file, a folder of files by name, or nothing."""


Place = Literal["caller", "light", "worker", "apart"]
"""Where tasks run.

caller: in the calling process, whatever the executor; payloads need not be JSON. light: likewise, if a single worker
would take longer to start than to work. worker: as the executor decides. apart: in a separate process even if the
executor is inline, because torch and FAISS never share one.
"""


def _cores(_: Config | None = None) -> tuple[str, ...]:
    return (CPU,)


@dataclass(frozen=True)
class Task:
    """One part to make.

    `rows` scales the progress bar. `payload` is the input of `run`: plain JSON for stages that run in
    workers, any object for stages that run in the calling process.
    """

    key: str
    kind: str
    rows: int
    payload: Mapping[str, Any]


@dataclass(frozen=True)
class Context:
    """What plan, open and run may use: the config, the run directory and the earlier stages."""

    config: Config
    run_dir: Path
    digest_file: DigestCache
    manifests: Mapping[str, Manifest] = field(default_factory=dict)
    stage: str = ""
    """Name of the stage that is inspected or run; its parts are stored under it."""
    key: str = ""
    """Its key."""
    granted: Budget | None = None
    """The budget that the executor grants each task."""
    devices: Callable[[], tuple[str, ...]] = _cores
    """The devices of its workers, in turn. Called lazily, as it may take seconds."""
    shard: str = ""
    """Identifies this process among several on the run directory, for log names."""

    def manifest(self, stage: str) -> Manifest:
        """The manifest of an earlier stage.

        Raises:
            MissingStageError: it does not exist; the message names the command that makes it.
        """
        if stage not in self.manifests:
            raise MissingStageError(f"no output of {stage} in {self.config.place}: run `negpipe {stage}` first")
        return self.manifests[stage]

    def after(self, stage: Stage, manifest: Manifest) -> Context:
        """A copy with one more complete stage. Settings that depend on its output are resolved."""
        config, _ = stage.settle(self.config, manifest)
        return replace(self, config=config, manifests={**self.manifests, stage.provides or stage.name: manifest})

    @property
    def store(self) -> Store:
        """The store of the parts."""
        return store_of(self.config)

    @property
    def run(self) -> Store:
        """The store of manifests and of what users look at."""
        return run_of(self.config)

    def books(self, stage: str) -> Books:
        """The records of a stage."""
        return Books(self.run, stage, self.store)

    @property
    def own(self) -> Books:
        """The records of the stage that is inspected or run."""
        return self.books(self.stage)

    def digest_of(self, setting: str, path: Path | str | None) -> dict[str, str]:
        """The digest of the file that a setting names, for `Stage.sources`; nothing if it names none.

        Raises:
            InputError: it does not exist.
        """
        if path is None:
            return {}
        if not Path(path).is_file():
            problem = f"the file does not exist{beneath(str(path))}"
            raise InputError(problem, file=str(path), field=setting, remedy="Fix the path")
        return {setting: self.digest_file(Path(path))}

    def path(self, part: Part, role: str) -> Path:
        """The path where this machine reads a file of a part."""
        return self.store.path(part.file(role).path)

    @property
    def whole(self) -> Budget:
        """Everything the run may use on this machine; on a cluster, everything one worker may use."""
        return Budget(self.config.resources.memory_budget, self.config.resources.cpus or machine.cores())

    @property
    def budget(self) -> Budget:
        """What one task may use: its grant or, before that, a worker's share of the total."""
        whole, workers = self.whole, 1 if self.config.executor.kind == "ray" else self.workers
        return self.granted or Budget(whole.memory // workers, whole.threads // workers)

    @property
    def workers(self) -> int:
        """Concurrent worker processes: on this machine at most the number of threads, on a cluster as configured."""
        settings = self.config.executor
        if settings.kind == "ray":
            return settings.workers or 1
        return min(settings.workers or len(self.devices()), self.whole.threads) if settings.kind != "inline" else 1

    def on(self, device: str) -> Context:
        """A copy for tasks that compute on this device."""
        return replace(self, granted=replace(self.budget, device=device))


class Publisher:
    """Publishes the files of a task under their final names."""

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
        """Publish one file as `FOLDER/KEY-DIGEST12SUFFIX`, and return the path where it can be read.

        Args:
            role: its role in the part; several files of one role are "rows-00000" and so on.
            suffix: the suffix of its name.
            write: writes its content.
            needed: its size in bytes, if known in advance.
            aside: it holds circumstances and enters no identity.
        """
        own = role.partition("-")[0]
        folder = own if own in self._stage.folders else self._stage.name
        made = self._store.put(folder, lambda digest: f"{self._key}-{digest[:12]}{suffix}", write, needed)
        name = PurePosixPath(folder, made.name).as_posix()
        self.files.append(File(path=name, bytes=made.bytes, digest=made.digest, role=role, aside=aside))
        return self._store.path(name)

    def checkpoint(self, name: str = "") -> Path:
        """Path of a checkpoint from which the task can resume if interrupted.

        The path contains the library versions: otherwise a part could mix versions without a record of it.
        """
        file = "-".join(filter(None, (self._key, self._libraries, name)))
        path = self._store.scratch / BOOKS / self._stage.name / f"{file}.npz"
        self._checkpoints.add(path)
        return path

    def drop_checkpoints(self) -> None:
        """Delete the task's checkpoints, including those of earlier processes with any library versions.

        The folder is not listed here: it may hold a record of every task, so that all tasks together would take time
        quadratic in their number.
        """
        before = {self._store.scratch / name for name in self._begun if f"/{self._key}" in name}
        for path in self._checkpoints | before:
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Made:
    """What `run` reports about its published part: rows, and facts about the content."""

    rows: int
    meta: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Needs:
    """What the remaining work of a stage needs, as far as it can be estimated: seconds, bytes of disk, tokens to send
    to a server and their cost; a note, and the error that would stop it."""

    seconds: float | None = None
    disk: int | None = None
    tokens: int | None = None
    cost: float | None = None
    note: str = ""
    refusal: str = ""


@dataclass(frozen=True)
class Workload:
    """What is known of a job before a stage runs, and of the speed of this machine.

    Attributes:
        documents: their number, 0 before ingest.
        anchors: likewise.
        dimension: of the vectors; 0: unknown.
        text_bytes: mean characters per document.
        positives: mean per anchor.
        speed: texts that a worker encodes per second; 0: unknown.
        source: where that speed is from.
        building: what the configured kind of index needs; empty while the dimension is unknown.
        searching: likewise, to search it for all anchors.
        missing: the tasks of this stage that are left; None: unknown, as its inputs are incomplete.
        share: their share of the rows of all its tasks.
    """

    documents: int = 0
    anchors: int = 0
    dimension: int = 0
    text_bytes: float = 0.0
    positives: float = 0.0
    speed: float = 0.0
    source: str = ""
    building: Needs = Needs()
    searching: Needs = Needs()
    missing: Sequence[Task] | None = None
    share: float = 1.0

    @property
    def left(self) -> int:
        """The rows of the missing tasks."""
        return sum(task.rows for task in self.missing or ())


def _sum_meta(_: Context, parts: list[Part]) -> dict[str, Any]:
    return {"rows": sum(part.rows for part in parts), "bytes": sum(file.bytes for p in parts for file in p.files)}


def counted(stats: Mapping[str, Any], rows: str = "rows") -> dict[str, int]:
    """The numbers among a stage's statistics, in words, without zeroes; `rows` says what its rows are."""
    shown = {name: n for name, n in stats.items() if isinstance(n, int) and (n or name == "rows")}
    return {rows if name == "rows" else name.replace("_", " "): n for name, n in shown.items()}


@dataclass(frozen=True)
class Stage:
    """A stage as a value.

    Attributes:
        name: also that of its folder in the run directory.
        version: incremented when the same settings produce different bytes.
        inputs: the stages whose content it reads, all earlier ones.
        settings: the part of the config that can change its bytes, as plain JSON.
        sources: digests of inputs from outside the run directory, by name.
        plan: its tasks in order; may be lazy. Without inputs, it reads a source.
        open: a context manager for what all tasks of a process share (a model, opened files).
        run: (task, shared, context, publish, progress) → what was made.
        stats: statistics of the finished stage, for manifest, log and status.
        check: raises InputError for problems that can be detected before the earlier stages have run; called before
            every stage that is about to run, with the manifests available by then.
        fetches: that check may download a model or read entire files, so `plan` leaves it until the inputs exist.
        needs: (context, what is known) → what its remaining work needs; by default, `plan` only counts its tasks.
        serving: (settings of an output, requested settings) → settings under which that output also satisfies the
            request: deeper candidates satisfy a shallower window.
        shared: parts of other stages that `run` may read for any task, in addition to those in its payload.
        place: where its tasks run, see `Place`.
        resources: memory and threads of each task, where that is not a worker's share.
        devices: those that its tasks may use, one per task; see `engine.devices`.
        rounds: its plan yields more tasks once the previous ones are done; it is called until there are no new ones.
        views: (its parts) → what users see of them in the run directory, by name: a file, files by their names in a
            folder, or None if there is nothing to show.
        folders: further folders of the store; each holds its files of the role with that name.
        libraries: distributions whose versions may change its bytes; recorded, but not in the key.
        settle: (config, its manifest) → the config with the settings that depend on its output resolved, and a message
            about that.
        accept: (config, its statistics) → raises an error if its output must not be shown: its parts stay, and so does
            what was shown before.
        remarks: messages derived from its statistics: logging levels and sentences.
        outlook: (the context with its output) → what that means for the following stages, logged once it is made.
        misfit: (store, one of its parts) → how the headers of the part's files contradict its record.
        provides: the name under which later stages find its output, if it replaces another stage.
        kind: the name of the stage whose functions it uses, if it is a second one of a kind; for workers.
        unit: what the rows of its tasks are, in words, for progress.
        counts: (its statistics) → the counts that a person needs, in words; the first is of its output.
        reads: the names by which its functions know its inputs, if different: a second search knows the output of a
            second encode as encode's.
        config: the config as its functions see it, if different: a second ingest reads another split.
    """

    name: str
    version: int
    inputs: tuple[str, ...]
    settings: Callable[[Config], dict[str, Any]]
    plan: Callable[[Context], Iterable[Task]]
    run: Callable[[Task, Any, Context, Publisher, Progress], Made]
    sources: Callable[[Context], dict[str, str]] = lambda context: {}
    open: Callable[[Context], AbstractContextManager[Any]] = lambda context: nullcontext()
    stats: Callable[[Context, list[Part]], dict[str, Any]] = _sum_meta
    check: Callable[[Context], None] = lambda context: None
    fetches: bool = False
    needs: Callable[[Context, Workload], Needs] = lambda context, work: Needs()
    serving: Callable[[Mapping[str, Any], dict[str, Any]], dict[str, Any]] = lambda made, wanted: wanted
    shared: Callable[[Context], list[Part]] = lambda context: []
    place: Callable[[Config], Place] = lambda config: "worker"
    resources: Callable[[Context], Budget] | None = None
    devices: Callable[[Config], tuple[str, ...]] = _cores
    rounds: bool = False
    views: Callable[[Sequence[Part]], Mapping[str, Shown]] = lambda parts: {}
    folders: tuple[str, ...] = ()
    libraries: Callable[[Config], tuple[str, ...]] = lambda config: ()
    settle: Callable[[Config, Manifest], tuple[Config, str]] = lambda config, manifest: (config, "")
    accept: Callable[[Config, Mapping[str, Any]], None] = lambda config, stats: None
    remarks: Callable[[Mapping[str, Any]], Iterable[tuple[int, str]]] = lambda stats: ()
    outlook: Callable[[Context], Iterable[tuple[int, str]]] = lambda context: ()
    misfit: Callable[[Store, Part], str | None] = lambda store, part: None
    provides: str = ""
    kind: str = ""
    unit: str = "rows"
    counts: Callable[[Mapping[str, Any]], Mapping[str, int]] = counted
    reads: Mapping[str, str] = field(default_factory=dict)
    config: Callable[[Config], Config] = lambda config: config

    def within(self, context: Context) -> Context:
        """The context for the stage's own functions: name, config and inputs as they know them, and the budget of its
        tasks."""
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
        """Raise problems that can be detected before it runs: missing devices, and see `check`."""
        context = self.within(context)
        context.devices()
        self.check(context)


Graph = Mapping[str, Stage]
"""Stages by name, in execution order; the engine's only access to them."""


def linkable(graph: Graph) -> set[str]:
    """Folders that may be links to another disk: all folders of parts."""
    return set(graph) - {name for stage in graph.values() for name in stage.views(())} | {
        folder for stage in graph.values() for folder in stage.folders
    }


Progressed = Callable[[Task, int, str, bool], None]
"""Called with a task, units finished since the last call, a note for display, and whether its part is finished."""


class TaskExecutor(Protocol):
    """Runs tasks somewhere, each within `context.budget`. Its reports are advisory: the pipeline checks the store."""

    def __call__(self, stage: Stage, tasks: Iterator[Task], context: Context, progress: Progressed) -> None:
        """Run all tasks."""


@dataclass(frozen=True)
class Opened:
    """A stage opened in a process that runs its tasks: what they share, the library versions, and the checkpoints that
    existed before the first task."""

    stage: Stage
    context: Context
    shared: Any
    libraries: Mapping[str, str]
    begun: Collection[str]

    def run(self, task: Task, progress: Progress) -> Part:
        """Make one part: first its files, then its record."""
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
    """Open a stage in this process for all tasks that run here."""
    libraries = versions.installed(stage.libraries(context.config))
    begun = context.books(stage.name).checkpoints()
    with stage.open(context) as shared:
        yield Opened(stage, context, shared, libraries, begun)


def cache_path(run_dir: Path) -> Path:
    """The cache file of content digests of sources."""
    return run_dir / BOOKS / "digests.json"
