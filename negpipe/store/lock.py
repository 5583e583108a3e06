"""One process at a time works on a run directory."""

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
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold the run directory; the operating system lets go of it when the process ends, however it ends.

    Where the file system has no locks, a warning says so and the run goes on: two of them then do work twice, but
    every file is named by what it holds and appears whole, so they cannot spoil each other's.

    Raises:
        LockedError: another process holds it; the message names host, process and start time.
    """
    books = run_dir / BOOKS
    with explained(books):
        books.mkdir(parents=True, exist_ok=True)
    holder = books / "holder.json"
    lock = FileLock(books / "run.lock")
    try:
        with explained(books):
            lock.acquire(timeout=0)
    except Timeout:
        raise LockedError(f"{run_dir} is in use by {_describe(holder)}: wait for it or stop it") from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        logger.warning("%s cannot be locked (%s): start no second run on it", run_dir, error.strerror)
    try:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(holder, {"host": platform.node(), "pid": os.getpid(), "since": since})
        yield
    finally:
        with suppress(OSError):
            holder.unlink()
        lock.release()


def _describe(holder: Path) -> str:
    try:
        who = json.loads(holder.read_text(encoding="utf-8"))
        return f"process {who['pid']} on {who['host']}, running since {who['since']}"
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return "another negpipe process"
