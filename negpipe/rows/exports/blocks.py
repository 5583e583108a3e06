"""Units in blocks that fit in memory, whatever the number of negatives and the length of a slice.

A block contains complete units, each with at least one positive and one negative: no layout ever gets an
empty list of negatives.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from negpipe.config.schema import Config
from negpipe.data.arrays import Floats, Ints, Mask
from negpipe.data.candidates import Candidates
from negpipe.data.tables import Rows, members
from negpipe.select.selector import Units

Slices = Iterable[tuple[Candidates, Units]]

_DOCUMENTS = 8192  # positives and negatives per block


@dataclass(frozen=True)
class Documents:
    """The positives, or the negatives, of a block's u units.

    Attributes:
        rows: rows of the corpus, ragged by `offsets` (u + 1,), as are the scores.
    """

    corpus: Rows
    rows: Ints
    offsets: Ints
    scores: Floats

    @cached_property
    def ids(self) -> pa.Array:
        return self.corpus.strings("id", self.rows)

    @cached_property
    def texts(self) -> pa.Array:
        return self.corpus.strings("text", self.rows)

    def lists(self, values: list[Any]) -> list[list[Any]]:
        """Values of all documents, one list per unit."""
        return [values[low:high] for low, high in pairwise(self.offsets.tolist())]

    @property
    def id_lists(self) -> list[list[str]]:
        return self.lists(self.ids.to_pylist())

    @property
    def text_lists(self) -> list[list[str]]:
        return self.lists(self.texts.to_pylist())

    @property
    def score_lists(self) -> list[list[float | None]]:
        """Scores for JSON: null if not a number."""
        return self.lists([score if math.isfinite(score) else None for score in self.scores.tolist()])


@dataclass(frozen=True)
class Block:
    """Some units of one slice.

    Attributes:
        anchors: their rows of ingest's anchor table, one per unit.
    """

    anchors: pa.Table
    positives: Documents
    negatives: Documents

    @property
    def ids(self) -> list[str]:
        """Anchor ids, one per unit."""
        return list(self.anchors["id"].to_pylist())

    @property
    def texts(self) -> list[str]:
        """Anchor texts, one per unit."""
        return list(self.anchors["text"].to_pylist())

    def pairs(self) -> tuple[Ints, Ints]:
        """Every (unit, positive): the number of the unit, and the position of the positive in `positives`."""
        count = np.diff(self.positives.offsets)
        return np.repeat(np.arange(len(count)), count), np.arange(len(self.positives.rows))


def has_negatives(ranked: Units, config: Config) -> Mask:
    """(u,) whether a unit has a negative; positives in a ranking are ignored."""
    return ranked.only_negatives().counts > 0


def has_all_negatives(ranked: Units, config: Config) -> Mask:
    """(u,) whether a unit has all requested negatives."""
    return ranked.only_negatives().counts >= config.mining.wanted


def blocks(slices: Slices, corpus: Rows, fewest: int = 1) -> Iterator[Block]:
    """All units with at least `fewest` negatives, in order; positives in a ranking are left out."""
    for _, ranked in slices:
        units = ranked.only_negatives()
        kept = np.flatnonzero(units.counts >= fewest)
        ends = np.cumsum((np.diff(units.positive_offsets) + units.counts)[kept])
        start = 0
        while start < len(kept):
            room = _DOCUMENTS + (ends[start - 1] if start else 0)
            end = max(start + 1, int(np.searchsorted(ends, room, side="right")))
            yield _block(units, kept[start:end], corpus)
            start = end


def _block(units: Units, chosen: Ints, corpus: Rows) -> Block:
    positive, positive_offsets = members(units.positive_offsets, chosen)
    negative, negative_offsets = members(units.negative_offsets, chosen)
    return Block(
        units.anchors.select(["id", "text"]).take(pa.array(units.anchor[chosen])),
        Documents(corpus, units.positives[positive], positive_offsets, units.positive_scores[positive]),
        Documents(corpus, units.negatives[negative], negative_offsets, units.negative_scores[negative]),
    )
