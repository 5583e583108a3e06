"""Random negatives: rows of the corpus drawn by hash, independent of parts, slices and workers.

Every anchor has its sequence of draws, which depends only on the seed, the anchor and the size of the corpus; a unit
gets the first draws that are neither barred nor repeated.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from negpipe.data.arrays import Hashes, Ints, Mask
from negpipe.select import rules

_SPARE = 16  # initial draws beyond twice the wanted number
_FEW = 18  # rows of a corpus in which so many draws would mostly be repeats
_CELLS = 2**20  # draws at a time


def draw(
    seed: int, anchors: Hashes, wanted: Ints, corpus: int, barred: Callable[[Ints, Ints], Mask]
) -> tuple[Ints, Ints]:
    """Random rows for every unit.

    Args:
        seed: any integer.
        anchors: (u,) hash of each unit's anchor.
        wanted: (u,) number of rows for each unit.
        corpus: number of rows; if too small for a unit, the unit gets all rows that are not barred.
        barred: (m,) units and (m, w) rows → (m, w), whether a row is barred for a unit.

    Returns:
        rows in drawing order, ragged by offsets (u + 1,).
    """
    drawn = [np.empty(0, np.int64)] * len(wanted)
    pending = np.flatnonzero(wanted > 0)
    width, longest = 2 * int(wanted.max(initial=0)) + _SPARE, _replaced(corpus) + corpus
    while len(pending):
        width = min(width, longest)
        open_ends = []
        step = max(1, _CELLS // max(1, width))
        for start in range(0, len(pending), step):
            units = pending[start : start + step]
            # The number of draws does not affect results: more draws only continue the sequence.
            rows = _sequence(seed, anchors[units], width, corpus)
            good = ~barred(units, rows) & ~_repeated(rows)
            taken = good & (np.cumsum(good, axis=1) <= wanted[units, None])
            done = (taken.sum(axis=1) == wanted[units]) | (width == longest)
            for unit, own, kept in zip(units[done], rows[done], taken[done], strict=True):
                drawn[unit] = own[kept]
            open_ends.append(units[~done])
        pending = np.concatenate(open_ends)
        width *= 4
    offsets = np.concatenate([[0], np.cumsum([len(rows) for rows in drawn])]).astype(np.int64)
    return np.concatenate([np.empty(0, np.int64), *drawn]), offsets


def _replaced(corpus: int) -> int:
    """Number of draws with replacement at the start of every sequence."""
    return 0 if corpus <= _FEW else corpus


def _sequence(seed: int, anchors: Hashes, width: int, corpus: int) -> Ints:
    """The first `width` draws of each anchor: some with replacement, then every row once in random order."""
    replaced = min(width, _replaced(corpus))
    every = np.arange(corpus if width > replaced else replaced, dtype=np.uint64)
    uniform = rules.uniform(seed, anchors, np.broadcast_to(every, (len(anchors), len(every))))
    draws = np.floor(uniform[:, :replaced] * corpus).astype(np.int64)
    if width == replaced:
        return draws
    order = np.argsort(uniform, axis=1, kind="stable")[:, : width - replaced]
    return np.concatenate([draws, order], axis=1)


def _repeated(rows: Ints) -> Mask:
    """Whether a row already occurs further left."""
    order = np.argsort(rows, axis=1, kind="stable")
    ordered = np.take_along_axis(rows, order, axis=1)
    repeated = np.zeros(rows.shape, np.bool_)
    np.put_along_axis(repeated, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return repeated
