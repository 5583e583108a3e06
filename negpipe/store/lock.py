"""Locks on a run directory, for one process or several shards together, and short ones on a store."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from negpipe.errors import ConfigError, LockedError
from negpipe.store.files import BOOKS, explained, write_json

logger = logging.getLogger(__name__)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def held(path: Path, patience: float = 0.0, holder: Path | None = None, *, shared: bool = False) -> Iterator[None]:
    """Hold a lock file; the operating system releases it when the process ends, however it ends.

    If the file system has no locks, a warning says so and the work continues: two processes then do work twice but, as
    files are named by their content and appear complete, cannot corrupt each other's. If the lock is to be shared, this
    is an error instead: shards claim their tasks by writes that depend on it.

    Args:
        path: the lock file.
        patience: seconds to wait for it.
        holder: a file that says who holds it; with several holders, the latest.
        shared: other processes that share it may hold it at the same time; tried only once.

    Raises:
        LockedError: another process holds it; the message names host, process and start time, if known.
        ConfigError: it is to be shared, and the file system has no locks.
    """
    with explained(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    lock: BaseFileLock | _SharedLock = _SharedLock(path) if shared else FileLock(path)
    try:
        with explained(path.parent):
            lock.acquire(timeout=patience)
    except Timeout:
        place = path.parent.parent if holder else path
        raise LockedError(f"{place} is in use by {_describe(holder)}: wait for it or stop it") from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        if shared:
            lock.release()
            raise ConfigError(
                f"cannot lock {path.parent.parent} ({error.strerror}): shards need a file system with locks, or they"
                " may do the same work. Mount it with locks, or run one `negpipe mine` on one machine"
            ) from None
        logger.warning("cannot lock %s (%s): do not start a second run on it", path.parent.parent, error.strerror)
    since = datetime.now(UTC).isoformat(timespec="seconds")
    note = {"host": platform.node(), "pid": os.getpid(), "since": since}
    try:
        if holder:
            write_json(holder, note)
        yield
    finally:
        try:
            if holder and (not shared or _read(holder) == note):
                with suppress(OSError):
                    holder.unlink()
        finally:
            lock.release()


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Lock a run directory, see `held`."""
    with held(run_dir / BOOKS / "run.lock", holder=run_dir / BOOKS / "holder.json"):
        yield


@contextmanager
def shared_run_lock(run_dir: Path) -> Iterator[None]:
    """Lock a run directory together with other shards; exclusive locks are refused meanwhile. See `held`."""
    with held(run_dir / BOOKS / "run.lock", holder=run_dir / BOOKS / "holder.json", shared=True):
        yield


@contextmanager
def driver_lock(run_dir: Path, *, alone: bool) -> Iterator[bool]:
    """Lock a run directory against other drivers of its shards, but together with the shards. See `held`.

    Args:
        run_dir: the run directory.
        alone: running shards, left by a killed driver, are refused too.

    Returns:
        whether no process was working on it.
    """
    with held(run_dir / BOOKS / "driver.lock", holder=run_dir / BOOKS / "driver.json"):
        idle = True
        try:
            with run_lock(run_dir):
                pass
        except LockedError:
            if alone:
                raise
            idle = False
        with shared_run_lock(run_dir):
            yield idle


def in_use(run_dir: Path) -> str | None:
    """Who works on a local run directory, without touching its locks; None if nobody says so, or it is gone."""
    for name in ("driver.json", "holder.json"):
        who = _read(run_dir / BOOKS / name)
        if isinstance(who, dict) and (who.get("host") != platform.node() or _runs(who.get("pid"))):
            return _describe(run_dir / BOOKS / name)
    return None


def _runs(pid: object) -> bool:
    """Whether there is such a process on this machine."""
    if not isinstance(pid, int) or not 0 < pid < 2**31:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True


class _SharedLock:
    """flock's shared lock on a file that filelock also locks with flock, exclusively."""

    def __init__(self, path: Path) -> None:
        self._path, self._handle = path, -1

    def acquire(self, timeout: float) -> None:
        """Try once. Raises Timeout: another process holds it exclusively."""
        self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                raise
            self.release()
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise Timeout(str(self._path)) from None
            raise

    def release(self) -> None:
        """Closing the file releases it."""
        os.close(self._handle)


def _describe(holder: Path | None) -> str:
    who: Any = _read(holder) if holder else None
    try:
        return f"process {who['pid']} on {who['host']}, running since {who['since']}"
    except (LookupError, TypeError):
        return "another negpipe process"


def _read(holder: Path) -> Any:
    """What a holder wrote about itself; None if it cannot be read."""
    try:
        return json.loads(holder.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
