"""Checks of the headers of a part's files: they cost almost nothing, and damage rarely leaves headers intact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from negpipe import ann
from negpipe.data.npy import BROKEN
from negpipe.data.tables import count_rows
from negpipe.engine.manifest import OTHER_CONTENT, Part
from negpipe.errors import DamagedError
from negpipe.store import mapped
from negpipe.store.store import Store


def misfit(store: Store, part: Part, beside: Mapping[str, str] | None = None) -> str | None:
    """How the headers contradict the part's record; None if they agree.

    Args:
        store: the store of the part.
        part: a part whose files hold its rows.
        beside: role of files with rows other than the part's → key of their number in the part's meta.
    """
    counts: Counter[str] = Counter()
    for file in (file for file in part.files if not file.aside):
        try:
            rows = _rows(store.path(file.path))
        except (*BROKEN, LookupError, DamagedError, pa.ArrowException):
            return f"{file.path} {OTHER_CONTENT} (its header cannot be read)"
        counts[file.role.partition("-")[0]] += rows
    for role, rows in counts.items():
        written = part.meta.get((beside or {}).get(role, ""), part.rows)
        if rows != written:
            path = next(file.path for file in part.files if file.role.partition("-")[0] == role)
            return f"{path} {OTHER_CONTENT} ({rows:,} rows, expected {written:,})"
    return None


def _rows(path: Path) -> int:
    """The rows of a file, from its header or footer."""
    if path.suffix == ".npy":
        return ann.open_parts([path]).rows
    if path.suffix == ".faiss":
        return ann.open_flat(path).rows
    if path.suffix == ".arrow":
        return count_rows(path)
    with mapped.arrow(path) as file:
        return int(pq.read_metadata(file).num_rows)
