"""Merges the nearest documents of slices, searched independently, into those of the corpus.

Guarantees: the bytes of one search over all slices. Slices are compared by the same keys that a search compares
(`pairs.keys_of`), and no score is computed again.

A slice's file is a .npy of (anchors, layers, width) uint64 keys, rows counted from the slice's first row. The last
layer has scores; for an index that only proposes, the layer before it has the index's own products of the same rows,
which decide which of all slices' proposals a single search would have scored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from negpipe.ann.pairs import NOTHING, Keys, keys_of, rows_of, scores_of
from negpipe.data.arrays import Floats, Ints
from negpipe.data.npy import BROKEN
from negpipe.engine.budget import Budget
from negpipe.errors import DamagedError
from negpipe.store import mapped


def layered(rows: Ints, scores: Floats) -> Keys:
    """(n, 1, k) keys of a search result."""
    keys = keys_of(scores.ravel(), rows.ravel()).reshape(rows.shape)
    keys[rows < 0] = NOTHING
    return keys[:, np.newaxis]


def write(file: BinaryIO, found: Iterable[Keys], shape: tuple[int, int, int]) -> None:
    """Write the keys of a slice as they arrive, some anchors at a time; (anchors, layers, width) in total."""
    np.lib.format.write_array_header_1_0(file, {"descr": "<u8", "fortran_order": False, "shape": shape})
    for keys in found:
        file.write(np.ascontiguousarray(keys).data)


def merge(slices: Sequence[tuple[Path, int]], depth: int, proposed: int, *, budget: Budget) -> tuple[Ints, Floats]:
    """The `depth` best of all slices by (-score, row).

    Args:
        slices: their files, each with its first row; at least one.
        depth: rows per anchor.
        proposed: rows per anchor whose scores count, if there are layers of proposals.
        budget: does not affect results.

    Returns:
        rows (n, depth) int64, -1 if there are fewer, and scores (n, depth) float32, -inf there.

    Raises:
        BudgetError: a single anchor does not fit.
        DamagedError: a file was not written by `write`.
    """
    files = [(_opened(path), np.uint64(first)) for path, first in slices]
    count, layers, _ = files[0][0].shape
    width = sum(keys.shape[2] for keys, _ in files)
    kept = 12 * count * depth
    budget.require(kept + 32 * layers * width, f"merging {len(files):,} slices", "lower search.depth")
    step = min(max(1, count), budget.rows(32 * layers * width, kept))
    rows, scores = np.empty((count, depth), np.int64), np.empty((count, depth), np.float32)
    for low in range(0, count, step):
        here = slice(low, low + step)
        keys = np.concatenate([_from(array[here], first) for array, first in files], axis=2)
        if layers > 1 and width > proposed:
            chosen = np.argpartition(keys[:, 0], proposed - 1, axis=1)[:, :proposed]
            keys = np.take_along_axis(keys, chosen[:, np.newaxis], axis=2)
        best = np.full((len(keys), max(depth, keys.shape[2])), NOTHING)
        best[:, : keys.shape[2]] = keys[:, -1]
        best.partition(depth - 1, axis=1)
        best = np.sort(best[:, :depth], axis=1)
        rows[here], scores[here] = rows_of(best), scores_of(best)
    return rows, scores


def _from(keys: Keys, first: np.uint64) -> Keys:
    """The keys with corpus rows instead of slice rows."""
    return np.where(keys == NOTHING, NOTHING, keys + first)


def _opened(path: Path) -> Keys:
    try:
        keys: Keys = mapped.npy(path)
    except BROKEN as error:
        raise DamagedError(f"{path}: is not a complete .npy file ({error}). Run `negpipe verify`") from None
    if keys.dtype != np.uint64 or keys.ndim != 3:
        raise DamagedError(f"{path}: holds {keys.dtype} of shape {keys.shape}, not keys. Run `negpipe verify`")
    return keys
