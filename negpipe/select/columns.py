"""Rules by a column: what a candidate must, or must not, have in common with the anchor and its positives.

Columns are those that `data.extra` keeps. They are looked up by row: memory holds only the values of documents being
checked. A null or an empty text equals nothing. `never_same` and `only_same` ask whether any known positive matches,
`where` uses the positive that margins refer to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from negpipe.config.schema import ANCHOR, Mining
from negpipe.data.arrays import Hashes, Ints, Mask
from negpipe.data.tables import EXTRA, hashed
from negpipe.select import rules
from negpipe.select.conditions import Condition, Database, conditions

if TYPE_CHECKING:
    from negpipe.select.filters import Grid, Lookup, Masking


NAMES = ("never_same", "only_same", "where")
"""The rules, as settings and as reasons."""
_CELL, _BLOCK = 64, 2**23  # bytes per pair besides its texts, and of all pairs whose values are in memory at a time


def asked_for(mining: Mining) -> bool:
    """Whether a config sets one of the rules."""
    return any(getattr(mining, name) for name in NAMES)


def never_same(lookup: Lookup) -> Masking | None:
    """Drops documents that share the value of any of the columns."""
    names = lookup.mining.never_same

    def mask(grid: Grid) -> Mask:
        kept = lookup.config.data.extra.queries
        shared = np.zeros(grid.rows.shape, np.bool_)
        for name in names:
            column = EXTRA + name.removeprefix(ANCHOR)
            values = _values(grid, column)
            if not name.startswith(ANCHOR):
                shared |= _of_a_positive(grid, values, column)
            if column.removeprefix(EXTRA) in kept:
                shared |= _of_the_anchor(grid, values, column)
        return shared

    return mask if names else None


def only_same(lookup: Lookup) -> Masking | None:
    """Drops documents that do not share the values of all columns."""
    names = lookup.mining.only_same

    def mask(grid: Grid) -> Mask:
        differs = np.zeros(grid.rows.shape, np.bool_)
        for name in names:
            column = EXTRA + name.removeprefix(ANCHOR)
            same = _of_the_anchor if name.startswith(ANCHOR) else _of_a_positive
            differs |= ~same(grid, _values(grid, column), column)
        return differs

    return mask if names else None


def _values(grid: Grid, column: str) -> Hashes:
    return grid.lookup.corpus.hashes(column, np.maximum(grid.rows, 0))


def _of_a_positive(grid: Grid, values: Hashes, column: str) -> Mask:
    known, offsets = grid.known
    own = grid.lookup.corpus.hashes(column, known)
    ends: Ints = np.concatenate([[0], np.cumsum(own != 0)])[offsets].astype(np.int64)
    return rules.contains(values, own[own != 0], ends, grid.anchor)


def _of_the_anchor(grid: Grid, values: Hashes, column: str) -> Mask:
    own = hashed(grid.anchors[column])[grid.anchor][:, None]
    same: Mask = (values == own) & (own != 0)
    return same


def shares(mining: Mining, score: float, reference: float) -> str:
    """The reason text of `never_same`."""
    return f"shares {' or '.join(mining.never_same)} with a known positive or the anchor (never_same)"


def differs(mining: Mining, score: float, reference: float) -> str:
    """The reason text of `only_same`."""
    return f"does not share {' and '.join(mining.only_same)} (only_same)"


def where(lookup: Lookup) -> Masking | None:
    """Drops documents for which the condition does not hold."""
    return _unless(lookup, conditions(lookup.config))


def where_drawn(lookup: Lookup) -> Masking | None:
    """The same for documents without scores: only those `and`ed conditions that use no score."""
    return _unless(lookup, [one for one in conditions(lookup.config) if not one.scored])


def _unless(lookup: Lookup, asked: Sequence[Condition]) -> Masking | None:
    if not asked:
        return None
    database = Database(lookup.config, asked)
    candidate = database.columns["candidate"].values()

    def mask(grid: Grid) -> Mask:
        line, column = np.nonzero(grid.rows >= 0)
        rows = grid.rows[line, column]
        # Candidates are checked in blocks, to bound the memory of their texts.
        size = sum((lookup.corpus.sizes(name, rows) for name in candidate), np.full(rows.shape, _CELL))
        cuts = np.flatnonzero(np.diff(np.cumsum(size) // _BLOCK)) + 1
        dropped = np.zeros(grid.rows.shape, np.bool_)
        for low, high in pairwise([0, *cuts.tolist(), len(rows)]):
            at = line[low:high], column[low:high]
            dropped[at] = ~_holds(database, grid, *at)
        return dropped

    return mask


def _holds(database: Database, grid: Grid, line: Ints, column: Ints) -> Mask:
    """Whether the conditions hold for some cells of a grid."""
    assert grid.positives is not None
    corpus, (lines, place) = grid.lookup.corpus, np.unique(line, return_inverse=True)
    named, positives = database.columns, grid.positives[lines]
    anchors = grid.anchors.select(list(dict.fromkeys(named["anchor"].values()))).take(pa.array(grid.anchor[lines]))
    of_lines = {
        "anchor": [anchors[name].combine_chunks().dictionary_encode() for name in named["anchor"].values()],
        "positive": corpus.encoded(list(named["positive"].values()), np.maximum(positives, 0)),
    }
    there = {"anchor": None, "positive": positives[place] < 0}
    texts = {side: [one.take(pa.array(place, mask=there[side])) for one in found] for side, found in of_lines.items()}
    texts["candidate"] = corpus.encoded(list(named["candidate"].values()), grid.rows[line, column])
    numbers: dict[str, Callable[[], npt.NDArray[Any]]] = {
        "score": lambda: grid.scores[line, column],
        "rank": lambda: column,
        "positive_score": lambda: grid.references[line],
    }
    return database.hold(len(line), texts, {name: pa.array(numbers[name]()) for name in database.numbers})
