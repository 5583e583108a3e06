"""Random negatives: rows of the corpus drawn by hash, independent of parts, slices and workers.

Every anchor has a sequence of draws of its own, which depends on the seed, the anchor and the size of the corpus
alone; a unit gets the first that are not barred and did not come before.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from negpipe.select import rules

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]

_SPARE = 16  # draws beyond twice the wanted number that are looked at first
_FEW = 18  # rows of a corpus of which so many draws would mostly repeat one another
_CELLS = 2**20  # draws at a time


def draw(
    seed: int, anchors: Hashes, wanted: Ints, corpus: int, barred: Callable[[Ints, Ints], Mask]
) -> tuple[Ints, Ints]:
    """Random rows for every unit.

    Args:
        seed: any integer.
        anchors: (u,) hash of each unit's anchor.
        wanted: (u,) how many rows a unit is to get.
        corpus: number of rows; units for which it does not suffice get all that are not barred.
        barred: (m,) units and (m, w) rows → (m, w), whether a row must not be a unit's.

    Returns:
        rows in the order of their drawing, ragged by offsets (u + 1,).
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
            # How many draws are looked at changes nothing: more of them only continue the sequence.
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
    """Draws with replacement at the beginning of every sequence."""
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
    """Whether a row stands further left already."""
    order = np.argsort(rows, axis=1, kind="stable")
    ordered = np.take_along_axis(rows, order, axis=1)
    repeated = np.zeros(rows.shape, np.bool_)
    np.put_along_axis(repeated, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return repeated
