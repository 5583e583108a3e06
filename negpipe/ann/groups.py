"""Searches anchors in groups if all at once would not fit into memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from negpipe.data.arrays import Floats, Ints
from negpipe.engine.budget import Budget

Progress = Callable[[int], None]
Search = Callable[[Any, Budget, Progress], tuple[Ints, Floats]]


def in_groups(
    anchors: Floats | Ints,
    search: Search,
    depth: int,
    *,
    each: int,
    fixed: int,
    budget: Budget,
    progress: Progress,
    whole: int = 1,
) -> tuple[Ints, Floats]:
    """Rows and scores of all anchors, searching as many at a time as fit.

    Args:
        anchors: (n, d) vectors, or (n,) numbers by which the search finds them.
        search: searches some anchors within a budget; calls its progress with the corpus rows just searched.
        depth: rows per anchor.
        each, fixed: bytes it needs per anchor, and independently of their number.
        budget: includes the results of all anchors.
        whole: number of anchors that must be searched together, if there are that many.
        progress: called with rows of the corpus, until all rows have been searched for all anchors.

    Raises:
        ConfigError: not even that many fit.
    """
    check(len(anchors), depth, each=each, fixed=fixed, budget=budget, whole=whole)
    budget = budget.without(kept(len(anchors), depth))
    size = max(1, min(len(anchors), budget.rows(each, fixed, whole=whole)))
    searched = 0

    def share(rows: int) -> None:
        nonlocal searched
        before, searched = searched // len(anchors), searched + rows * len(group)
        progress(searched // len(anchors) - before)

    rows, scores = np.empty((len(anchors), depth), np.int64), np.empty((len(anchors), depth), np.float32)
    for low in range(0, len(anchors), size):
        here = slice(low, low + size)
        group = anchors[here]
        rows[here], scores[here] = search(group, budget, share)
    return rows, scores


def check(
    anchors: int,
    depth: int,
    *,
    each: int,
    fixed: int,
    budget: Budget,
    whole: int = 1,
    remedy: str = "lower executor.workers or search.depth, or set index.kind: stream",
) -> None:
    """Check that some group of so many anchors fits; see `in_groups`.

    Raises:
        ConfigError: none fits.
    """
    least = kept(anchors, depth) + fixed + each * max(1, min(whole, anchors))
    budget.require(least, f"searching {anchors:,} anchors to depth {depth:,}", remedy)


def kept(anchors: int, depth: int) -> int:
    """Bytes of the results of all anchors."""
    return 12 * anchors * depth
