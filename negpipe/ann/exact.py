"""Exact nearest neighbours by inner product, streamed from files in bounded memory.

Guarantees: every score that leaves this module comes from `pair_scores`, which gives the same bits for a pair in every
call; candidates are the true top by (-score, row), including ties of any size; so results are the same bytes for any
block size, memory budget and thread count, and for float16 parts or the float32 flat file made from them.

How: `products` finds which rows of a block of the corpus may reach an anchor's cut (the worst of its best so far), and
`pair_scores` scores them while the block is in memory. At the start, the cut is estimated from a sample of the first
block; if too few rows reach an anchor's estimate, that block is searched again for it.
"""

from __future__ import annotations

import logging
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from negpipe.ann.pairs import Best, Keys, keys_of, pair_scores, rows_of, scores_of, waiting
from negpipe.ann.products import STRIP, Arithmetic, Operand, Products, arithmetic, floors, pool
from negpipe.ann.vectors import READ_ROWS, Held, Vectors
from negpipe.data.arrays import Floats, Ints
from negpipe.data.npy import BROKEN
from negpipe.engine.budget import Budget
from negpipe.errors import ConfigError, DamagedError, StorageError
from negpipe.store.files import publish

logger = logging.getLogger(__name__)

_BLOCK_ROWS = 65536  # maximum rows of a block
_SAMPLE_ROWS = 8192  # rows of the first block used for the estimate
_TOO_LONG = "the vector is not finite, or too long for its products. Run `negpipe encode` again"


@dataclass(frozen=True)
class Found:
    """The top of n anchors by (-score, row), and the scores of known pairs."""

    rows: Ints  # (n, depth), -1 beyond the corpus
    scores: Floats  # (n, depth), -inf beyond the corpus
    positive_scores: Floats  # (p,)


@dataclass
class Checkpoint:
    """A file that a search writes every `seconds` (if these have passed, at its end too) and resumes from.

    A damaged or foreign file is ignored; without room for it, the search continues without.

    Attributes:
        since: start of the interval; several searches may share it.
        written: whether this process has written it.
    """

    path: Path
    seconds: float = 300.0
    since: float = field(default_factory=time.monotonic)
    written: bool = field(default=False, init=False)

    def due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() - self.since >= self.seconds

    def save(self, rows: int, best: list[Keys], positive_scores: Floats) -> None:
        """Write the state after the first `rows` rows of the corpus."""
        kept = np.concatenate(best)

        def write(file: BinaryIO) -> None:
            np.savez(file, rows=np.int64(rows), best=kept, positive_scores=positive_scores)

        self.since, self.written = time.monotonic(), True
        try:
            publish(self.path.parent, self.path.name, write, kept.nbytes + positive_scores.nbytes)
        except StorageError as error:
            logger.warning("cannot write a checkpoint: %s", error)

    def load(self, best: list[Keys], positives: int) -> tuple[int, Floats] | None:
        """Fill in the best keys; return rows searched and positives' scores. None if there is nothing to resume."""
        try:
            with np.load(self.path, allow_pickle=False) as kept:
                rows, keys, scores = int(kept["rows"]), kept["best"], kept["positive_scores"]
        except (*BROKEN, KeyError, zipfile.BadZipFile, zlib.error):
            return None
        ends = np.cumsum([len(one) for one in best])
        if scores.shape != (positives,) or not best or keys.shape != (ends[-1], best[0].shape[1]):
            return None
        for one, found in zip(best, np.split(keys, ends[:-1]), strict=True):
            one[:] = found
        return rows, scores


def search_exact(
    anchors: Floats,
    vectors: Vectors | Held,
    depth: int,
    *,
    positives: tuple[Ints, Ints],
    candidates: int | None = None,
    budget: Budget,
    progress: Callable[[int], None] = lambda rows: None,
    checkpoint: Checkpoint | None = None,
) -> Found:
    """The `depth` best rows of every anchor, and the scores of its positives.

    Args:
        anchors: (n, d) float32.
        vectors: the corpus, fewer than 2**32 - 1 rows.
        positives: (p,) int64 anchor and (p,) int64 corpus row of each known pair.
        candidates: only rows before this one can be among the best, later ones only have positives' scores;
            None: all can.
        budget: its memory includes the results; one extra thread reads ahead. Does not affect results.
        progress: called after each block with the number of corpus rows just searched.
        checkpoint: stores and restores the state of a long search; for these anchors and vectors only.

    Raises:
        ConfigError: `budget` is too small.
        DamagedError: a vector is not finite, or a file cannot be read to its end.
    """
    anchors = np.ascontiguousarray(anchors, np.float32)
    if len(anchors) and anchors.shape[1] != vectors.dimension:
        raise DamagedError(f"anchors have dimension {anchors.shape[1]}, the corpus {vectors.dimension}")
    usable = np.isfinite(np.einsum("ij,ij->i", anchors, anchors))
    if not usable.all():
        raise DamagedError(f"anchor {int(np.argmin(usable))}: {_TOO_LONG}")
    if vectors.rows >= 2**32 - 1:
        raise ConfigError(f"exact search supports fewer than 2**32 - 1 rows, the corpus has {vectors.rows}")
    anchor_of, row_of = positives
    positive_scores = np.full(len(row_of), -np.inf, np.float32)
    numbers = arithmetic(float(len(anchors)) * vectors.rows * vectors.dimension, budget)
    count, block_rows, _ = layout(len(anchors), vectors.rows, vectors.dimension, depth, budget)
    block_rows = min(block_rows, numbers.rows(len(anchors), vectors.dimension))
    buffers = [np.empty((block_rows, vectors.dimension), np.float32) for _ in range(2)]
    last = vectors.rows if candidates is None else candidates
    tiles = [_Tile(part, depth, numbers) for part in np.array_split(anchors, count)] if count else []
    searched = 0
    if checkpoint and (state := checkpoint.load([tile.best.keys for tile in tiles], len(row_of))):
        searched, positive_scores = state
        progress(searched)
    # No block straddles the border `last`.
    starts = [*range(searched, last, block_rows), *range(max(searched, last), vectors.rows, block_rows)]
    ends = [*starts[1:], vectors.rows]

    def load(number: int) -> _Block:
        return _Block.load(vectors, starts[number], buffers[number % 2][: ends[number] - starts[number]], numbers)

    def score_positives(block: _Block) -> None:
        pairs = np.flatnonzero((row_of >= block.first) & (row_of < block.first + len(block.vectors)))
        positive_scores[pairs] = pair_scores(anchors, anchor_of[pairs], block.vectors, row_of[pairs] - block.first)

    with pool(numbers, 1) as reader, pool(numbers, budget.threads) as computing:
        ahead = reader.submit(load, 0) if starts else None
        for number in range(len(starts)):
            assert ahead is not None
            block = ahead.result()
            ahead = reader.submit(load, number + 1) if number + 1 < len(starts) else None
            work = [computing.submit(tile.search, block) for tile in tiles if block.first < last]
            work.append(computing.submit(score_positives, block))
            for done in work:
                done.result()
            progress(len(block.vectors))
            if checkpoint and number + 1 < len(starts) and checkpoint.due():
                checkpoint.save(ends[number], [tile.best.keys for tile in tiles], positive_scores)
        if checkpoint and starts and (searched or checkpoint.written or checkpoint.due()):
            checkpoint.save(vectors.rows, [tile.best.keys for tile in tiles], positive_scores)
        rows = np.empty((len(anchors), depth), np.int64)
        scores = np.empty((len(anchors), depth), np.float32)
        first = 0
        for tile in tiles:
            here = slice(first, first + len(tile.anchors))
            rows[here], scores[here] = tile.result()
            first = here.stop
    return Found(rows, scores, positive_scores)


def _scratch(depth: int) -> int:
    """Bytes per anchor to search a block: products of a strip and of the sample, pairs, a merge."""
    return 13 * STRIP + 4 * _SAMPLE_ROWS + 80 * waiting(depth)


def layout(anchors: int, rows: int, dimension: int, depth: int, budget: Budget) -> tuple[int, int, int]:
    """Number of tiles, rows per block, and total bytes of results, two blocks and every thread's scratch memory.

    Raises:
        ConfigError: they do not fit.
    """
    threads = budget.threads
    scratch = threads * _scratch(depth)
    width = min(STRIP, max(1, budget.memory // (4 * scratch)))
    # The same number of tiles per thread, or some threads would be idle at the end of each block.
    tiles = min(anchors, -(-anchors // (width * threads)) * threads)
    fixed = anchors * (depth * 20 + dimension * 6) + scratch * -(-anchors // max(1, tiles))
    row = 2 * (6 * dimension + 16)
    budget.require(
        fixed + min(READ_ROWS, rows) * row,
        f"searching {anchors:,} anchors to depth {depth:,}",
        "lower executor.workers, resources.cpus or search.depth",
    )
    block_rows = max(1, min(_BLOCK_ROWS, rows, budget.rows(row, fixed)))
    return tiles, block_rows, fixed + block_rows * row


def needs(rows: int, dimension: int, depth: int, budget: Budget) -> tuple[int, int]:
    """Bytes that a search takes per anchor, and independently of their number.

    `layout` takes scratch for as many anchors as fit into a quarter of the memory, and for no more than there are:
    of these two bounds, this uses the one that lets more anchors be searched at a time.
    """
    each, scratch = depth * 20 + dimension * 6, budget.threads * _scratch(depth)
    block = min(READ_ROWS, rows) * 2 * (6 * dimension + 16)
    bounds = (each, block + max(scratch, budget.memory // 4)), (each + scratch, block)
    return max(bounds, key=lambda bound: (budget.memory - bound[1]) // bound[0])


@dataclass(frozen=True)
class _Block:
    """Consecutive rows of the corpus."""

    first: int
    vectors: Floats
    operand: Operand
    longest: float
    error: float

    @classmethod
    def load(cls, source: Vectors | Held, first: int, vectors: Floats, numbers: Arithmetic) -> _Block:
        """Fill `vectors` with rows starting at `first`."""
        source.read(first, vectors)
        operand = numbers.operand(vectors)
        if not np.isfinite(operand.lengths).all():
            place = source.place(first + int(np.flatnonzero(~np.isfinite(operand.lengths))[0]))
            raise DamagedError(f"{place}: {_TOO_LONG}")
        return cls(first, vectors, operand, operand.lengths.max(initial=0.0), operand.errors.max(initial=0.0))


class _Tile:
    """Up to `STRIP` anchors and the best rows found for each so far."""

    def __init__(self, anchors: Floats, depth: int, numbers: Arithmetic) -> None:
        self.anchors, self._depth, self._numbers = anchors, depth, numbers
        self.best = Best(len(anchors), depth)
        self._operand = numbers.operand(anchors)

    def search(self, block: _Block) -> None:
        """Let the rows of a block compete."""
        products = Products(self._numbers, len(self.anchors))
        everybody, cut = np.arange(len(self.anchors)), self.best.cut()
        unknown = np.isneginf(cut)
        if not unknown.any():
            self._sweep(products, block, everybody, cut)
            return
        before = self.best.keys.copy()
        sample = block.operand[:: max(4, -(-len(block.vectors) // _SAMPLE_ROWS))]
        guess = np.where(unknown, products.guess(self._operand, sample, self._depth, len(block.vectors)), cut)
        self._sweep(products, block, everybody, guess)
        # For those that it proves, all rows that reach the cut also reach the guess.
        unproven = np.flatnonzero(self.best.cut() < guess)
        if len(unproven):
            cut = self.best.cut()[unproven]
            self.best.keys[unproven] = before[unproven]
            self._sweep(products, block, unproven, cut)

    def result(self) -> tuple[Ints, Floats]:
        """Rows and scores, (w, depth) each, in order."""
        self.best.keys.sort(axis=1)
        return rows_of(self.best.keys), scores_of(self.best.keys)

    def _sweep(self, products: Products, block: _Block, chosen: Ints, cut: Floats) -> None:
        """Let the rows whose scores may reach `cut` compete for the chosen anchors."""
        anchors = self._numbers.take(self._operand, chosen)
        floor = floors(self._numbers, cut, anchors, block.longest, block.error)
        for start in range(0, len(block.vectors), self._numbers.strip):
            strip = slice(start, start + self._numbers.strip)
            for anchor_of, row_of in products.reaching(floor, anchors, block.operand[strip]):
                pairs = chosen[anchor_of]
                for few in self.best.pieces(len(row_of)):
                    scores = pair_scores(self.anchors, pairs[few], block.vectors[strip], row_of[few])
                    if self.best.add(pairs[few], keys_of(scores, block.first + start + row_of[few])):
                        reached = np.maximum(cut, self.best.cut()[chosen])
                        floor = floors(self._numbers, reached, anchors, block.longest, block.error)
        self.best.merge()
