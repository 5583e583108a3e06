"""One process at a time: on a run directory, and for a moment on what changes in a store."""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from negpipe.errors import LockedError
from negpipe.store.files import BOOKS, explained, write_json

logger = logging.getLogger(__name__)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextmanager
def held(path: Path, patience: float = 0.0, holder: Path | None = None) -> Iterator[None]:
    """Hold a lock file; the operating system lets go of it when the process ends, however it ends.

    Where the file system has no locks, a warning says so and the work goes on: two processes then do work twice, but
    every file is named by what it holds and appears whole, so they cannot spoil each other's.

    Args:
        path: the lock file.
        patience: seconds to wait for it.
        holder: a file that says who holds it.

    Raises:
        LockedError: another process holds it; the message names host, process and start time where they are known.
    """
    with explained(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        with explained(path.parent):
            lock.acquire(timeout=patience)
    except Timeout:
        place = path.parent.parent if holder else path
        raise LockedError(f"{place} is in use by {_describe(holder)}: wait for it or stop it") from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        logger.warning("%s cannot be locked (%s): start no second run on it", path.parent.parent, error.strerror)
    try:
        if holder:
            since = datetime.now(UTC).isoformat(timespec="seconds")
            write_json(holder, {"host": platform.node(), "pid": os.getpid(), "since": since})
        yield
    finally:
        try:
            if holder:
                with suppress(OSError):
                    holder.unlink()
        finally:
            lock.release()


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold a run directory, see `held`."""
    with held(run_dir / BOOKS / "run.lock", holder=run_dir / BOOKS / "holder.json"):
        yield


def _describe(holder: Path | None) -> str:
    try:
        who = json.loads(holder.read_text(encoding="utf-8")) if holder else {}
        return f"process {who['pid']} on {who['host']}, running since {who['since']}"
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return "another negpipe process"
