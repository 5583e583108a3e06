"""The index that `index.kind: auto` chooses: a pure function of the sizes of the job, never of the machine."""

from __future__ import annotations

import math

from negpipe.config.executor import DEFAULT_BUDGET
from negpipe.config.schema import Config

ROWS_A_LIST = 39  # with fewer training rows, FAISS warns that its k-means is badly trained
ITERATIONS = 10  # of the k-means for lists, FAISS's default
# Share of the corpus to probe for a recall of 0.98: 0.43 if depth / rows is 211 / 100,000, 0.19 at a tenth of that.
_SHARE, _AT, _FALLS = 0.39, 211 / 100_000, 0.31
_FINER = 0.44  # a quarter less with twice as many lists as 2 * sqrt(rows)
FIXED = 0.03  # share of exact search's time: the cut, the merges


def options(rows: int, dimension: int, depth: int) -> list[tuple[str, int, int, float]]:
    """Approximate kinds that can be built: name, lists, training rows, share of exact search's work."""
    lists = 2 ** round(math.log2(max(2.0, 2 * math.sqrt(rows))))
    while lists > 1 and 2 * trained_on(lists, rows) * dimension * 4 > DEFAULT_BUDGET:
        lists //= 2
    if rows < ROWS_A_LIST * lists:
        return []
    return [(f"IVF{lists},Flat", lists, trained_on(lists, rows), share(rows, depth, lists))]


def trained_on(lists: int, rows: int) -> int:
    """Number of rows that an index with `lists` lists is trained on."""
    return min(rows, max(2 * ROWS_A_LIST * lists, 65536))


def built(rows: int, trained: int, lists: int) -> float:
    """Number of vector products needed to find the lists and to assign every row to one."""
    return float(ITERATIONS * trained + rows) * lists


def share(rows: int, depth: int, lists: int) -> float:
    """Share of the corpus to probe for a recall of 0.98; large for wide windows of small corpora.

    Measured on sentence embeddings (scripts/bench_search.py).
    """
    finer = lists / 2 / math.sqrt(rows)
    return float(min(1.0, _SHARE * (depth / rows / _AT) ** _FALLS * finer**-_FINER))


def choose(rows: int, dimension: int, anchors: int, depth: int) -> tuple[str, str]:
    """An index kind and the reason: the approximate one if it is twice as fast as exact search, including the build.

    Args:
        rows: documents. dimension: of their vectors. anchors: number of anchors. depth: candidates per anchor.
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
    """A resolved config with `index.kind: auto` replaced, and the reason; once the sizes are known."""
    if config.index.kind != "auto":
        return config, ""
    kind, reason = choose(rows, dimension, anchors, min(config.depth, rows))
    index = config.index.model_copy(update={"kind": kind})
    return config.model_copy(update={"index": index}), f"index.kind auto chooses {kind}: {reason}"
