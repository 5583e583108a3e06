"""Which run directories have parts in a store that they share."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from negpipe.errors import DamagedError
from negpipe.store.files import BOOKS, json_bytes
from negpipe.store.store import LocalStore

_FOLDER = f"{BOOKS}/runs"
_PATIENCE = 60.0  # seconds; `clean` holds the registry while it deletes


@contextmanager
def kept(store: LocalStore, patience: float = _PATIENCE) -> Iterator[None]:
    """Hold the registry: meanwhile no run begins to use the store.

    Raises:
        LockedError: another process holds it.
    """
    with store.lock(f"{BOOKS}/runs.lock", patience):
        yield


def register(store: LocalStore, run_dir: Path) -> None:
    """Note that a run directory uses the store."""
    with kept(store):
        name = _name(run_dir)
        store.replace(name, json_bytes({"run_dir": os.path.realpath(run_dir)}), store.read(name))


def registered(store: LocalStore) -> list[Path]:
    """The run directories that use the store.

    Raises:
        DamagedError: an entry cannot be read.
    """
    found = []
    for name in store.names(_FOLDER):
        if not name.endswith(".json"):
            continue
        try:
            found.append(Path(json.loads(store.read(name) or b"")["run_dir"]))
        except (ValueError, LookupError, TypeError, RecursionError):
            raise DamagedError(
                f"{store.path(name)} does not name a run directory: delete it, and run `negpipe mine` for the run"
                " directory that it was of"
            ) from None
    return found


def forget(store: LocalStore, run_dir: Path) -> bool:
    """Strike a run directory that is gone; returns whether it was registered."""
    name = _name(run_dir)
    known = store.size(name) is not None
    store.delete(name)
    return known


def _name(run_dir: Path) -> str:
    return f"{_FOLDER}/{hashlib.sha256(os.fsencode(os.path.realpath(run_dir))).hexdigest()[:16]}.json"
