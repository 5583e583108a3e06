"""Negatives known before mining: given by the source, or judged not relevant.

Like random ones, they must pass the document filters, but no cutoffs: a person has judged them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from negpipe.config.schema import Mining
from negpipe.data.arrays import Ints, Mask
from negpipe.data.tables import ragged

GIVEN, JUDGED = 2, 3
"""Indexes of their sources in `selector.SOURCES`."""


class Preferred(NamedTuple):
    """Rows of n anchors' preferred negatives, best first, ragged by `offsets` (n + 1,); sources alike."""

    rows: Ints
    offsets: Ints
    sources: npt.NDArray[np.uint8]

    @property
    def counts(self) -> Ints:
        """(n,) number of them per anchor."""
        return np.diff(self.offsets)

    def instead(self, mining: Mining) -> Ints:
        """(n,) how many of them replace mined ones."""
        if mining.given_negatives != "keep":
            return self.counts
        judged = np.concatenate([[0], np.cumsum(self.sources != GIVEN)])
        return np.diff(judged[self.offsets])


def asked_for(anchors: pa.Table, mining: Mining) -> Preferred:
    """The preferred negatives of ingest's anchors according to the config, in the order of their lists."""
    rows, offsets = ragged(anchors["refused"])
    grades, _ = ragged(anchors["refused_grades"])
    given = np.isnan(grades.astype(np.float64))
    wanted = np.where(given, mining.given_negatives != "ignore", mining.judged != "allow").astype(np.bool_)
    sources = np.where(given, GIVEN, JUDGED).astype(np.uint8)
    return _kept(Preferred(rows, offsets, sources), wanted)


def best(preferred: Preferred, allowed: Mask, ranks: Ints, mining: Mining) -> Preferred:
    """The allowed ones, in order, up to the number that fits.

    Args:
        preferred: preferred negatives of some anchors.
        allowed: those that pass the filters.
        ranks: their raw ranks, -1 beyond the depth.
        mining: with `given_negatives: keep`, all given ones fit, else `num_negatives` in total.
    """
    preferred, ranks = _kept(preferred, allowed), ranks[allowed]
    owner = np.repeat(np.arange(len(preferred.counts)), preferred.counts)
    last = np.where(ranks < 0, np.iinfo(np.int64).max, ranks)
    order = np.lexsort((preferred.rows, last, preferred.sources, owner))
    ordered = preferred._replace(rows=preferred.rows[order], sources=preferred.sources[order])
    counted = np.ones(len(order), np.bool_)
    if mining.given_negatives == "keep":
        counted = ordered.sources != GIVEN
    place = np.concatenate([[0], np.cumsum(counted)])
    room = place[:-1] - place[ordered.offsets[:-1]][owner] < mining.num_negatives
    return _kept(ordered, room | ~counted)


def _kept(preferred: Preferred, keep: Mask) -> Preferred:
    ends: Ints = np.concatenate([[0], np.cumsum(keep)])[preferred.offsets].astype(np.int64)
    return Preferred(preferred.rows[keep], ends, preferred.sources[keep])
