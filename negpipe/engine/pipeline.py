"""The order of stages: what must run and why, running it, and its status on disk.

Nothing runs if its output already exists: a stage whose manifest has the current key is left alone, and within a stage
every part whose key is on disk is kept.
"""

from __future__ import annotations

import logging
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from negpipe import __version__
from negpipe.config import kept, machine
from negpipe.config.schema import Config
from negpipe.engine import shown
from negpipe.engine.executors import cluster, inline, local, ray
from negpipe.engine.manifest import Manifest, Part
from negpipe.engine.progress import Reporter, Silent
from negpipe.engine.repair import check_headers, damaged, drop_damaged, drop_of_other_versions
from negpipe.engine.stage import Context, Graph, Stage, Task, TaskExecutor, linkable
from negpipe.engine.state import Identity, State, blocked, digests_of, identity_of, look
from negpipe.errors import (
    ConfigError,
    DamagedError,
    MissingStageError,
    NegpipeError,
    TaskFailedError,
    VanishedError,
    count_of,
)
from negpipe.redaction import redacted
from negpipe.store import claims, registry
from negpipe.store.boundary import stay_inside
from negpipe.store.files import BOOKS, explained, publish, remove_temporaries, write_all
from negpipe.store.lock import driver_lock, run_lock
from negpipe.store.opening import check_conditions, run_held, run_of
from negpipe.store.store import LocalStore, Store

logger = logging.getLogger(__name__)
_ATTEMPTS = 3

Hold = Literal["alone", "shared", "driver"]
"""How a run directory is held: alone, by a shard, or by the driver that submits shards and waits for them."""


@dataclass(frozen=True)
class Finished:
    """A run after its stages: each stage's counts, which stages ran, and the store of the run directory."""

    run_dir: Path
    stats: dict[str, dict[str, Any]]
    ran: tuple[str, ...]
    store: Store


def mine(
    config: Config,
    graph: Graph,
    *,
    only: str | None = None,
    reporter: Reporter | None = None,
    rehash: bool = False,
    repair: bool = False,
    rebuild: bool = False,
    executor: TaskExecutor | None = None,
    elsewhere: Mapping[str, TaskExecutor] | None = None,
) -> Finished:
    """Bring all stages, or one of them, up to date.

    Args:
        config: the config to run.
        graph: its stages.
        only: name of the only stage to run; its inputs must exist.
        reporter: receives progress.
        rehash: read every source file again instead of trusting its modification time.
        repair: read every existing file; recompute what has changed since it was written and what derives from it.
        rebuild: recompute parts made with other library versions than are installed.
        executor: runs the tasks instead of the executor that stage and config select; it is then not checked whether
            this machine could run them, nor whether their inputs are intact, as their process checks both.
        elsewhere: executors by stage name that run the stages as shards on other machines.

    Raises:
        NegpipeError: with a readable message and an exit code for schedulers.
        DamagedError: by its size or header, an input of a stage has changed since it was written.
    """
    stages = [*graph.values()]
    if only is not None and only not in graph:
        raise ConfigError(f"{only!r} is not a stage of this run: choose from {', '.join(graph)}")
    run_dir = config.run_dir
    ran: list[str] = []
    untrusted: set[str] = set()
    elsewhere = elsewhere or {}
    hold: Hold = "driver" if elsewhere else "alone"
    with opened(config, graph, rehash=rehash, dropping=repair or rebuild, hold=hold) as first:
        context = first
        for number, stage in enumerate(stages):
            if repair:
                untrusted |= drop_damaged(stage, context, untrusted)
            if rebuild and only in (None, stage.name):
                drop_of_other_versions(stage, context)
            state = looked(stage, context)
            manifest = state.manifest
            if state.state == "current":
                logger.info("%s: up to date (%s)", stage.name, _counts(stage, manifest))
                context.books(stage.name).drop_begun()
                stage.accept(context.config, state.manifest.stats if state.manifest else {})
            elif only and stage.name != only:
                raise MissingStageError(blocked(state, only))
            else:
                _examine([] if executor else [stage] if only else stages[number:], context, elsewhere)
                if not executor:
                    check_inputs(stage, graph, context)
                logger.info("%s: starting, %s", stage.name, state.reason)
                manifest = _completed(stage, context, reporter or Silent(), executor or elsewhere.get(stage.name))
                ran.append(stage.name)
                _tell(stage, manifest)
            assert manifest is not None
            if said := stage.settle(context.config, manifest)[1]:
                logger.info("%s", said)
            context = context.after(stage, manifest)
            if stage.name in ran:
                for level, sentence in stage.outlook(context):
                    logger.log(level, "%s: %s", stage.name, sentence)
            if stage.name == only:
                break
        _keep(config, bool(ran))
    stats = {name: manifest.stats for name, manifest in context.manifests.items()}
    return Finished(run_dir, stats, tuple(ran), run_of(config))


def _examine(stages: Sequence[Stage], context: Context, elsewhere: Mapping[str, TaskExecutor]) -> None:
    """Raise what can already be known to be wrong with stages that are about to run, see `Stage.examine`. Devices of
    other machines are checked there."""
    for stage in stages:
        if stage.name not in elsewhere:
            stage.examine(context)
        elif stage.place(context.config) != "apart":
            stage.check(stage.within(context))
    if placed := [stage for stage in stages if _executor(stage, stage.within(context)) is ray.run]:
        ray.examine(placed, context)


@contextmanager
def opened(
    config: Config, graph: Graph, *, rehash: bool = False, dropping: bool = False, hold: Hold = "alone"
) -> Iterator[Context]:
    """Lock the run directory, creating it if it does not exist.

    Args:
        config: the config of the run.
        graph: the stages that have folders in it.
        rehash: see `mine`.
        dropping: whether parts will be dropped.
        hold: how to lock it; files of running shards are left alone.

    Returns:
        the context for the first stage.
    """
    run_dir = config.run_dir
    _make_run_dir(run_dir, config.store, graph)
    check_conditions(config)
    with (
        _held(config, dropping, hold) as idle,
        explained(run_dir),
        digests_of(config, rehash=rehash) as digests,
        cluster.session(),
    ):
        context = Context(config, run_dir, digests)
        _check_share(context)
        if idle:
            _clear(context)
        if not kept.path_in(run_dir).exists():
            _keep(config)
        yield context


def _keep(config: Config, ran: bool = True) -> None:
    """Save the config in its run directory: in a new one at once, in an existing one once the run is complete.

    If nothing ran, a changed executor alone is not saved. A run directory in a bucket keeps no config.
    """
    if config.url is not None:
        return
    path, content = kept.path_in(config.run_dir), kept.text(config)
    before = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if before != content and (ran or not kept.alike(before, content)):
        data = content.encode()
        publish(path.parent, path.name, lambda file: write_all(file, data), len(data))


@contextmanager
def _held(config: Config, dropping: bool, hold: Hold) -> Iterator[bool]:
    """Lock the run directory and, if parts of a shared store are dropped, all other run directories that use it.

    Returns:
        whether no other process was working on it.
    """
    with ExitStack() as locks:
        if config.store and dropping:
            store = LocalStore(config.store)
            locks.enter_context(registry.kept(store))
            for other in registry.others(store, config.run_dir):
                if (other / BOOKS).is_dir():
                    locks.enter_context(run_lock(other))
            registry.note(store, config.run_dir)
        idle = hold == "alone"
        if hold == "driver":
            idle = locks.enter_context(driver_lock(config.run_dir, alone=dropping))
        else:
            locks.enter_context(run_held(config, shared=not idle))
        if config.store and not dropping:
            registry.register(LocalStore(config.store), config.run_dir)
        yield idle


def _clear(context: Context) -> None:
    """Delete unfinished files of killed runs."""
    for root in {context.run_dir, context.config.store or context.run_dir}:
        for folder in (root, root / BOOKS):
            for inner in (folder, *(path for path in folder.iterdir() if path.is_dir())):
                remove_temporaries(inner, own=root == context.run_dir)


def looked(stage: Stage, context: Context) -> State:
    """The state of a stage; warns about parts made with other library versions."""
    state = look(stage, context)
    if state.versions:
        logger.warning("%s: %s", stage.name, state.versions)
    return state


def _tell(stage: Stage, manifest: Manifest) -> None:
    """Log the outcome of a stage that ran."""
    logger.info("%s: done in %.1f s (%s)", stage.name, manifest.provenance["seconds"], _counts(stage, manifest))
    for level, remark in stage.remarks(manifest.stats):
        logger.log(level, "%s: %s", stage.name, remark)


def check_inputs(stage: Stage, graph: Graph, context: Context) -> None:
    """Check by headers that a stage's inputs have not changed since they were written, reused parts included."""
    for name in stage.inputs:
        check_headers(context.store, graph[context.manifest(name).stage], context.manifest(name))


def _make_run_dir(run_dir: Path, store: Path | None, graph: Graph) -> None:
    """It will contain texts, so a new one is private to the user; an existing one keeps its permissions."""
    with explained(run_dir):
        if not run_dir.exists():
            run_dir.parent.mkdir(parents=True, exist_ok=True)
            run_dir.mkdir(mode=0o700, exist_ok=True)
        stay_inside(run_dir, linkable(graph))
        registry.check_run_dir(run_dir, store)
        if store:
            registry.check_place(run_dir, store)
            registry.check_own_parts(run_dir, store)
            store.mkdir(mode=0o700, parents=True, exist_ok=True)
            stay_inside(store, linkable(graph))


def _completed(stage: Stage, context: Context, reporter: Reporter, executor: TaskExecutor | None) -> Manifest:
    """`run_stage`, restarted if a second process interfered because locks do not work."""
    for attempt in range(_ATTEMPTS):
        try:
            return run_stage(stage, context, reporter, executor)
        except VanishedError as error:
            state = look(stage, context)
            if state.state == "current" and state.manifest:
                return state.manifest
            if attempt == _ATTEMPTS - 1:
                raise
            logger.warning("%s: starting again: %s", stage.name, error)
    raise AssertionError


def run_stage(stage: Stage, context: Context, reporter: Reporter, executor: TaskExecutor | None = None) -> Manifest:
    """Make the missing parts of a stage, then its manifest.

    Raises:
        NegpipeError: a task failed, or the stage does not accept the result; finished parts stay.
    """
    started = time.monotonic()
    books = context.books(stage.name)
    before = books.content()
    identity = identity_of(stage, context)
    context = replace(stage.within(context), key=identity.key)

    keys: dict[str, Part | None] = {}
    with damage_named(stage, context):
        while _run_planned(stage, context, keys, reporter, executor) and stage.rounds:
            pass

    # Records are parsed once, but whether their files still exist is asked again: the tasks may have taken hours.
    made = books.complete({part_key: part for part_key, part in keys.items() if part})
    made |= books.found([part_key for part_key, part in keys.items() if not part])
    parts = [made.get(part_key) or part_of(stage, context, part_key) for part_key in keys]
    manifest = _manifest(stage, context, identity, parts, time.monotonic() - started)
    stage.accept(context.config, manifest.stats)
    shown.show(stage, context, manifest)
    if not books.write_manifest(manifest, before):
        raise VanishedError(f"{stage.name}: another process wrote its manifest in the meantime: run the command again")
    books.drop_begun()
    books.drop_agreed(identity.key)
    books.run.delete(books.arrays(identity.key))
    claims.drop(books.store, books.folder, keys)
    context.digest_file.save()
    machine.give_back()  # the processes of the next stage need it while this one waits
    return manifest


def part_of(stage: Stage, context: Context, part_key: str) -> Part:
    """The part of a finished task.

    Raises:
        VanishedError: it does not exist.
    """
    part = context.books(stage.name).part(part_key)
    if part is None:
        raise VanishedError(f"{stage.name}: part {part_key} is not on disk after its task ended: run the command again")
    return part


@contextmanager
def damage_named(stage: Stage, context: Context) -> Iterator[None]:
    """An unexpected error may come from bytes that changed under the same size: verify the inputs in full.

    Raises:
        DamagedError: a file that the stage reads has changed since it was written.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, NegpipeError) and type(error) not in (NegpipeError, TaskFailedError):
            raise
        read = [part for name in stage.inputs for part in context.manifest(name).parts]
        read += context.books(stage.name).parts() if stage.rounds else ()
        files, full = (file for part in read for file in part.files), not context.store.verifies
        if wrong := damaged(context.store, files, full=full):
            raise DamagedError(
                f"{stage.name}: {wrong[0][1]} ({count_of(len(wrong), 'such file')}). Run `negpipe mine CONFIG --repair`"
                " to recompute damaged parts and everything that may derive from them"
            ) from error
        raise


def _run_planned(
    stage: Stage, context: Context, keys: dict[str, Part | None], reporter: Reporter, executor: TaskExecutor | None
) -> bool:
    """Make the missing parts of the tasks that can be planned now; returns whether any task was new.

    `keys` receives the key of each task, with its part if that existed.
    """
    books, before = context.books(stage.name), len(keys)
    plan = stage.plan(context)
    total, done, present = 0, 0, dict[str, Part]()
    if stage.place(context.config) != "caller":
        plan = [task for task in plan if task.key not in keys]
        present = books.found([task.key for task in plan])
        total, done = sum(task.rows for task in plan), sum(task.rows for task in plan if task.key in present)
        if present:
            logger.info("%s: %d of %d parts already exist", stage.name, len(present), len(plan))

    def missing() -> Iterator[Task]:
        for task in plan:
            keys[task.key] = present.get(task.key)
            if task.key not in present and books.part(task.key) is None:
                yield task

    run_tasks(stage, missing(), context, reporter, total, done, executor=executor)
    return len(keys) > before


def run_tasks(
    stage: Stage,
    tasks: Iterator[Task],
    context: Context,
    reporter: Reporter,
    total: int,
    done: int = 0,
    *,
    executor: TaskExecutor | None = None,
    ended: Callable[[Task], None] = lambda task: None,
) -> None:
    """Run tasks as stage and config specify, and report progress.

    Args:
        stage: whose tasks they are.
        tasks: consumed lazily, when a worker is free.
        context: that of the stage.
        reporter: receives progress.
        total: units of the job, 0 if unknown.
        done: units that already exist.
        executor: replaces the one that stage and config select.
        ended: called for every task whose part is finished.
    """
    counted: dict[str, int] = {}

    def progress(task: Task, units: int, note: str, finished: bool) -> None:
        # A part counts its rows exactly once, whatever its stage reported on the way.
        before = counted.get(task.key, 0)
        counted[task.key] = task.rows if finished else min(task.rows, before + units)
        reporter.advance(counted[task.key] - before, note)
        if finished:
            ended(task)

    reporter.begin(stage.name, total, done, stage.unit)
    try:
        (executor or _executor(stage, context))(stage, tasks, context, progress)
    finally:
        reporter.end()


def status(config: Config, graph: Graph) -> list[State]:
    """The state of every stage. Read-only."""
    states = []
    with digests_of(config) as digests:
        context = Context(config, config.run_dir, digests)
        for stage in graph.values():
            state = look(stage, context)
            states.append(state)
            if state.state == "current" and state.manifest:
                context = context.after(stage, state.manifest)
    return states


def _manifest(stage: Stage, context: Context, identity: Identity, parts: list[Part], seconds: float) -> Manifest:
    return Manifest(
        stage=stage.name,
        version=stage.version,
        key=context.key,
        settings=identity.settings,
        inputs={**identity.sources, **identity.inputs},
        parts=tuple(parts),
        stats=stage.stats(context, parts),
        provenance={
            "negpipe": __version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 2),
            "config": redacted(context.config.model_dump(mode="json")),
        },
    )


def _check_share(context: Context) -> None:
    settings = context.config.executor
    if settings.kind != "inline" and (settings.workers or 1) > context.workers:
        logger.warning(
            "executor.workers is %d, more than resources.cpus, so %d run at a time", settings.workers, context.workers
        )


def _executor(stage: Stage, context: Context) -> TaskExecutor:
    place = stage.place(context.config)
    # A caller of the Python API may have torch loaded, which must not meet FAISS.
    if place == "light" and context.workers == 1 and "torch" not in sys.modules:
        return inline.run
    if place == "caller" or (place != "apart" and context.config.executor.kind == "inline"):
        return inline.run
    return ray.run if context.config.executor.kind == "ray" else local.run


def _counts(stage: Stage, manifest: Manifest | None) -> str:
    counts = stage.counts(manifest.stats) if manifest else {}
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())
