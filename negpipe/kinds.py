"""Which index `index.kind: auto` means: a pure function of the sizes of the job, never of the machine."""

from __future__ import annotations

import math

_ROWS_A_LIST = 39  # FAISS wants as many to train on
_SHARE = 0.25  # of the work of exact search that the lists probed take, at depth / rows = 1 / 300
_FIXED = 0.02  # of exact search: the cut, the merges


def choose(rows: int, dimension: int, anchors: int, depth: int) -> tuple[str, str]:
    """An index kind and the reason.

    Args:
        rows: documents. dimension: of their vectors. anchors: how many search. depth: candidates an anchor.

    The costs are in floating-point operations of matrix products, which is where the time goes. What share of the
    corpus has to be probed for a recall of 0.98 was measured on sentence embeddings (scripts/bench_search.py).
    """
    lists = 2 ** round(math.log2(max(2.0, 2 * math.sqrt(rows))))
    exact = 2.0 * rows * anchors * dimension
    share = min(1.0, _SHARE * (300 * depth / rows) ** 0.5)
    trained = 2.0 * min(rows, 2 * _ROWS_A_LIST * lists) * lists * dimension * 10
    assigned = 2.0 * rows * lists * dimension
    measured = 2.0 * rows * min(anchors, 1000) * dimension
    approximate = trained + assigned + measured + exact * (share + _FIXED)
    kind = f"IVF{lists},Flat"
    ratio = exact / approximate if approximate else 1.0
    if rows < _ROWS_A_LIST * lists or ratio < 2:
        return "stream", f"exact search costs little here: {kind} would be {ratio:.1f} times as fast with its building"
    return kind, f"an estimated {ratio:.1f} times as fast as exact search, its building included"
