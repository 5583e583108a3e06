"""Near duplicates: candidates that say nearly the same as a positive.

The similarity of two texts is 1 - d / (length of both), with d the characters to insert or delete
between their normalised forms (normalised Indel similarity, `fuzz.ratio` of RapidFuzz over 100). Every
requested pair is compared: there is no sketching, and nothing is missed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from negpipe.data.arrays import Ints, Mask
from negpipe.data.tables import Rows, members
from negpipe.data.texts import normalize

_PAIRS = 16384  # pairs whose texts are in memory at a time
_ASKED = 2**20  # pairs requested at a time


@dataclass
class Finder:
    """Compares texts by row, and records the cost.

    Attributes:
        corpus: all documents, with their texts.
        threshold: minimum similarity of near duplicates, above 0, at most 1.
        threads: number of comparing threads. Does not affect results.
        pairs: number of pairs compared so far.
        seconds: time spent so far.
    """

    corpus: Rows
    threshold: float
    threads: int
    pairs: int = 0
    seconds: float = 0.0

    def find(self, rows: Ints, owner: Ints, positives: Ints, offsets: Ints) -> Mask:
        """Find rows that are near duplicates of a positive of their owner.

        Args:
            rows: (p,) rows of the corpus.
            owner: (p,) the owner of each candidate.
            positives: rows of all owners' positives, ragged by offsets (n + 1,).

        Returns:
            (p,) bool.
        """
        started = time.monotonic()
        found = np.zeros(len(rows), np.bool_)
        # There may be many positives: take as many candidates at a time as keep the number of pairs bounded.
        cuts = np.flatnonzero(np.diff(np.cumsum(np.diff(offsets)[owner]) // _ASKED)) + 1
        for low, high in pairwise([0, *cuts.tolist(), len(rows)]):
            here = slice(low, high)
            positions, ends = members(offsets, owner[here])
            pair = np.repeat(np.arange(low, high), np.diff(ends))
            # Pairs requested by several owners are compared once.
            unique, inverse = np.unique(rows[pair] * len(self.corpus) + positives[positions], return_inverse=True)
            chunks = (unique[at : at + _PAIRS] for at in range(0, len(unique), _PAIRS))
            pieces = [self._alike(*divmod(chunk, len(self.corpus))) for chunk in chunks]
            alike = np.concatenate([np.empty(0, np.bool_), *pieces])
            found[pair[alike[inverse]]] = True
            self.pairs += len(unique)
        self.seconds += time.monotonic() - started
        return found

    def _alike(self, rows: Ints, positives: Ints) -> Mask:
        known, places = np.unique(np.concatenate([rows, positives]), return_inverse=True)
        texts = [normalize(text) for text in self.corpus.strings("text", known).to_pylist()]
        left, right = ([texts[at] for at in side] for side in np.split(places, 2))
        return similarities(left, right, self.threshold, self.threads) >= self.threshold


def similarities(left: Sequence[str], right: Sequence[str], threshold: float, threads: int) -> npt.NDArray[np.float64]:
    """Similarity of each pair of normalised texts, 0 where it is below the threshold."""
    from rapidfuzz.distance import Indel
    from rapidfuzz.process import cpdist

    return cpdist(
        left, right, scorer=Indel.normalized_similarity, score_cutoff=threshold, dtype=np.float64, workers=threads
    )
