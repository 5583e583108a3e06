"""Adaptive depth: anchors that lack negatives are searched again, deeper, before anything else is done about it.

The search is exact, over the stored vectors, and doubles the depth until an anchor lacks nothing, its
limit is reached, or deeper candidates cannot help. The result does not depend on threads or memory.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from negpipe import ann, candidates
from negpipe.candidates import ROW_GROUP, Candidates, Deeper
from negpipe.config import Config
from negpipe.selection import PartFiles, Selector
from negpipe.tables import open_table


def limit(config: Config, rows: int) -> int:
    """How deep anchors may be searched again; 0 where it would change nothing.

    Args:
        config: a resolved one.
        rows: documents that can be candidates.
    """
    mining = config.mining
    if mining.rank_over == "raw" or mining.depth or not mining.num_negatives or config.depth >= rows:
        return 0
    return min(mining.max_depth or 0, rows)


def deepen(
    selector: Selector, part: PartFiles, passages: ann.Vectors, deepest: int, *, memory: int, threads: int
) -> Deeper | None:
    """Deeper candidates for the anchors of a part that need them.

    Args:
        selector: says who lacks negatives.
        part: where the anchors, their candidates and their vectors are.
        passages: the vectors of the documents that can be candidates.
        deepest: the limit.
        memory: bytes for each search. Changes no result.
        threads: threads that compute. Changes no result.

    Raises:
        ConfigError: `memory` does not suffice.
        DamagedError: a file is not whole.
    """
    table = open_table(part.anchors)
    numbers, pieces, start, depth = [np.empty(0, np.int64)], [], 0, deepest
    for piece in candidates.read(part.candidates, depth=selector.depth):
        depth = piece.rows.shape[1]
        if depth >= deepest:
            return None
        short = selector.short(table.slice(start, len(piece.rows)), piece)
        numbers.append(start + short)
        pieces.append(piece.take(short))
        start += len(piece.rows)
    anchors = np.concatenate(numbers)
    if not len(anchors):
        return None
    found = candidates.joined(pieces)
    vectors = np.load(part.vectors, mmap_mode="r", allow_pickle=False)[anchors].astype(np.float32)
    waiting = np.arange(len(anchors))
    while len(waiting) and depth < deepest:
        depth = min(2 * depth, deepest)
        step = max(1, memory // (2 * (20 * depth + 4 * passages.dimension)))
        for low in range(0, len(waiting), step):
            some = waiting[low : low + step]
            deeper = _search(found.take(some), vectors[some], passages, depth, memory, threads)
            found = found.deepened(Deeper(some, deeper.rows, deeper.scores))
        slices = [waiting[low : low + ROW_GROUP] for low in range(0, len(waiting), ROW_GROUP)]
        waiting = np.concatenate([some[selector.short(table.take(anchors[some]), found.take(some))] for some in slices])
    return Deeper(anchors, found.rows, found.scores)


def _search(
    found: Candidates, vectors: ann.vectors.Floats, passages: ann.Vectors, depth: int, memory: int, threads: int
) -> Candidates:
    none = np.empty(0, np.int64)
    deeper = ann.search_exact(vectors, passages, depth, positives=(none, none), memory=memory, threads=threads)
    return replace(found, rows=deeper.rows, scores=deeper.scores)
