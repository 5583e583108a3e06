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
from negpipe.store import registry, unfinished, view
from negpipe.store.boundary import stay_inside
from negpipe.store.cache import OF_CONTENT
from negpipe.store.files import BOOKS, file_digest
from negpipe.store.lock import run_lock
from negpipe.store.objects import PROBE
from negpipe.store.opening import run_held, run_of, store_of
from negpipe.store.store import LocalStore, Store

_PUBLISHED = re.compile(r"[0-9a-f]{16}-([0-9a-f]{12})\.[a-z]+")
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
        unreadable += [f"{store}/{books.name(key)} is not a valid part record" for key in keys if key not in parts]
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
    if config.url:
        objects = _superseded_objects(graph, store_of(config))
        return [(config.run_dir / name, size) for name, size in sorted(objects.items())]
    store, runs = _store(config), _runs(config)
    for folder in {store.root, *runs}:
        stay_inside(folder, linkable(graph))
    found: set[Path] = set()
    for name, stage in graph.items():
        manifests = [Books(run, name, store).manifest() for run in runs]
        for run in runs:
            found |= _growing(run, stage)
        parts = [part for manifest in manifests if manifest for part in manifest.parts]
        if None in manifests:
            continue
        books = Books(config.run_dir, name, store)
        keep = {store.path(file.path) for part in parts for file in part.files}
        keep |= {store.path(books.name(part.key)) for part in parts}
        own = {name, *stage.folders}  # no record of this stage can name another stage's files
        ours = {
            store.path(file.path)
            for part in books.records()
            for file in part.files
            if str(PurePosixPath(file.path).parent) in own
        }
        ours |= {
            store.path(each) for each in [*map(books.name, books.recorded()), *books.checkpoints(), *books.of_shards()]
        }
        ours |= {*unfinished.left_over(store.path(books.folder))}
        for folder in {store.path(each) for each in own}:
            if stage.views(()).keys() & {folder.name}:
                continue
            ours |= {*unfinished.left_over(folder)}
            if not folder.is_symlink():  # other stores may link to the same folder
                ours |= {path for path in _files(folder) - keep - ours if _carries_digest(path)}
        found |= {path for path in ours - keep if path.is_file()}
    return [(path, path.stat().st_size) for path in sorted(found)]


def _superseded_objects(graph: Graph, store: Store) -> dict[str, int]:
    """The same for a run in a bucket, by name: only negpipe puts files named like parts there."""
    probes = [name for name in store.names(BOOKS) if name.startswith(PROBE)]  # of runs killed at their start
    found = store.sizes(probes)
    for name, stage in graph.items():
        books = Books(store, name)
        if (manifest := books.manifest()) is None:
            continue
        keep = {file.path for part in manifest.parts for file in part.files}
        keep |= {books.name(part.key) for part in manifest.parts}
        ours = {*map(books.name, books.recorded()), *books.of_shards()}
        for folder in {name, *stage.folders} - stage.views(()).keys():
            ours |= {path for path in store.names(folder) if OF_CONTENT.fullmatch(path)}
        found |= store.sizes(ours - keep)
    return found


def _growing(run_dir: Path, stage: Stage) -> set[Path]:
    """Rows that the first edition could not publish. Only runs write parts into folders with this name."""
    folders = [
        folder
        for name in stage.views(())
        for folder in run_dir.glob(f".{name}-*")
        if _STAGING.fullmatch(folder.name) and not folder.is_symlink()
    ]
    return {path for folder in folders for path in _files(folder) if view.PART.fullmatch(path.name)}


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


def _files(folder: Path) -> set[Path]:
    return {path for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set()


def _carries_digest(path: Path) -> bool:
    """Whether a file's name ends in the digest of its content, as `Publisher` names files."""
    named = _PUBLISHED.fullmatch(path.name)
    return named is not None and file_digest(path).startswith(named[1])


def clean(config: Config, graph: Graph) -> int:
    """Delete what `superseded` lists. Returns the bytes freed.

    Raises:
        LockedError: a run is using these parts.
    """
    stay_inside(config.run_dir, linkable(graph))  # before a lock is written
    with ExitStack() as locks:
        if config.store:
            locks.enter_context(registry.kept(_store(config)))
        if config.url:
            locks.enter_context(run_held(config))
            store = store_of(config)
            objects = _superseded_objects(graph, store)
            for name in objects:
                store.delete(name)
            return sum(objects.values())
        runs = _runs(config)
        for run in runs:
            locks.enter_context(run_lock(run))
        listed = superseded(config, graph)
        for run in runs:
            for name in (name for stage in graph.values() for name in stage.views(())):
                for path in [*view.stale(run, name)]:
                    path.unlink(missing_ok=True)
                view.drop_empty(run, name)
        for path, _ in listed:
            path.unlink(missing_ok=True)
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
