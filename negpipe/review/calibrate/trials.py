"""Trials for selection: anchors with known false negatives among their candidates.

hidden         One positive of an anchor is shown to selection, all others are hidden: they stand for what
               annotators may have missed. Needs anchors with two positives.
near_anchors   A stand-in: positives of anchors with nearly the same vector. Selection sees all positives.
second_opinion A stand-in: documents that another run's model ranks above the positive. Selection sees all positives.

Copies of a positive (equal normalised texts) are shown and hidden with it. Positives of other
splits are hidden like those of the split, but never shown, as they have no stored score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from negpipe.data.arrays import Hashes, Ints, Mask
from negpipe.data.candidates import Candidates
from negpipe.data.tables import Rows, members, ragged

METHODS = {
    "hidden": "hidden positives: one positive is shown, the anchor's others are hidden and must not be taken",
    "near_anchors": "stand-in, not hidden positives: a negative counts as false if it is a positive of an anchor"
    " with nearly the same vector",
    "second_opinion": "stand-in, not hidden positives: a negative counts as suspect if the second run's model ranks"
    " it above the positive too",
}
_UNITS = 4096  # trials at a time


@dataclass(frozen=True)
class TrialBlock:
    """Some trials, in memory.

    Attributes:
        anchors: (t rows) ingest's anchors as selection should see them.
        found: their candidates.
        suspects: normalised texts (hashes) that would be false negatives, ragged by `offsets`.
        lists: (t,) the list of each trial.
        shown: (t,) the one that is shown, hence not a suspect; all others are hidden, also from the known positives of
            anchors with the same text. None: nothing is hidden.
    """

    anchors: pa.Table
    found: Candidates
    suspects: Hashes
    offsets: Ints
    lists: Ints
    shown: Hashes | None = None


@dataclass(frozen=True)
class Trials:
    """t trials; memory holds only some at a time, as an anchor may have one per positive.

    Attributes:
        anchor: (t,) index of each trial's anchor among all anchors passed together.
        take: creates some of the trials, ascending.
    """

    anchor: Ints
    take: Callable[[Ints], TrialBlock]

    def blocks(self) -> Iterator[TrialBlock]:
        """All trials, block by block."""
        for low in range(0, len(self.anchor), _UNITS):
            yield self.take(np.arange(low, min(low + _UNITS, len(self.anchor))))


def hidden(anchors: pa.Table, found: Candidates, corpus: Rows) -> Trials:
    """A trial for every positive of an anchor that has other positives."""
    known, offsets = ragged(anchors["known"])
    by_id, _ = ragged(anchors["known_by_id"])
    # Known positives of each anchor by normalised text: copies of the shown one are adjacent.
    texts, code = np.unique(corpus.numbers("normalized", known), return_inverse=True)
    whose = np.repeat(np.arange(len(found.rows)), np.diff(offsets)) * len(texts) + code
    order = np.argsort(whose, kind="stable")
    known, by_id = known[order], by_id[order]
    groups, first = np.unique(whose[order], return_index=True)
    copies = np.append(first, len(known))
    suspects, ends = texts[groups % len(texts)], np.searchsorted(groups, np.arange(len(found.rows) + 1) * len(texts))

    owner = np.repeat(np.arange(len(found.rows)), np.diff(found.offsets))
    kept = np.flatnonzero(np.diff(ends)[owner] > 1)
    owner = owner[kept]

    def take(some: Ints) -> TrialBlock:
        at, positives = owner[some], found.positives[kept[some]]
        shown = corpus.numbers("normalized", positives)
        same, lists = members(copies, np.searchsorted(groups, at * len(texts) + np.searchsorted(texts, shown)))
        table = anchors.drop_columns(["known", "known_by_id"]).take(pa.array(at))
        for name, values in (("known", known), ("known_by_id", by_id)):
            column = pa.ListArray.from_arrays(pa.array(lists.astype(np.int32)), pa.array(values[same]))
            table = table.append_column(name, column)
        scores = found.positive_scores[kept[some]]
        alone = Candidates(
            found.rows[at], found.scores[at], positives, np.arange(len(some) + 1), scores, found.anchors[at]
        )
        return TrialBlock(table, alone, suspects, ends, at, shown)

    return Trials(owner, take)


def near_anchors(anchors: pa.Table, found: Candidates, corpus: Rows, positives: Ints, offsets: Ints) -> Trials:
    """A trial for every anchor with a near anchor that has other positives.

    Args:
        positives: rows of the positives of each anchor's near anchors, ragged by `offsets` (n + 1,).
    """
    return _suspecting(anchors, found, corpus, positives, offsets)


def second_opinion(anchors: pa.Table, found: Candidates, corpus: Rows, other: Candidates) -> Trials:
    """A trial for every anchor: documents that the other run scores above the anchor's lowest positive are suspects."""
    counts = np.diff(other.offsets)
    lowest = np.full(len(counts), np.inf, np.float32)
    np.minimum.at(lowest, np.repeat(np.arange(len(counts)), counts), other.positive_scores)
    above = (other.rows >= 0) & (other.scores > lowest[:, None])
    offsets = np.concatenate([[0], np.cumsum(above.sum(axis=1))])
    every = np.arange(len(found.rows))
    return _suspecting(anchors, found, corpus, other.rows[above], offsets, every)


def _suspecting(
    anchors: pa.Table, found: Candidates, corpus: Rows, rows: Ints, offsets: Ints, wanted: Ints | None = None
) -> Trials:
    """Trials of the wanted anchors, or of those with a suspect; known positives are never suspects."""
    suspects = corpus.numbers("normalized", rows)
    known, known_offsets = ragged(anchors["known"])
    new = ~_owned(suspects, offsets, corpus.numbers("normalized", known), known_offsets)
    suspects, ends = suspects[new], np.concatenate([[0], np.cumsum(new)])[offsets]
    tried = np.flatnonzero(np.diff(ends)) if wanted is None else wanted

    def take(some: Ints) -> TrialBlock:
        at = tried[some]
        return TrialBlock(anchors.take(pa.array(at)), found.take(at), suspects, ends, at)

    return Trials(tried, take)


def _owned(values: npt.NDArray[np.uint64], offsets: Ints, lists: npt.NDArray[np.uint64], list_offsets: Ints) -> Mask:
    """Whether each value of ragged lists is in the other list of the same owner."""
    _, codes = np.unique(np.concatenate([values, lists]), return_inverse=True)
    stride = int(codes.max(initial=0)) + 1
    owners = (np.repeat(np.arange(len(ends) - 1), np.diff(ends)) * stride for ends in (offsets, list_offsets))
    own, other = (owner + part for owner, part in zip(owners, np.split(codes, [len(values)]), strict=True))
    return np.isin(own, other)
