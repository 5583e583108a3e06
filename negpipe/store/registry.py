"""The registry of run directories with parts in a shared store."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from negpipe.errors import ConfigError, DamagedError
from negpipe.store.files import BOOKS, json_bytes
from negpipe.store.store import LocalStore

_FOLDER = f"{BOOKS}/runs"
_PATIENCE = 60.0  # seconds; `clean` holds the registry while deleting


@contextmanager
def kept(store: LocalStore) -> Iterator[None]:
    """Hold the registry: meanwhile, no further run starts using the store.

    Raises:
        LockedError: another process holds it.
    """
    with store.lock(f"{BOOKS}/runs.lock", _PATIENCE):
        yield


def register(store: LocalStore, run_dir: Path) -> None:
    """Register a run directory, which is locked. A registered one need not wait: a process that deletes in the store
    locks all registered run directories exclusively."""
    name, content = _entry(run_dir)
    if store.read(name) != content:
        with kept(store):
            note(store, run_dir)


def note(store: LocalStore, run_dir: Path) -> None:
    """The same for a process that already holds the registry."""
    name, content = _entry(run_dir)
    store.replace(name, content, store.read(name))


def _entry(run_dir: Path) -> tuple[str, bytes]:
    path = os.path.realpath(run_dir)
    return f"{_FOLDER}/{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}.json", json_bytes({"run_dir": path})


def registered(store: LocalStore) -> list[Path]:
    """The run directories that use the store, each once.

    Raises:
        DamagedError: an entry cannot be read.
    """
    return [*dict.fromkeys(Path(os.path.realpath(path)) for path in _entries(store).values())]


def others(store: LocalStore, run_dir: Path) -> list[Path]:
    """The registered run directories other than this one."""
    return [path for path in registered(store) if path != Path(os.path.realpath(run_dir))]


def forget(store: LocalStore, run_dir: Path) -> bool:
    """Remove the entry of a deleted run directory; returns whether it was registered."""
    names = [name for name, path in _entries(store).items() if path in (str(run_dir.absolute()), str(run_dir))]
    for name in names:
        store.delete(name)
    return bool(names)


def check_place(run_dir: Path, store: Path) -> None:
    """Refuse another run's run directory as a store: that run's `clean` does not know who shares it.

    Raises:
        ConfigError: it is a run directory.
    """
    if os.path.realpath(store) != os.path.realpath(run_dir) and any((store / BOOKS).glob("*/manifest.json")):
        raise ConfigError(
            f"store: {store} is a run directory and cannot be a store: its own run could delete shared parts. Use"
            " a separate folder, and move the folders of parts and the records in .negpipe there"
        )


def check_own_parts(run_dir: Path, store: Path) -> None:
    """Refuse a run directory that already contains parts: they would be recomputed in the store.

    Raises:
        ConfigError: it contains parts.
    """
    if os.path.realpath(store) == os.path.realpath(run_dir):
        return
    records = [path for path in (run_dir / BOOKS).glob("*/*.json") if re.fullmatch(r"[0-9a-f]{16}\.json", path.name)]
    if records:
        raise ConfigError(
            f"store: {run_dir} already has parts, which would be recomputed in {store}: use a new run_dir, or move"
            " its folders of parts, and the records in .negpipe named by 16 digits, to the same places in the"
            " store"
        )


def check_run_dir(run_dir: Path, store: Path | None) -> None:
    """Refuse a store as the run directory of a config that does not declare it as its store.

    Raises:
        ConfigError: it is a store.
    """
    if (run_dir / _FOLDER).is_dir() and (store is None or os.path.realpath(store) != os.path.realpath(run_dir)):
        raise ConfigError(f"run_dir: {run_dir} is a store shared by run directories: use another folder")


def _entries(store: LocalStore) -> dict[str, str]:
    found = {}
    for name in store.names(_FOLDER):
        if not name.endswith(".json"):
            continue
        try:
            found[name] = str(json.loads(store.read(name) or b"")["run_dir"])
        except (ValueError, LookupError, TypeError, RecursionError):
            raise DamagedError(
                f"{store.path(name)} does not name a run directory: delete it, and run `negpipe mine` for the run"
                " directory that it belonged to"
            ) from None
    return found
