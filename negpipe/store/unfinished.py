"""Names of unfinished files and folders. They identify their owner, so that leftovers of a dead process can be
distinguished from files that a live one writes, and from unrelated files.

A process is identified by number and start time, as numbers are reused; its place by host name, boot and process
namespace: in containers every process may have number 1, and containers may share a host name.
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
    """A new name in a folder for an unfinished file."""
    return folder / f".{uuid.uuid4().hex}-{owner()}.tmp"


def owner(pid: int | None = None) -> str:
    """The owner name of this process, or of another one in the same place."""
    pid = pid or os.getpid()
    return f"{pid}.{_state(pid)[1]}@{_place()}"


def left_over(folder: Path, *, own: bool = True) -> Iterator[Path]:
    """Leftovers of dead processes in a folder: only files and folders with names made here.

    Args:
        folder: where to look.
        own: whether leftovers of this process count, as when a run looks before it starts; not if another run of this
            process may be active.
    """
    with suppress(OSError):
        yield from [path for path in folder.iterdir() if _is_abandoned(path, own)]


def is_gone(who: str) -> bool:
    """Whether an `owner` is known to be dead: a missing process of this place; unknown for other places."""
    named = _OWNER.fullmatch(who)
    return named is not None and named[3] == _place() and not _alive(int(named[1]), int(named[2]))


def is_here(who: str) -> bool:
    """Whether an `owner` is known to be alive: an existing process of this place."""
    named = _OWNER.fullmatch(who)
    return named is not None and named[3] == _place() and _alive(int(named[1]), int(named[2]))


def is_unfinished(name: str) -> bool:
    """Whether a name was made here."""
    return _NAME.fullmatch(name) is not None


def _is_abandoned(path: Path, own: bool) -> bool:
    """Whether it has such a name and no process works on it any more.

    A process of the same place is looked up. A process of another place can only be active at the same time if locks
    fail or the store is shared: it counts as dead after a day without a write.
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
    """Host name, and eight digits identifying its boot and this process's PID namespace."""
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
    # In a container without an init process, dead processes stay listed: state Z.
    return state not in ("Z", "X") and (since == started or 0 in (since, started))


def _state(pid: int) -> tuple[str, int]:
    """State of a process, and its start in ticks since the boot; 0 if unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, LookupError, ValueError):
        return "", 0
