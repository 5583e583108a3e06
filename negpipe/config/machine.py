"""The resources of this machine: cores, memory, which a container may limit, and how the C library frees it."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

_M_ARENA_MAX = -8  # of glibc's malloc.h
_CGROUP = Path("/sys/fs/cgroup/memory.max")


def memory() -> int:
    """Memory in bytes that this process may use, limited by the machine or its container."""
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
    """Peak memory of this process in bytes, without its parent's peak, which getrusage includes."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:  # not on Linux: in bytes, without the parent's peak
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


def share_freed_memory() -> None:
    """Share freed memory between threads: glibc keeps a heap per thread, which does not return its memory.

    Without this, a search by lists took a third more memory than it used. Call it in our processes before they compute.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def give_back() -> None:
    """Return freed memory to the system, if the C library keeps it (glibc). Changes nothing else."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def cache_folder() -> Path:
    """The folder for exported models, and for copies of runs in buckets."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "negpipe"
