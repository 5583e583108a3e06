"""Known positives of all queries with the same normalized text, stored once per text and found by its hash.

The parts of ingest's kind `namesakes` form one table of (normalized, row), ascending; the rows of a text may span
several parts. They are memory-mapped: memory holds the rows of the requested texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from negpipe.data.arrays import Hashes, Ints
from negpipe.data.tables import members, open_table


class Namesakes:
    """The parts as one table.

    Args:
        paths: the parts, in order.

    Raises:
        DamagedError: a file is incomplete.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        tables = [open_table(path) for path in paths]
        self._parts = [(table["normalized"].to_numpy(), table["row"].to_numpy()) for table in tables]
        self._ends = np.array([hashes[[0, -1]] for hashes, _ in self._parts], np.uint64).reshape(-1, 2)

    def of(self, texts: Hashes) -> tuple[Ints, Ints]:
        """The rows of some texts, none for a text of a single query.

        Args:
            texts: (m,) hashes of normalized texts, ascending, each once.

        Returns:
            rows of the corpus, ascending within a text, ragged by offsets (m + 1,).
        """
        low, high = np.searchsorted(texts, self._ends[:, 0]), np.searchsorted(texts, self._ends[:, 1], side="right")
        rows, counts = [np.empty(0, np.int64)], np.zeros(len(texts), np.int64)
        for part in np.flatnonzero(low < high).tolist():
            here = slice(low[part], high[part])
            hashes, values = self._parts[part]
            first, last = np.searchsorted(hashes, texts[here]), np.searchsorted(hashes, texts[here], side="right")
            positions, _ = members(np.stack([first, last], axis=1).ravel(), 2 * np.arange(len(first)))
            rows.append(values[positions])
            counts[here] += last - first
        return np.concatenate(rows), np.concatenate([[0], np.cumsum(counts)])
