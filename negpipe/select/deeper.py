"""Adaptive depth: anchors that lack negatives are searched again, deeper, before other remedies.

The search is exact, over the stored vectors, and doubles the depth until an anchor lacks nothing, its
limit is reached, or deeper candidates cannot help. The result does not depend on threads or memory.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from negpipe import ann
from negpipe.ann import groups
from negpipe.config.schema import Config
from negpipe.data import candidates
from negpipe.data.arrays import Floats, Ints
from negpipe.data.candidates import CELLS, Candidates, Deeper
from negpipe.data.tables import open_table
from negpipe.engine.budget import Budget
from negpipe.errors import count_of
from negpipe.select.selector import PartFiles, Selector, rows_of

_CELL = 64  # bytes per candidate of the anchors that are searched together


def limit(config: Config, rows: int) -> int:
    """The maximum depth to which anchors may be searched again; 0 if that would change nothing.

    Args:
        config: a resolved config.
        rows: number of documents that can be candidates.
    """
    mining = config.mining
    if (
        mining.score != candidates.DENSE
        or mining.rank_over == "raw"
        or mining.depth
        or not mining.num_negatives
        or config.depth >= rows
    ):
        return 0
    return min(mining.max_depth or 0, rows)


def check_memory(anchors: int, rows: int, dimension: int, deepest: int, budget: Budget) -> None:
    """Check that so many anchors of a part can be searched again.

    Raises:
        ConfigError: they do not fit.
    """
    half = budget.share(0.5)
    each, fixed = ann.exact.needs(rows, dimension, deepest, half)
    remedy = "lower executor.workers, or set mining.max_depth: 0"
    together = min(anchors, _together(deepest, budget)[1])
    groups.check(together, deepest, each=each, fixed=fixed, budget=half, remedy=remedy)


def _together(deepest: int, budget: Budget) -> tuple[int, int]:
    """Anchors per group, and anchors searched together: as many groups as fit."""
    size = max(1, CELLS // deepest)
    return size, max(size, budget.share(0.5).rows(_CELL * deepest))


def deepen(
    selector: Selector,
    part: PartFiles,
    documents: ann.Vectors,
    deepest: int,
    *,
    budget: Budget,
    progress: Callable[[str], None] = lambda note: None,
    checkpoints: Callable[[str], Path] | None = None,
) -> Iterator[Deeper]:
    """Deeper candidates for the anchors of a part that need them, in the form accepted by `candidates.read`.

    Args:
        selector: determines which anchors lack negatives.
        part: the files of the anchors, their candidates and their vectors.
        documents: the vectors of the documents that can be candidates.
        deepest: the maximum depth.
        budget: as many anchors as fit are searched together. Does not affect results.
        progress: called with a note on the progress of a search.
        checkpoints: returns the path of a search's checkpoint, by name; None: no checkpoints.

    Raises:
        ConfigError: `budget` is too small.
        DamagedError: a file is incomplete.
    """
    half = budget.share(0.5)
    size, together = _together(deepest, budget)
    began = time.monotonic()
    table, vectors = open_table(part.anchors), ann.open_parts([part.vectors])
    waiting: list[tuple[Ints, Candidates]] = []
    none = np.empty(0, np.int64)

    def search(anchors: Ints, depth: int) -> tuple[Ints, Floats]:
        each, fixed = ann.exact.needs(documents.rows, documents.dimension, depth, half)
        seen = 0

        def tell(rows: int) -> None:
            nonlocal seen
            seen += rows
            lacking = count_of(len(anchors), "anchor lacks", "anchors lack")
            progress(f"{lacking} negatives, searching to depth {depth:,}: {seen / documents.rows:.0%}")

        def search_some(some: Ints, budget: Budget, progress: Callable[[int], None]) -> tuple[Ints, Floats]:
            who = hashlib.sha256(some.tobytes()).hexdigest()[:12]  # The groups depend on memory.
            checkpoint = ann.Checkpoint(checkpoints(f"{who}-{depth}"), since=began) if checkpoints else None
            found = ann.search_exact(
                vectors.take(some),
                documents,
                depth,
                positives=(none, none),
                budget=budget,
                progress=progress,
                checkpoint=checkpoint,
            )
            return found.rows, found.scores

        return groups.in_groups(anchors, search_some, depth, each=each, fixed=fixed, budget=half, progress=tell)

    def searched() -> Iterator[Deeper]:
        found = candidates.joined([piece for _, piece in waiting])
        anchors = np.concatenate([numbers for numbers, _ in waiting])
        texts = table.take(pa.array(anchors))
        found, depths = _deepened(selector, texts, found, deepest, lambda at, depth: search(anchors[at], depth))
        first = 0
        for numbers, _ in waiting:
            here = slice(first, first + len(numbers))
            depth = int(depths[here].max())
            yield Deeper(numbers, found.rows[here, :depth], found.scores[here, :depth])
            first = here.stop

    for piece in candidates.read(part.candidates, table["id"], depth=selector.depth):
        if piece.rows.shape[1] >= deepest:
            return
        short = selector.short(rows_of(table, piece.anchors), piece)
        # Groups depend only on the anchors, so that the result does not depend on memory.
        for low in range(0, len(short), size):
            group = short[low : low + size]
            if sum(len(numbers) for numbers, _ in waiting) + len(group) > together:
                yield from searched()
                waiting = []
            waiting.append((piece.anchors[group], piece.take(group)))
    if waiting:
        yield from searched()


def _deepened(
    selector: Selector,
    anchors: pa.Table,
    found: Candidates,
    deepest: int,
    search: Callable[[Ints, int], tuple[Ints, Floats]],
) -> tuple[Candidates, Ints]:
    """The results of some anchors, padded to one width, and the depth to which each was searched."""
    count, depth = found.rows.shape
    depths = np.full(count, depth)
    waiting = np.arange(count)
    step = max(1, CELLS // deepest)
    while len(waiting) and depth < deepest:
        depth = min(2 * depth, deepest)
        found = found.deepened(Deeper(waiting, *search(waiting, depth)))
        depths[waiting] = depth
        slices = [waiting[low : low + step] for low in range(0, len(waiting), step)]
        waiting = np.concatenate(
            [some[selector.short(anchors.take(pa.array(some)), found.take(some))] for some in slices]
        )
    return found, depths
