"""Exact nearest neighbours by inner product, streamed from files in bounded memory.

Guarantees: every score that leaves this module comes from `pair_scores`, which gives the same bits for a pair whoever
asks; candidates are the true top by (-score, row), ties of any size included; so results are the same bytes for any
block size, memory budget and thread count, and for float16 parts or the float32 flat file made from them.

How: FAISS only proposes, a few rows more than are wanted from each block of the corpus, and `pair_scores` scores them
while the block is in memory. The errors of both have a proven bound: where the last row proposed lies below an
anchor's cut by more than that bound, no other row of the block can belong to its top; elsewhere more are proposed.
"""

from __future__ import annotations

import math
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from negpipe.ann.library import faiss, one_thread
from negpipe.ann.pairs import NOTHING, Keys, keys_of, pair_scores, product_below, rounding, rows_of, scores_of
from negpipe.ann.vectors import READ_ROWS, Floats, Held, Ints, Vectors
from negpipe.errors import ConfigError, DamagedError
from negpipe.storage import publish

_ANCHORS = 1024  # at most, of one search: large enough for its speed
_BLOCK_ROWS = 131072  # at most, at a time: in small blocks FAISS spends its time on collecting the first few
_SPARE = 16  # proposed beyond the depth, so that rounding leaves the last one behind the cut


@dataclass(frozen=True)
class Found:
    """The top of n anchors by (-score, row), and the scores of known pairs."""

    rows: Ints  # (n, depth), -1 beyond the corpus
    scores: Floats  # (n, depth), -inf beyond the corpus
    positive_scores: Floats  # (p,)


@dataclass
class Checkpoint:
    """A file that a search writes every `seconds` and goes on from; damaged or foreign, it is ignored."""

    path: Path
    seconds: float = 300.0
    _last: float = field(default_factory=time.monotonic)

    def due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() - self._last >= self.seconds

    def save(self, rows: int, best: list[Keys], positive_scores: Floats) -> None:
        """Write what is known after the first `rows` rows of the corpus."""
        kept = np.concatenate(best)

        def write(file: BinaryIO) -> None:
            np.savez(file, rows=np.int64(rows), best=kept, positive_scores=positive_scores)

        publish(self.path.parent, lambda _: self.path.name, write, kept.nbytes + positive_scores.nbytes)
        self._last = time.monotonic()

    def load(self, anchors: int, depth: int, positives: int) -> tuple[int, Keys, Floats] | None:
        """Rows searched, the best keys (anchors, depth), positives' scores; None: there is nothing to go on from."""
        try:
            with np.load(self.path, allow_pickle=False) as kept:
                rows, best, scores = int(kept["rows"]), kept["best"], kept["positive_scores"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        fits = best.shape == (anchors, depth) and scores.shape == (positives,)
        return (rows, best, scores) if fits else None


def search_exact(
    anchors: Floats,
    vectors: Vectors | Held,
    depth: int,
    *,
    positives: tuple[Ints, Ints],
    candidates: int | None = None,
    memory: int,
    threads: int,
    progress: Callable[[int], None] = lambda rows: None,
    checkpoint: Checkpoint | None = None,
) -> Found:
    """The `depth` best rows of every anchor, and the scores of its positives.

    Args:
        anchors: (n, d) float32.
        vectors: the corpus, fewer than 2**32 - 1 rows.
        positives: (p,) int64 anchor and (p,) int64 corpus row of each known pair.
        candidates: the rows before this one can be among the best, those after it only have positives' scores;
            None: all can.
        memory: bytes this call may use, its results included; changes no result.
        threads: threads that compute; one more reads ahead. Changes no result.
        progress: called after each block with the number of corpus rows just searched.
        checkpoint: where a long search leaves what it has, and finds it again; of these anchors and vectors alone.

    Raises:
        ConfigError: `memory` does not suffice.
        DamagedError: a vector is not finite, or a file cannot be read to its end.
    """
    anchors = np.ascontiguousarray(anchors, np.float32)
    if len(anchors) and anchors.shape[1] != vectors.dimension:
        raise DamagedError(f"anchors have dimension {anchors.shape[1]}, the corpus {vectors.dimension}")
    if not np.isfinite(anchors).all():
        row = int(np.flatnonzero(~np.isfinite(anchors).all(axis=1))[0])
        raise DamagedError(f"anchor {row}: its vector is not finite. Run `negpipe encode` again")
    if vectors.rows >= 2**32 - 1:
        raise ConfigError(f"exact search takes fewer than 2**32 - 1 rows, the corpus has {vectors.rows}")
    anchor_of, row_of = positives
    positive_scores = np.full(len(row_of), -np.inf, np.float32)
    count, block_rows = _layout(len(anchors), vectors, depth, memory, threads)
    buffers = [np.empty((block_rows, vectors.dimension), np.float32) for _ in range(2)]
    last = vectors.rows if candidates is None else candidates
    tiles = [_Tile(part, depth) for part in np.array_split(anchors, count)] if count else []
    searched = 0
    if checkpoint and (state := checkpoint.load(len(anchors), depth, len(row_of))):
        searched, best, positive_scores = state
        for tile, kept in zip(tiles, np.array_split(best, count), strict=True):
            tile.best = kept.copy()
        progress(searched)
    # No block straddles the border.
    starts = [*range(searched, last, block_rows), *range(max(searched, last), vectors.rows, block_rows)]
    ends = [*starts[1:], vectors.rows]

    def load(number: int) -> _Block:
        return _Block.load(vectors, starts[number], buffers[number % 2][: ends[number] - starts[number]])

    def score_positives(block: _Block) -> None:
        pairs = np.flatnonzero((row_of >= block.first) & (row_of < block.first + len(block.vectors)))
        positive_scores[pairs] = pair_scores(anchors, anchor_of[pairs], block.vectors, row_of[pairs] - block.first)

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(threads, initializer=one_thread) as pool:
        ahead = reader.submit(load, 0) if starts else None
        for number in range(len(starts)):
            assert ahead is not None
            block = ahead.result()
            ahead = reader.submit(load, number + 1) if number + 1 < len(starts) else None
            work = [pool.submit(tile.search, block) for tile in tiles if block.first < last]
            work.append(pool.submit(score_positives, block))
            for done in work:
                done.result()
            progress(len(block.vectors))
            if checkpoint and number + 1 < len(starts) and checkpoint.due():
                checkpoint.save(ends[number], [tile.best for tile in tiles], positive_scores)
        rows = np.empty((len(anchors), depth), np.int64)
        scores = np.empty((len(anchors), depth), np.float32)
        first = 0
        for tile in tiles:
            here = slice(first, first + len(tile.anchors))
            rows[here], scores[here] = tile.result()
            first = here.stop
    return Found(rows, scores, positive_scores)


def _scratch(proposed: int) -> int:
    """Bytes that searching a block takes for each anchor: a strip of products, FAISS's collection, pairs, a merge."""
    return 4096 + 128 * proposed


def _layout(anchors: int, vectors: Vectors | Held, depth: int, memory: int, threads: int) -> tuple[int, int]:
    """Number of tiles and rows of a block, so that results, two blocks and every thread's scratch fit into `memory`."""
    scratch = threads * _scratch(depth + _SPARE)
    width = min(_ANCHORS, max(1, memory // (4 * scratch)))
    # Equally many tiles a thread, or the last ones would leave threads idle at the end of each block.
    tiles = min(anchors, -(-anchors // (width * threads)) * threads)
    fixed = anchors * (depth * 20 + vectors.dimension * 4) + scratch * -(-anchors // max(1, tiles))
    row = 2 * (4 * vectors.dimension + 4)
    least = fixed + min(READ_ROWS, vectors.rows) * row
    if least > memory:
        raise ConfigError(
            f"searching {anchors} anchors to depth {depth} with {threads} threads needs {math.ceil(least / 2**20)} MiB,"
            f" there are {memory // 2**20}: raise resources.memory_budget, or lower resources.cpus or search.depth"
        )
    return tiles, max(1, min(_BLOCK_ROWS, vectors.rows, (memory - fixed) // row))


@dataclass(frozen=True)
class _Block:
    """Consecutive rows of the corpus."""

    first: int
    vectors: Floats
    longest: float  # the largest norm

    @classmethod
    def load(cls, source: Vectors | Held, first: int, vectors: Floats) -> _Block:
        """Fill `vectors` with the rows from `first` on."""
        source.read(first, vectors)
        squares = np.einsum("ij,ij->i", vectors, vectors)
        if not np.isfinite(squares).all():
            place = source.place(first + int(np.flatnonzero(~np.isfinite(squares))[0]))
            raise DamagedError(f"{place}: the vector is not finite. Run `negpipe encode` again")
        return cls(first, vectors, math.sqrt(float(squares.max(initial=0.0))))


@dataclass
class _Tile:
    """Up to `_ANCHORS` anchors and the keys of the best rows each has met so far."""

    anchors: Floats
    depth: int
    best: Keys = field(init=False)  # (w, depth); the worst key last, the others in any order

    def __post_init__(self) -> None:
        self.best = np.full((len(self.anchors), self.depth), NOTHING)
        self.rounding = rounding(self.anchors)

    def search(self, block: _Block) -> None:
        """Let the rows of a block compete."""
        rows = len(block.vectors)
        proposed = min(self.depth + min(_SPARE, self.depth + 1), rows)
        room = len(self.anchors) * _scratch(proposed)
        waiting = np.arange(len(self.anchors))
        while len(waiting):
            chunk = max(1, room // _scratch(proposed))
            unproven = [self._compete(block, waiting[i : i + chunk], proposed) for i in range(0, len(waiting), chunk)]
            waiting = np.concatenate(unproven)
            proposed = min(4 * proposed, rows)

    def result(self) -> tuple[Ints, Floats]:
        """Rows and scores, (w, depth) each, in order."""
        self.best.sort(axis=1)
        return rows_of(self.best), scores_of(self.best)

    def _compete(self, block: _Block, chosen: Ints, proposed: int) -> Ints:
        """Merge the rows FAISS proposes to the chosen anchors; returns the anchors to whom others may belong."""
        best, anchors = self.best[chosen], self.anchors[chosen]
        knn = faiss().knn(anchors, block.vectors, proposed, metric=faiss().METRIC_INNER_PRODUCT)
        products: Floats = knn[0]
        rows: Ints = knn[1]
        anchor_of, column = np.nonzero(products >= self._cut(best, chosen, block)[:, None])
        row_of = rows[anchor_of, column]
        keys = np.full(products.shape, NOTHING)
        keys[anchor_of, column] = keys_of(pair_scores(anchors, anchor_of, block.vectors, row_of), block.first + row_of)
        table = np.concatenate((best, keys), axis=1)
        table.partition(self.depth - 1, axis=1)
        best = table[:, : self.depth]
        proven = products[:, -1] < self._cut(best, chosen, block) if proposed < len(block.vectors) else True
        proven = np.broadcast_to(proven, len(chosen))
        self.best[chosen[proven]] = best[proven]
        return chosen[~proven]

    def _cut(self, best: Keys, chosen: Ints, block: _Block) -> Floats:
        """The product below which a row of the block cannot displace any of the best, or -inf."""
        return product_below(scores_of(best[:, -1]), self.rounding[chosen], block.longest)
