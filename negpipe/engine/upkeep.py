"""Maintenance of a run directory: verifying its files and deleting what is no longer needed."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from negpipe.config.schema import Config
from negpipe.engine.manifest import Books, File
from negpipe.engine.repair import damaged
from negpipe.engine.stage import Graph, Stage, linkable
from negpipe.errors import ConfigError, DamagedError, MissingStageError, StorageError
from negpipe.store import registry, view
from negpipe.store.boundary import stay_inside
from negpipe.store.files import BOOKS
from negpipe.store.lock import run_lock
from negpipe.store.opening import run_held, run_of, store_of
from negpipe.store.store import LocalStore

_STAGING = re.compile(r"\.[a-z]+-[0-9a-f]{16}")


@dataclass(frozen=True)
class Inventory:
    """Everything a run directory has records of.

    Attributes:
        files: those of complete stages, and of parts kept in case an earlier setting returns.
        unreadable: manifests and part records that have changed since they were written, one line each.
    """

    files: tuple[File, ...]
    unreadable: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


def inventory(config: Config, graph: Graph) -> Inventory:
    """Read every manifest and every part record.

    Raises:
        MissingStageError: there are none.
    """
    run, store = run_of(config), store_of(config)
    files: dict[str, File] = {}
    unreadable: list[str] = []
    for name in graph:
        books = Books(run, name, store)
        try:
            manifest = books.manifest()
        except DamagedError as error:
            unreadable.append(str(error))
            manifest = None
        keys = books.recorded()
        parts = {part.key: part for part in books.records()}
        broken = store.sizes(books.name(key) for key in keys if key not in parts)  # a listing may show deleted ones
        unreadable += [f"{store}/{name} is not a valid part record" for name in broken]
        recorded = {file.path: file for part in parts.values() for file in part.files}
        # Missing files were cleaned, or moved since the first edition published them.
        files |= {path: recorded[path] for path in store.sizes(recorded)}
        files |= {file.path: file for part in (manifest.parts if manifest else ()) for file in part.files}
    if not files and not unreadable:
        raise MissingStageError(f"no stage has output in {run}: run `negpipe mine CONFIG` first")
    return Inventory(tuple(files.values()), tuple(unreadable))


def verify(config: Config, found: Inventory, progress: Callable[[int], None] = lambda _: None) -> list[str]:
    """Read every file in full and compare digests; changes nothing.

    Args:
        config: the config of the run.
        found: its inventory.
        progress: gets the bytes of every file read.

    Returns:
        problems, one line each.
    """
    return [*found.unreadable, *(problem for _, problem in damaged(store_of(config), found.files, progress))]


def superseded(config: Config, graph: Graph) -> list[tuple[Path, int]]:
    """Files that no current manifest names, with their bytes: what `clean` frees.

    Only files that certainly belong to negpipe: files named in records, the records, and unrecorded files of killed
    runs whose names prove it. A stage without a manifest keeps its parts, which it resumes from. In a store shared by
    several run directories, parts that any of them names are kept.

    Raises:
        StorageError: a run directory that uses the store cannot be read.
    """
    store, runs = store_of(config), _runs(config)
    for place in {store.scratch, *runs}:
        stay_inside(place, linkable(graph))
    found = {*store.strays(BOOKS, ())}
    for name, stage in graph.items():
        found |= _growing(store.scratch, stage)
        books = Books(run_of(config), name, store)
        manifests = [books.manifest(), *(Books(run, name, store).manifest() for run in runs[1:])]
        parts = [part for manifest in manifests if manifest for part in manifest.parts]
        if None in manifests:
            continue
        keys = {part.key for part in parts}
        keep = {*map(books.name, keys), *(file.path for part in parts for file in part.files)}
        own = {name, *stage.folders}  # no record of this stage can name another stage's files
        files = (file.path for part in books.records(but=keys) for file in part.files)
        ours = {path for path in files if str(PurePosixPath(path).parent) in own}
        ours |= {*map(books.name, books.recorded()), *books.checkpoints(), *books.of_shards()}
        for folder in {books.folder, *own} - stage.views(()).keys():
            ours |= {*store.strays(folder, keep | ours)}
        found |= ours - keep
    return [(store.scratch / name, size) for name, size in sorted(store.sizes(found).items())]


def _growing(folder: Path, stage: Stage) -> set[str]:
    """Rows that the first edition could not publish. Only runs write parts into folders with this name."""
    paths = (path for name in stage.views(()) for path in folder.glob(f".{name}-*/*") if view.PART.fullmatch(path.name))
    ours = (path for path in paths if _STAGING.fullmatch(path.parent.name) and not path.parent.is_symlink())
    return {path.relative_to(folder).as_posix() for path in ours}


def _store(config: Config) -> LocalStore:
    return LocalStore(config.store or config.run_dir)


def _runs(config: Config) -> list[Path]:
    """The run directories that use the store.

    Raises:
        StorageError: a run directory cannot be read.
    """
    if config.store is None:
        registry.check_run_dir(config.run_dir, None)
        return [config.run_dir]
    others = registry.others(_store(config), config.run_dir)
    for run in others:
        try:
            next((run / BOOKS).iterdir(), None)
        except OSError as error:
            raise StorageError(
                f"{run} uses the store {config.store} and cannot be read ({error.strerror}), so the parts that it"
                " needs are unknown: make it readable. If it was moved, mine it there once, to register it; then, or"
                f" if it is gone, run `negpipe clean CONFIG --forget {run}`"
            ) from error
    return [config.run_dir, *others]


def clean(config: Config, graph: Graph) -> int:
    """Delete what `superseded` lists. Returns the bytes freed.

    Raises:
        LockedError: a run is using these parts.
    """
    stay_inside(config.run_dir, linkable(graph))  # before a lock is written
    with ExitStack() as locks:
        if config.store:
            locks.enter_context(registry.kept(_store(config)))
        runs = _runs(config)
        locks.enter_context(run_held(config))
        for run in runs[1:]:
            locks.enter_context(run_lock(run))
        listed = superseded(config, graph)
        for run in runs:
            for name in (name for stage in graph.values() for name in stage.views(())):
                for path in [*view.stale(run, name)]:
                    path.unlink(missing_ok=True)
                view.drop_empty(run, name)
        store = store_of(config)
        for path, _ in listed:
            store.delete(path.relative_to(store.scratch).as_posix())
        for run in runs:
            for folder in run.glob(".*-*"):
                if _STAGING.fullmatch(folder.name) and folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
    return sum(size for _, size in listed)


def forget(config: Config, run_dir: Path) -> None:
    """Unregister a deleted run directory that used the store.

    Raises:
        ConfigError: the config has no store, or the store does not know the run directory.
    """
    store = _store(config)
    if (run_dir / BOOKS).is_dir():
        raise ConfigError(f"--forget: {run_dir} still exists: delete it first, or run `clean` with its config")
    if config.store is None:
        raise ConfigError("--forget needs a config with a shared `store`")
    with registry.kept(store):
        if not registry.forget(store, run_dir):
            known = ", ".join(map(str, registry.registered(store))) or "none"
            raise ConfigError(f"--forget: {run_dir} does not use {config.store}; these do: {known}")
