"""What this machine has: its memory, which a container may cut, and how the C library keeps it."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

_M_ARENA_MAX = -8  # of glibc's malloc.h
_CGROUP = Path("/sys/fs/cgroup/memory.max")


def memory() -> int:
    """Bytes this process may use: of the machine, or of the container it runs in."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(_CGROUP.read_text()))
    except (OSError, ValueError):  # no container, or "max"
        return total


def cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # not on Linux


def peak_memory() -> int:
    """Bytes that this process has held at most. Its parent's peak, which getrusage passes on, is not among them."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:  # not on Linux: bytes, and nothing of the parent's
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


def share_freed_memory() -> None:
    """Let what one thread frees serve the others: glibc keeps a heap for each of them, and none returns its memory.

    A search by lists took a third more than it used. For processes of our own, before they compute.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def give_back() -> None:
    """Give memory that was freed back to the system, where its C library keeps it (glibc). Changes nothing else."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
