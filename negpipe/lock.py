"""One process at a time works on a run directory."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from negpipe.errors import LockedError
from negpipe.manifest import BOOKS
from negpipe.storage import explained


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold the run directory; the operating system lets go of it when the process ends, however it ends.

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
    try:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        with explained(books):
            holder.write_text(
                json.dumps({"host": platform.node(), "pid": os.getpid(), "since": since}), encoding="utf-8"
            )
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _describe(holder: Path) -> str:
    try:
        who = json.loads(holder.read_text(encoding="utf-8"))
        return f"process {who['pid']} on {who['host']}, running since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another negpipe process"
