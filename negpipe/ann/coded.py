"""Search with any other FAISS index: it proposes rows, the stored vectors decide.

Guarantees: every score comes from `pair_scores`; the same bytes for any memory and any number of threads, because FAISS
always searches the same small groups of anchors, each in one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from negpipe.ann.factory import inner, read
from negpipe.ann.groups import in_groups
from negpipe.ann.library import faiss, one_thread
from negpipe.ann.pairs import NOTHING, Keys, keys_of, pair_scores, rows_of, scores_of
from negpipe.ann.vectors import Vectors
from negpipe.data.arrays import Floats, Ints
from negpipe.engine.budget import Budget

_ANCHORS = 256
_BLOCK_ROWS, _LEAST_ROWS = 65536, 1024


def open_shards(shards: Sequence[tuple[Path, int]], dimension: int) -> list[tuple[Any, int]]:
    """Open index files, each with its first row.

    Raises:
        DamagedError: see `factory.read`.
    """
    return [(read(path, dimension), first) for path, first in shards]


def effort(index: Any) -> tuple[str, int] | None:
    """FAISS's name of this index's effort parameter, and its maximum; None if it has none."""
    inverted = faiss().try_extract_index_ivf(index)
    if inverted is not None:
        return "nprobe", inverted.nlist
    return ("efSearch", 4096) if isinstance(inner(index), faiss().IndexHNSW) else None


def is_graph(kind: str) -> bool:
    """Whether a factory string describes a graph, whose effort FAISS calls efSearch."""
    return "HNSW" in kind and "IVF" not in kind


def needs(dimension: int, proposed: int, threads: int) -> tuple[int, int]:
    """Bytes that a search takes per anchor, and independently of their number."""
    row = 4 * dimension
    return row + proposed * 24, threads * _ANCHORS * proposed * 40 + _LEAST_ROWS * 2 * row


def search_coded(
    anchors: Floats,
    shards: Sequence[tuple[Any, int]],
    vectors: Vectors,
    depth: int,
    *,
    effort_value: int | None,
    proposed: int,
    budget: Budget,
    progress: Callable[[int], None] = lambda rows: None,
) -> tuple[Ints, Floats]:
    """The best `depth` of the `proposed` rows found by the index.

    Args:
        anchors: (n, d) float32.
        shards: opened indexes, each with its first row.
        vectors: the corpus.
        effort_value: nprobe or efSearch, see `effort`.
        proposed: rows per anchor that are scored exactly, at least `depth`.
        budget: does not affect results.
        progress: called with the number of corpus rows just searched.

    Returns:
        rows (n, depth) int64, -1 where fewer were found; scores (n, depth) float32, -inf there.

    Raises:
        ConfigError: `budget` is too small.
    """
    row = 4 * vectors.dimension
    each, fixed = needs(vectors.dimension, proposed, budget.threads)
    threads = budget.threads

    def search(group: Floats, budget: Budget, progress: Callable[[int], None]) -> tuple[Ints, Floats]:
        best = _proposals(group, shards, effort_value, proposed, threads, progress)
        block_rows = min(_BLOCK_ROWS, _LEAST_ROWS + budget.rows(2 * row, fixed + len(group) * each))
        _rescore(group, vectors, best, block_rows, threads)
        best.partition(depth - 1, axis=1)
        best = np.sort(best[:, :depth], axis=1)
        return rows_of(best), scores_of(best)

    return in_groups(anchors, search, depth, each=each, fixed=fixed, budget=budget, progress=progress, whole=_ANCHORS)


def search_slice(
    anchors: Floats,
    shards: Sequence[tuple[Any, int]],
    vectors: Vectors,
    *,
    effort_value: int | None,
    proposed: int,
    budget: Budget,
) -> Iterator[Keys]:
    """The proposals of `search_coded`: keys of the index's own products and, for the same rows, of their scores.

    Yields:
        (m, 2, proposed) some anchors at a time.

    Raises:
        ConfigError: `budget` is too small.
    """
    row = 4 * vectors.dimension
    each, fixed = needs(vectors.dimension, proposed, budget.threads)
    each += 24 * proposed  # both layers, and a copy
    what = f"searching a slice for {proposed:,} proposals per anchor"
    budget.require(fixed + _ANCHORS * each, what, "lower executor.workers or search.depth, or set index.kind: stream")
    size = min(len(anchors), budget.rows(each, fixed, whole=_ANCHORS))  # complete tiles, see `propose`
    for low in range(0, len(anchors), size):
        group = anchors[low : low + size]
        best = _proposals(group, shards, effort_value, proposed, budget.threads)
        products = best.copy()
        block_rows = min(_BLOCK_ROWS, _LEAST_ROWS + budget.rows(2 * row, fixed + len(group) * each))
        _rescore(group, vectors, best, block_rows, budget.threads)
        yield np.stack((products, best), axis=1)


def _rescore(anchors: Floats, vectors: Vectors, best: Keys, block_rows: int, threads: int) -> None:
    """Replace products by exact scores in (n, proposed) keys."""
    proposed = best.shape[1]
    with ThreadPoolExecutor(threads, initializer=one_thread) as pool:
        for start, block in vectors.blocks(block_rows):

            def rescore(tile: slice, start: int = start, block: Floats = block) -> None:
                keys = best[tile].ravel()
                rows = rows_of(keys)
                pairs = np.flatnonzero((rows >= start) & (rows < start + len(block)))
                row_of = rows[pairs]
                scores = pair_scores(anchors[tile], pairs // proposed, block, row_of - start)
                keys[pairs] = keys_of(scores, row_of)
                best[tile] = keys.reshape(best[tile].shape)

            list(pool.map(rescore, _tiles(anchors)))
            del block, rescore  # the next block takes their place


def propose(
    anchors: Floats,
    shards: Sequence[tuple[Any, int]],
    *,
    effort_value: int | None,
    proposed: int,
    budget: Budget,
) -> Iterator[tuple[slice, Ints]]:
    """The rows found by the index, in its order, -1 if there are no more: (m, proposed), some anchors at a time.

    `search_coded` returns the best of the first ones, so one search gives the result for any number of proposals.

    Raises:
        ConfigError: `budget` is too small.
    """
    each, fixed = proposed * 64, budget.threads * _ANCHORS * proposed * 40
    check_tuning(proposed, budget)
    size = budget.rows(each, fixed, whole=_ANCHORS)  # complete tiles, or the groups would differ
    for low in range(0, len(anchors), size):
        here = slice(low, low + size)
        best = _proposals(anchors[here], shards, effort_value, proposed, budget.threads)
        best.sort(axis=1)
        yield here, rows_of(best)


def check_tuning(proposed: int, budget: Budget) -> None:
    """Check that so many proposals per anchor fit into memory.

    Raises:
        ConfigError: they do not.
    """
    least = (budget.threads * 40 + 64) * _ANCHORS * proposed
    remedy = "lower executor.workers or search.depth, or set index.kind: stream"
    budget.require(least, f"tuning this index to {proposed:,} proposals per anchor", remedy)


def _tiles(anchors: Floats) -> list[slice]:
    return [slice(low, low + _ANCHORS) for low in range(0, len(anchors), _ANCHORS)]


def _proposals(
    anchors: Floats,
    shards: Sequence[tuple[Any, int]],
    effort_value: int | None,
    proposed: int,
    threads: int,
    progress: Callable[[int], None] = lambda rows: None,
) -> Keys:
    """(n, proposed) keys of the rows found by the index, by its own products, in any order."""
    best = np.full((len(anchors), proposed), NOTHING)
    with ThreadPoolExecutor(threads, initializer=one_thread) as pool:
        for index, first in shards:
            knob = effort(index)
            if knob and effort_value:
                faiss().ParameterSpace().set_index_parameter(index, knob[0], effort_value)

            def propose(tile: slice, index: Any = index, first: int = first) -> None:
                products, rows = index.search(anchors[tile], min(proposed, index.ntotal))
                keys = keys_of(products.ravel(), first + rows.ravel()).reshape(rows.shape)
                keys[rows < 0] = NOTHING
                table = np.concatenate((best[tile], keys), axis=1)
                table.partition(proposed - 1, axis=1)
                best[tile] = table[:, :proposed]

            list(pool.map(propose, _tiles(anchors)))
            progress(index.ntotal)
    return best
