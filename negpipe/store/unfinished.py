"""Names of files and folders that are not finished. They say who works on them, so that what a dead process left can
be told from what a live one writes, and from what somebody else put there.

A process is known by number and start, as numbers are given again; its place by host name, boot and process namespace:
in containers every process is number 1, and containers may share a host name.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_NAME = re.compile(r"(?:\.[0-9a-f]{32}|spool)-(\d+)(?:\.(\d+))?@([\w.-]+?)(?:\.tmp|-\w{8})")
_OWNER = re.compile(r"(\d+)\.(\d+)@([\w.-]+)")
_DAY = 86400


def temporary(folder: Path) -> Path:
    """A new name in a folder for a file until it is whole."""
    return folder / f".{uuid.uuid4().hex}-{owner()}.tmp"


def owner(pid: int | None = None) -> str:
    """This process, or another one of this place."""
    pid = pid or os.getpid()
    return f"{pid}.{_state(pid)[1]}@{_place()}"


def left_over(folder: Path, *, own: bool = True) -> Iterator[Path]:
    """What processes that are gone left in a folder: files and folders of the names given here, and nothing else.

    Args:
        folder: where to look.
        own: what this process left is nobody's, as a run looks before it begins; not where another run of it may be
            at work.
    """
    with suppress(OSError):
        yield from [path for path in folder.iterdir() if _is_abandoned(path, own)]


def is_gone(who: str) -> bool:
    """Whether an `owner` is known to be dead: a process of this place that is not there; of others nobody knows."""
    named = _OWNER.fullmatch(who)
    return named is not None and named[3] == _place() and not _alive(int(named[1]), int(named[2]))


def is_here(who: str) -> bool:
    """Whether an `owner` is known to live: a process of this place that is there."""
    named = _OWNER.fullmatch(who)
    return named is not None and named[3] == _place() and _alive(int(named[1]), int(named[2]))


def is_unfinished(name: str) -> bool:
    """Whether a name is one given here."""
    return _NAME.fullmatch(name) is not None


def _is_abandoned(path: Path, own: bool) -> bool:
    """Whether it has such a name, and nobody works on it any more.

    A process of the same place is looked for. One of another place can only be at work beside us where locks fail or a
    store is shared: it counts as dead after a day without a write.
    """
    named = _NAME.fullmatch(path.name)
    if named is None:
        return False
    pid, started, place = named.groups()
    if place == _place() and started is not None:
        return own if int(pid) == os.getpid() else not _alive(int(pid), int(started))
    newest = 0.0
    for inner in (path, *(() if path.is_symlink() else path.rglob("*"))):
        with suppress(OSError):
            newest = max(newest, inner.lstat().st_mtime)
    return time.time() - newest > _DAY


def _place() -> str:
    """The host by name, and eight digits of its boot and this process's namespace of process numbers."""
    known = []
    with suppress(OSError):  # not on Linux
        known.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with suppress(OSError):
        known.append(str(Path("/proc/self/ns/pid").readlink()))
    host = re.sub(r"[^\w.-]", "_", platform.node())
    return f"{host}.{hashlib.sha256(repr(known).encode()).hexdigest()[:8]}"


def _alive(pid: int, started: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    state, since = _state(pid)
    # In a container without an init process, the dead stay listed: state Z.
    return state not in ("Z", "X") and (since == started or 0 in (since, started))


def _state(pid: int) -> tuple[str, int]:
    """State and start of a process, in ticks since the boot; 0 where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, LookupError, ValueError):
        return "", 0
