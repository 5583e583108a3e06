"""Features of this machine's processor."""

from __future__ import annotations

import functools
from pathlib import Path


@functools.cache
def flags() -> frozenset[str]:
    """Its features by their Linux names, such as `amx_bf16` or `avx512_bf16`; empty if unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    found = (line.partition(":") for line in lines)
    return frozenset(next((words.split() for name, _, words in found if name.strip() in ("flags", "Features")), ()))
