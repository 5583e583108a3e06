"""The order of stages: what must run and why, running it, and what is on disk.

Nothing runs whose output is already there: a stage whose manifest carries today's key is left alone,
and within a stage every part whose key is on disk is kept.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol

from negpipe import __version__, explain, exports, publication
from negpipe.config import Config
from negpipe.errors import DamagedError, MissingStageError
from negpipe.executors import inline, local
from negpipe.exports.blocks import Slices
from negpipe.fingerprint import DigestCache, key
from negpipe.lock import run_lock
from negpipe.manifest import BOOKS, Books, File, Manifest, Part
from negpipe.selection import PartFiles
from negpipe.stage import Context, Executor, Stage, Task, cache_path
from negpipe.stages import STAGES
from negpipe.stages.triplets import is_deeper, open_selection, part_files, search_deeper
from negpipe.storage import remove_temporaries

logger = logging.getLogger(__name__)


class Reporter(Protocol):
    """Where progress goes: a terminal or a log."""

    def begin(self, stage: str, total: int, done: int) -> None: ...
    def advance(self, units: int, note: str) -> None: ...
    def end(self) -> None: ...


class Silent:
    """A reporter for callers who only want the result."""

    def begin(self, stage: str, total: int, done: int) -> None: ...
    def advance(self, units: int, note: str) -> None: ...
    def end(self) -> None: ...


@dataclass(frozen=True)
class Result:
    """What a run made: the folder of the triplets, and each stage's counts."""

    run_dir: Path
    triplets: Path
    stats: dict[str, dict[str, Any]]
    ran: tuple[str, ...]


@dataclass(frozen=True)
class State:
    """How a stage stands. `reason` says why it is not current; `done` and `total` count parts where known."""

    stage: str
    state: Literal["current", "stale", "partial", "missing", "blocked", "damaged"]
    reason: str = ""
    manifest: Manifest | None = None
    done: int = 0
    total: int = 0


def mine(
    config: Config,
    *,
    only: str | None = None,
    reporter: Reporter | None = None,
    rehash: bool = False,
    rescore: Stage | None = None,
) -> Result:
    """Bring the stages up to date, or one of them.

    Args:
        config: what to make.
        only: the name of the one stage to run; its inputs must be there.
        reporter: where progress goes.
        rehash: read every source file again instead of trusting its modification time.
        rescore: a stage after search whose candidates take the place of search's.

    Raises:
        NegpipeError: with a message for people and an exit code for schedulers.
    """
    stages = [*STAGES.values()]
    if rescore:
        stages.insert(stages.index(STAGES["search"]) + 1, rescore)
    run_dir = config.run_dir
    ran = []
    with run_lock(run_dir), _digests(config, rehash=rehash) as digests:
        context = Context(config, run_dir, digests)
        for number, stage in enumerate(stages):
            publication.finish_swap(run_dir, stage.name)
            state = look(stage, context)
            manifest = state.manifest
            if state.state == "current":
                logger.info("%s: up to date (%s)", stage.name, _counts(manifest))
            elif only and stage.name != only:
                raise MissingStageError(_blocked(state, only))
            else:
                for ahead in [stage] if only else stages[number:]:
                    ahead.check(context)
                logger.info("%s: runs, %s", stage.name, state.reason)
                manifest = run_stage(stage, context, reporter or Silent())
                ran.append(stage.name)
                logger.info("%s: done in %.1f s (%s)", stage.name, manifest.provenance["seconds"], _counts(manifest))
            assert manifest is not None
            context = context.after(manifest, instead_of="search" if stage is rescore else None)
            if stage.name == only:
                break
    stats = {name: manifest.stats for name, manifest in context.manifests.items()}
    return Result(run_dir, run_dir / "triplets", stats, tuple(ran))


def run_stage(stage: Stage, context: Context, reporter: Reporter) -> Manifest:
    """Make what is missing of a stage, then its manifest.

    Raises:
        NegpipeError: a task failed; finished parts stay.
    """
    started = time.monotonic()
    run_dir = context.run_dir
    books = Books(run_dir, stage.name)
    for folder in (run_dir / stage.name, books.folder):
        remove_temporaries(folder)
    identity = _identity(stage, context)
    stage_key = identity.key
    context = replace(context, key=stage_key)
    if stage.swapped:
        publication.prepare(run_dir, stage.name, stage_key)

    plan = stage.plan(context)
    if not stage.here:
        plan = list(plan)
        present = {task.key for task in plan if books.part(task.key)}
        total, done = sum(task.rows for task in plan), sum(task.rows for task in plan if task.key in present)
        if present:
            logger.info("%s: %d of %d parts are there already", stage.name, len(present), len(plan))
    else:
        total, done = 0, 0
    keys: list[str] = []

    def missing() -> Iterator[Task]:
        for task in plan:
            keys.append(task.key)
            if books.part(task.key) is None:
                yield task

    counted: dict[str, int] = {}

    def progress(task: Task, units: int, note: str, finished: bool) -> None:
        # A part counts its rows exactly once, whatever its stage reported on the way.
        before = counted.get(task.key, 0)
        counted[task.key] = task.rows if finished else min(task.rows, before + units)
        reporter.advance(counted[task.key] - before, note)

    reporter.begin(stage.name, total, done)
    try:
        _executor(stage, context.config)(stage, missing(), context, progress)
    finally:
        reporter.end()

    parts = []
    for part_key in dict.fromkeys(keys):
        part = books.part(part_key)
        if part is None:
            raise DamagedError(
                f"{stage.name}: part {part_key} is not on disk after its task ended: run the command again"
            )
        parts.append(part)
    if stage.swapped:
        # The names under the final folder are about to mean something else.
        books.manifest_path.unlink(missing_ok=True)
        publication.swap(run_dir, stage.name, stage_key)
        parts = [_moved(part, publication.staging(stage.name, stage_key), stage.name) for part in parts]
    manifest = _manifest(stage, context, identity, parts, time.monotonic() - started)
    books.write_manifest(manifest)
    context.digest_file.save()
    return manifest


def look(stage: Stage, context: Context) -> State:
    """How a stage stands against the config, from its manifest and the files' sizes."""
    absent = [name for name in stage.inputs if name not in context.manifests]
    try:
        manifest = Books(context.run_dir, stage.name).manifest()
    except DamagedError as error:
        return State(stage.name, "damaged", str(error))
    if absent:
        return State(stage.name, "blocked", f"it waits for {absent[0]}", manifest)
    if manifest is None:
        done = sum(1 for _ in Books(context.run_dir, stage.name).parts())
        if not done:
            return State(stage.name, "missing", "it has not run yet")
        return State(stage.name, "partial", f"it was interrupted, {done} parts are on disk", done=done)
    identity = _identity(stage, context)
    serving = replace(identity, settings=stage.serving(manifest.settings, identity.settings))
    if manifest.key not in (identity.key, serving.key):
        return State(stage.name, "stale", _difference(manifest, identity, context.config), manifest)
    problems = [problem for part in manifest.parts for file in part.files if (problem := file.problem(context.run_dir))]
    if problems:
        return State(stage.name, "damaged", f"{problems[0]} ({len(problems)} files in all)", manifest)
    return State(stage.name, "current", "", manifest)


def status(config: Config) -> list[State]:
    """How every stage stands. Reads only."""
    states = []
    with _digests(config) as digests:
        context = Context(config, config.run_dir, digests)
        for stage in STAGES.values():
            state = look(stage, context)
            states.append(state)
            if state.state == "current" and state.manifest:
                context = context.after(state.manifest)
    return states


def export(config: Config, options: exports.Options, *, reporter: Reporter | None = None) -> exports.Exported:
    """Write the training rows in a trainer's layout, from what ingest and search left. Runs no stage.

    Raises:
        MissingStageError: a stage is not current; the message says which command to run.
        ConfigError, InputError, StorageError: see `exports.export`.
    """
    reporter = reporter or Silent()
    with _digests(config) as digests:
        context = _searched(config, digests, "export")
        opened = open_selection(context)

        def slices() -> Slices:
            parts, complete = _parts(context)
            for part in parts:
                files = part if complete else replace(part, deeper=search_deeper(part, opened, context))
                for piece in opened.selector.slices(files):
                    yield piece
                    reporter.advance(len(piece[0].rows), "")

        read, encode = context.manifest("ingest").stats, context.manifest("encode")
        vectors = {name: encode.inputs[name] for name in sorted(encode.inputs) if name.startswith("encoder.")}
        reporter.begin("export", read["anchors"], 0)
        try:
            return exports.export(
                context.config,
                options,
                opened.corpus,
                slices(),
                counts={"anchors": read["anchors"], "documents of the corpus": read["rows"]},
                encoder=exports.describe_encoder(config, vectors),
            )
        finally:
            reporter.end()


def explain_anchor(config: Config, anchor_id: str) -> explain.Explanation:
    """What became of every candidate of an anchor, and by which rule. Runs no stage.

    Raises:
        MissingStageError: a stage is not current; the message says which command to run.
        InputError: no anchor has the id.
    """
    with _digests(config) as digests:
        context = _searched(config, digests, "explain")
        opened = open_selection(context)
        parts, complete = _parts(context)
        part, at = explain.find(parts, anchor_id)
        files = part if complete else replace(part, deeper=search_deeper(part, opened, context))
        return explain.explain(opened.selector, opened.corpus, files, at)


def _searched(config: Config, digests: DigestCache, wanted: str) -> Context:
    """What a reader of candidates sees, if everything before `triplets` is current."""
    context = Context(config, config.run_dir, digests)
    for stage in list(STAGES.values())[: list(STAGES).index("triplets")]:
        state = look(stage, context)
        if state.state != "current" or state.manifest is None:
            raise MissingStageError(_blocked(state, wanted))
        context = context.after(state.manifest)
    STAGES["triplets"].check(context)
    return context


def _parts(context: Context) -> tuple[list[PartFiles], bool]:
    """The files of every part of anchors, and whether deeper candidates are among them.

    They are where `triplets` has run with these settings; elsewhere they are to be searched for.
    """
    stage = STAGES["triplets"]
    context = replace(context, key=_identity(stage, context).key)
    manifest = Books(context.run_dir, stage.name).manifest()
    complete = manifest is not None and look(stage, context).state == "current"
    made = manifest.parts if manifest and complete else ()
    deeper = {part.key: context.run_dir / file.path for part in made for file in part.files if is_deeper(file)}
    return [replace(part_files(context, task), deeper=deeper.get(task.key)) for task in stage.plan(context)], complete


def resolved(config: Config) -> tuple[Config, bool]:
    """The config as the stages see it.

    Returns:
        the config, and whether it is whole: what depends on the data is known once ingest is current.
    """
    mining, positives = config.mining, 0
    if mining.range_max is None or isinstance(mining.depth, str):
        with _digests(config) as digests:
            state = look(STAGES["ingest"], Context(config, config.run_dir, digests))
        if state.state != "current" or state.manifest is None:
            return config, False
        positives = state.manifest.stats["max_positives"]
    config = config.resolved(positives)
    return config.model_copy(update={"search": config.search.model_copy(update={"depth": config.depth})}), True


def verify(run_dir: Path, progress: Callable[[int], None] = lambda _: None) -> tuple[int, list[str]]:
    """Read every file of every complete stage and compare digests.

    Returns:
        files checked, and what is wrong, a line each.

    Raises:
        MissingStageError: there is nothing to verify.
    """
    files: list[File] = []
    problems: list[str] = []
    for name in STAGES:
        try:
            manifest = Books(run_dir, name).manifest()
        except DamagedError as error:
            problems.append(str(error))
            continue
        files += [file for part in (manifest.parts if manifest else ()) for file in part.files]
    if not files and not problems:
        raise MissingStageError(f"no stage is complete in {run_dir}: run `negpipe mine CONFIG` first")

    def check(file: File) -> str | None:
        problem = file.problem(run_dir, full=True)
        progress(file.bytes)
        return problem

    with ThreadPoolExecutor() as pool:
        problems += [problem for problem in pool.map(check, files) if problem]
    return len(files), problems


def superseded(run_dir: Path) -> list[tuple[Path, int]]:
    """Files that no current manifest names, with their bytes: what `clean` frees.

    A stage without a manifest keeps its parts, they are what it resumes from.
    """
    found: list[Path] = []
    for name, stage in STAGES.items():
        books = Books(run_dir, name)
        manifest = books.manifest()
        if manifest is None:
            continue
        keep = {run_dir / file.path for part in manifest.parts for file in part.files}
        keep |= {books.folder / f"{part.key}.json" for part in manifest.parts} | {books.manifest_path}
        folders = {run_dir / name, *(path.parent for path in keep), books.folder}
        found += [
            p for folder in folders for p in folder.glob("*") if p.is_file() and p not in keep and p.suffix != ".note"
        ]
        if stage.swapped:
            found += [p for folder in run_dir.glob(f".{name}-*") for p in folder.rglob("*") if p.is_file()]
    return [(path, path.stat().st_size) for path in sorted(found)]


def clean(run_dir: Path) -> int:
    """Delete what `superseded` lists. Returns the bytes freed."""
    with run_lock(run_dir):
        listed = superseded(run_dir)
        for path, _ in listed:
            path.unlink(missing_ok=True)
        for folder in run_dir.glob(".*-*"):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
    return sum(size for _, size in listed)


def load_context(config: Config, before: str) -> Context:
    """What a worker of stage `before` sees: the manifests of the stages ahead of it."""
    names = list(STAGES)[: list(STAGES).index(before)]
    context = Context(config, config.run_dir, DigestCache(cache_path(config.run_dir)))
    for name in names:
        if manifest := Books(config.run_dir, name).manifest():
            context = context.after(manifest)
    return context


@contextmanager
def _digests(config: Config, *, rehash: bool = False) -> Iterator[DigestCache]:
    digests = DigestCache(cache_path(config.run_dir), rehash=rehash)
    yield digests
    if (config.run_dir / BOOKS).is_dir():
        digests.save()


@dataclass(frozen=True)
class _Identity:
    """Everything that can change a stage's output."""

    stage: str
    version: int
    settings: dict[str, Any]
    sources: dict[str, str]
    inputs: dict[str, str]

    @property
    def key(self) -> str:
        return key(self.stage, self.version, self.settings, self.sources, self.inputs)


def _identity(stage: Stage, context: Context) -> _Identity:
    inputs = {name: context.manifest(name).digest for name in stage.inputs}
    return _Identity(stage.name, stage.version, stage.settings(context.config), stage.sources(context), inputs)


def _manifest(stage: Stage, context: Context, identity: _Identity, parts: list[Part], seconds: float) -> Manifest:
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
            "config": context.config.model_dump(mode="json"),
        },
    )


def _difference(manifest: Manifest, now: _Identity, config: Config) -> str:
    """Why a manifest is stale, in the words of the config."""
    if manifest.version != now.version:
        return f"its output was made by version {manifest.version} of the stage, this is version {now.version}"
    fresh = {**now.settings, **now.sources, **now.inputs}
    old = {**manifest.settings, **manifest.inputs}
    changed = [name for name in fresh if old.get(name, ...) != fresh[name]]
    lines = []
    for name in changed:
        if name in STAGES:
            lines.append(f"the output of {name} changed")
            continue
        if name not in old:
            lines.append(f"{name} is new")
            continue
        before, after = old[name], fresh[name]
        if name in now.sources:
            before, after = _setting(manifest.provenance.get("config", {}), name), _setting(config.model_dump(), name)
        same = before == after
        lines.append(f"the content of {name} changed" if same else f"{name} changed from {before!r} to {after!r}")
    return "; ".join(lines) or "its identity changed"


def _setting(tree: Any, name: str) -> Any:
    for step in name.split("."):
        tree = tree.get(step) if isinstance(tree, dict) else None
    return tree


def _executor(stage: Stage, config: Config) -> Executor:
    if stage.here or (config.executor.kind == "inline" and not stage.apart(config)):
        return inline.run
    return local.run


def _blocked(state: State, wanted: str) -> str:
    reason = f": {state.reason}" if state.reason else ""
    return (
        f"{wanted} needs the output of {state.stage}, which is {state.state}{reason}."
        f" Run `negpipe {state.stage} CONFIG` first, or `negpipe mine CONFIG` for all of it"
    )


def _moved(part: Part, old: str, new: str) -> Part:
    files = tuple(
        file.model_copy(update={"path": new + file.path.removeprefix(old)}) if file.path.startswith(f"{old}/") else file
        for file in part.files
    )
    return part.model_copy(update={"files": files})


def _counts(manifest: Manifest | None) -> str:
    if manifest is None:
        return ""
    shown = {name: value for name, value in manifest.stats.items() if isinstance(value, int) and value}
    return ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in shown.items())
