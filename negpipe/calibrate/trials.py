"""What selection is tried on: anchors of which it is known which candidates would be false negatives.

hidden         One positive of an anchor is shown to selection, all others are hidden from it: they are what the
               annotators might have missed. Needs anchors with two positives.
near_anchors   A stand-in: positives of anchors whose vectors are nearly the same. Selection sees all that is known.
second_opinion A stand-in: what another run's model ranks above the positive. Selection sees all that is known.

Copies of a positive, texts that are equal when normalised, are shown and hidden with it. Positives of other
splits are hidden like those of the split, but never shown: they have no stored score.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from negpipe.candidates import Candidates
from negpipe.tables import Rows, members, ragged

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

METHODS = {
    "hidden": "hidden positives: one positive is shown, the anchor's others are hidden and must not be taken",
    "near_anchors": "stand-in, not hidden positives: a negative counts as false if it is a positive of an anchor"
    " with nearly the same vector",
    "second_opinion": "stand-in, not hidden positives: a negative counts as suspect if the second run's model ranks"
    " it above the positive too",
}
_UNITS = 4096  # tried at a time


@dataclass(frozen=True)
class Trials:
    """t trials.

    Attributes:
        anchor: (t,) place of each trial's anchor among all anchors that were handed in together.
        anchors: (t rows) ingest's anchors as selection is to see them.
        found: their candidates.
        suspects: normalised texts (hashes) that would be false negatives, ragged by `offsets` (t + 1,).
    """

    anchor: Ints
    anchors: pa.Table
    found: Candidates
    suspects: npt.NDArray[np.uint64]
    offsets: Ints

    def pieces(self) -> Iterator[Trials]:
        """The same, some at a time."""
        for low in range(0, len(self.anchor), _UNITS):
            yield self.take(np.arange(low, min(low + _UNITS, len(self.anchor))))

    def take(self, wanted: Ints) -> Trials:
        """Some of the trials, ascending."""
        positions, offsets = members(self.offsets, wanted)
        return Trials(
            self.anchor[wanted],
            self.anchors.take(pa.array(wanted)),
            self.found.take(wanted),
            self.suspects[positions],
            offsets,
        )


def hidden(anchors: pa.Table, found: Candidates, corpus: Rows) -> Trials:
    """A trial for every positive of an anchor that has others beside it."""
    owner = np.repeat(np.arange(len(found.rows)), np.diff(found.offsets))
    known, known_offsets = ragged(anchors["known"])
    by_id, _ = ragged(anchors["known_by_id"])
    positions, offsets = members(known_offsets, owner)
    trial = np.repeat(np.arange(len(owner)), np.diff(offsets))
    normalized = corpus.numbers("normalized", known[positions])
    shown = normalized == corpus.numbers("normalized", found.positives)[trial]
    kept = np.flatnonzero(np.bincount(trial[~shown], minlength=len(owner)))

    table = anchors.take(pa.array(owner))
    table = _with_list(table, "known", known[positions], offsets, shown)
    table = _with_list(table, "known_by_id", by_id[positions], offsets, shown)
    suspects, suspect_offsets = normalized[~shown], _filtered(offsets, ~shown)
    shared, shared_offsets = ragged(table["shared"])
    namesake = corpus.numbers("normalized", shared)
    # Who shares the anchor's text may know what is hidden.
    table = _with_list(
        table, "shared", shared, shared_offsets, ~_owned(namesake, shared_offsets, suspects, suspect_offsets)
    )
    alone = Candidates(
        found.rows[owner[kept]],
        found.scores[owner[kept]],
        found.positives[kept],
        np.arange(len(kept) + 1),
        found.positive_scores[kept],
    )
    positions, ends = members(suspect_offsets, kept)
    return Trials(owner[kept], table.take(pa.array(kept)), alone, suspects[positions], ends)


def near_anchors(anchors: pa.Table, found: Candidates, corpus: Rows, positives: Ints, offsets: Ints) -> Trials:
    """A trial for every anchor with a near one that has other positives.

    Args:
        positives: rows of the positives of each anchor's near ones, ragged by `offsets` (n + 1,).
    """
    return _suspecting(anchors, found, corpus, positives, offsets)


def second_opinion(anchors: pa.Table, found: Candidates, corpus: Rows, other: Candidates) -> Trials:
    """A trial for every anchor: suspect is what the other run scores above the anchor's lowest positive."""
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
    """Trials of the wanted anchors, or of those with a suspect; what an anchor is known to have is none."""
    suspects = corpus.numbers("normalized", rows)
    known, known_offsets = ragged(anchors["known"])
    new = ~_owned(suspects, offsets, corpus.numbers("normalized", known), known_offsets)
    ends = _filtered(offsets, new)
    wanted = np.flatnonzero(np.diff(ends)) if wanted is None else wanted
    return Trials(np.arange(len(found.rows)), anchors, found, suspects[new], ends).take(wanted)


def _owned(values: npt.NDArray[np.uint64], offsets: Ints, lists: npt.NDArray[np.uint64], list_offsets: Ints) -> Mask:
    """Whether each value of ragged lists is in the other list of the same owner."""
    _, codes = np.unique(np.concatenate([values, lists]), return_inverse=True)
    stride = int(codes.max(initial=0)) + 1
    owners = (np.repeat(np.arange(len(ends) - 1), np.diff(ends)) * stride for ends in (offsets, list_offsets))
    own, other = (owner + part for owner, part in zip(owners, np.split(codes, [len(values)]), strict=True))
    return np.isin(own, other)


def _filtered(offsets: Ints, keep: Mask) -> Ints:
    """The offsets of ragged lists of which only some values are kept."""
    return np.concatenate([[0], np.cumsum(keep)])[offsets]


def _with_list(table: pa.Table, name: str, values: npt.NDArray[np.generic], offsets: Ints, keep: Mask) -> pa.Table:
    """A table with the kept values of ragged lists as a column."""
    lists = pa.ListArray.from_arrays(pa.array(_filtered(offsets, keep).astype(np.int32)), pa.array(values[keep]))
    return table.set_column(table.schema.get_field_index(name), name, lists)
