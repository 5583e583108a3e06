"""Which index `index.kind: auto` means: a pure function of the sizes of the job, never of the machine."""

from __future__ import annotations

import math

from negpipe.config.executor import DEFAULT_BUDGET
from negpipe.config.schema import Config

ROWS_A_LIST = 39  # fewer to train on, and FAISS warns that its k-means is badly trained
ITERATIONS = 10  # of the k-means that makes lists, FAISS's number
# Of the corpus that has to be probed for a recall of 0.98: 0.43 where depth / rows is 211 / 100,000, 0.19 at a tenth.
_SHARE, _AT, _FALLS = 0.39, 211 / 100_000, 0.31
_FINER = 0.44  # a quarter less of it where there are twice as many lists as 2 * sqrt(rows)
FIXED = 0.03  # of exact search: the cut, the merges


def options(rows: int, dimension: int, depth: int) -> list[tuple[str, int, int, float]]:
    """Approximate kinds that can be built: name, lists, rows to train on, share of exact search's work."""
    lists = 2 ** round(math.log2(max(2.0, 2 * math.sqrt(rows))))
    while lists > 1 and 2 * trained_on(lists, rows) * dimension * 4 > DEFAULT_BUDGET:
        lists //= 2
    if rows < ROWS_A_LIST * lists:
        return []
    return [(f"IVF{lists},Flat", lists, trained_on(lists, rows), share(rows, depth, lists))]


def trained_on(lists: int, rows: int) -> int:
    """How many of the rows an index with so many lists is trained on."""
    return min(rows, max(2 * ROWS_A_LIST * lists, 65536))


def built(rows: int, trained: int, lists: int) -> float:
    """Products of two vectors that it takes to find lists, and which of them every row belongs to."""
    return float(ITERATIONS * trained + rows) * lists


def share(rows: int, depth: int, lists: int) -> float:
    """Of the corpus that has to be probed for a recall of 0.98; wide windows of small corpora need much of it.

    Measured on sentence embeddings (scripts/bench_search.py).
    """
    finer = lists / 2 / math.sqrt(rows)
    return float(min(1.0, _SHARE * (depth / rows / _AT) ** _FALLS * finer**-_FINER))


def choose(rows: int, dimension: int, anchors: int, depth: int) -> tuple[str, str]:
    """An index kind and the reason: the approximate one where it is twice as fast as exact search, building included.

    Args:
        rows: documents. dimension: of their vectors. anchors: how many search. depth: candidates an anchor.
    """
    exact = 2.0 * rows * anchors * dimension
    best, ratio = "", 0.0
    for name, lists, trained, probed in options(rows, dimension, depth):
        building = 2.0 * dimension * (built(rows, trained, lists) + rows * min(anchors, 1000))
        best, ratio = name, exact / (building + exact * (probed + FIXED))
    if ratio < 2:
        faster = f"{ratio:.1f} times as fast" if ratio > 1 else "no faster"
        why = f"{best} would be {faster}, building included" if best else "the corpus is too small for lists"
        return "stream", f"exact search costs little here: {why}"
    return best, f"about {ratio:.1f} times as fast as exact search, building included"


def decided(config: Config, rows: int, dimension: int, anchors: int) -> tuple[Config, str]:
    """The config with `index.kind: auto` decided, and why; a resolved one, once the sizes are known."""
    if config.index.kind != "auto":
        return config, ""
    kind, reason = choose(rows, dimension, anchors, min(config.depth, rows))
    index = config.index.model_copy(update={"kind": kind})
    return config.model_copy(update={"index": index}), f"index.kind auto chooses {kind}: {reason}"
