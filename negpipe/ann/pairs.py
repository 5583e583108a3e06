"""The only function whose scores are stored, and integer keys that sort like (-score, row)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from negpipe.ann.library import faiss
from negpipe.ann.vectors import Vectors
from negpipe.data.arrays import Floats, Ints

Keys = NDArray[np.uint64]
_PAIRS = 8192  # pairs at a time
_CELLS = 2**20  # cells of a merge table
NOTHING = np.uint64(0xFF800000_FFFFFFFF)  # the key of score -inf, row -1: sorts after every real key


def pair_scores(anchors: Floats, anchor_of: Ints, vectors: Floats, row_of: Ints) -> Floats:
    """Inner products of pairs: the only function whose scores are stored.

    Args:
        anchors: (n, d) float32. vectors: (m, d) float32.
        anchor_of, row_of: (p,) int64, the pair's rows in these.

    Returns:
        (p,) float32; the bits of a pair do not depend on the other pairs, on their order or on threads.

    Raises:
        IndexError: a pair names a row that does not exist.
    """
    for index, rows in ((anchor_of, len(anchors)), (row_of, len(vectors))):
        if len(index) and not 0 <= index.min() <= index.max() < rows:
            raise IndexError(f"pairs name rows {index.min()} to {index.max()} of {rows}")
    arrays = [
        np.ascontiguousarray(array, dtype)
        for array, dtype in ((anchors, "f4"), (anchor_of, "i8"), (vectors, "f4"), (row_of, "i8"))
    ]
    scores = np.empty(len(anchor_of), np.float32)
    pointers = [faiss().swig_ptr(array) for array in (*arrays, scores)]
    faiss().pairwise_indexed_inner_product(anchors.shape[1], len(scores), *pointers)
    scores += np.float32(0)  # -0 becomes 0: equal scores get equal bits
    return scores


def score_pairs(anchors: Floats, vectors: Vectors, pairs: tuple[Ints, Ints]) -> Floats:
    """(p,): `pair_scores` of (p,) anchors and (p,) rows of vectors in files, without reading other rows."""
    anchor_of, row_of = pairs
    scores = np.empty(len(row_of), np.float32)
    for low in range(0, len(row_of), _PAIRS):
        here = slice(low, low + _PAIRS)
        rows, at = np.unique(row_of[here], return_inverse=True)
        scores[here] = pair_scores(anchors, anchor_of[here], vectors.take(rows), at)
    return scores


def keys_of(scores: Floats, rows: Ints) -> Keys:
    """One integer per pair that sorts like (-score, row)."""
    return (_flip(scores.view(np.int32)).view(np.uint32).astype(np.uint64) << np.uint64(32)) | rows.astype(np.uint64)


def scores_of(keys: Keys) -> Floats:
    return _flip((keys >> np.uint64(32)).astype(np.uint32).view(np.int32)).view(np.float32)


def rows_of(keys: Keys) -> Ints:
    """The rows of keys, -1 for NOTHING."""
    rows = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
    rows[keys == NOTHING] = -1
    return rows


def _flip(bits: NDArray[np.int32]) -> NDArray[np.int32]:
    """Maps float32 bits to unsigned integers in the reverse order of the numbers, and back."""
    return bits ^ (~(bits >> 31) & np.int32(0x7FFFFFFF))


def grouped(labels: Ints, count: int) -> tuple[Ints, Ints]:
    """The order that sorts labels below `count`, stably, and the (count + 1,) bounds of each label.

    Uses radix sort if the labels fit into 16 bits.
    """
    order: Ints = np.argsort(labels.astype(np.min_scalar_type(max(0, count - 1))), kind="stable")
    return order, np.concatenate([[0], np.cumsum(np.bincount(labels, minlength=count))])


def waiting(depth: int) -> int:
    """Average number of pairs per anchor that wait for a merge."""
    return 2 * depth + 16


class Best:
    """The best keys of some anchors; pairs wait until there are enough for a merge."""

    def __init__(self, anchors: int, depth: int) -> None:
        self._shape = anchors, depth
        self._most = anchors * waiting(depth)
        self._waiting: list[tuple[Ints, Keys]] = []
        self._count, self._merged = 0, False

    @cached_property
    def keys(self) -> Keys:
        """(anchors, depth): the worst key of an anchor last, the others in any order. Created on first use."""
        return np.full(self._shape, NOTHING)

    def pieces(self, pairs: int) -> Iterator[slice]:
        """Slices of as many pairs as may wait at a time."""
        return (slice(low, low + self._most) for low in range(0, pairs, self._most))

    def add(self, anchor_of: Ints, keys: Keys) -> bool:
        """Let (p,) new pairs compete; returns whether that raised the cut."""
        self._waiting.append((anchor_of, keys))
        self._count += len(keys)
        if self._count < self._most:
            return False
        self.merge()
        return True

    def merge(self) -> None:
        """Let the waiting pairs compete now."""
        if self._count:
            merge(self.keys, self._waiting)
            self._merged = True
        self._waiting, self._count = [], 0

    def cut(self) -> Floats:
        """(n,): the score that a pair must reach to displace one of the best."""
        return scores_of(self.keys[:, -1])

    def pairs(self) -> list[tuple[Ints, Keys]]:
        """Anchors and keys of all pairs that may be among the best."""
        if not self._merged:
            return self._waiting
        self.merge()
        at, place = np.nonzero(self.keys != NOTHING)
        return [(at, self.keys[at, place])]


def merge(best: Keys, pairs: list[tuple[Ints, Keys]], each: Callable[..., Iterable[object]] = map) -> None:
    """Let pairs compete with the best: (n, depth) keys, the worst key of an anchor last, the others in any order.

    Args:
        best: modified in place.
        pairs: their anchors and keys, (p,) each, none of them among the best yet.
        each: `map`, or that of a thread pool.
    """
    depth = best.shape[1]
    anchor_of, keys = (np.concatenate(column) for column in zip(*pairs, strict=True))
    order, bounds = grouped(anchor_of, len(best))
    keys, counts = keys[order], np.diff(bounds)
    height = max(1, _CELLS // (depth + int(counts.max(initial=0))))

    def compete(low: int) -> None:
        here = slice(low, low + height)
        many = counts[here]
        first, last = bounds[low], bounds[low + len(many)]
        place = np.arange(first, last) - np.repeat(bounds[low : low + len(many)], many)
        table = np.full((len(many), depth + int(many.max())), NOTHING)
        table[:, :depth] = best[here]
        table[np.repeat(np.arange(len(many)), many), depth + place] = keys[first:last]
        table.partition(depth - 1, axis=1)
        best[here] = table[:, :depth]

    list(each(compete, range(0, len(best), height)))
