"""Share of the exact result that an approximate search finds, measured on sampled anchors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from negpipe.data.arrays import Ints, Mask
from negpipe.store import mapped


@dataclass(frozen=True)
class Recall:
    """Which of the true nearest rows were found, for m sampled anchors.

    Attributes:
        hits: (m, depth) bool, whether the row at each true rank of an anchor was found.
    """

    hits: Mask

    def write(self, file: BinaryIO) -> None:
        """Write it as .npy."""
        np.save(file, self.hits, allow_pickle=False)

    @classmethod
    def read(cls, path: Path) -> Recall:
        """Read a file written by `write`."""
        return cls(np.array(mapped.npy(path)))

    def over(self, first: int, last: int) -> tuple[float, float, float]:
        """Mean recall over the true ranks first … last - 1, and its 95 % interval (normal, over anchors)."""
        each = self.hits[:, first:last].mean(axis=1)
        mean, width = float(each.mean()), 1.96 * float(each.std(ddof=1 if len(each) > 1 else 0)) / np.sqrt(len(each))
        return mean, max(0.0, mean - width), min(1.0, mean + width)

    def window(self, first: int, last: int) -> dict[str, float]:
        """Recall over the true ranks first … last - 1, with its interval, and the shifts of the first and last."""
        mean, low, high = self.over(first, last)
        figures = {"recall": mean, "low": low, "high": high}
        figures |= {"shift_first": self.shift(first), "shift_last": self.shift(last - 1)}
        return {"first": first, "last": last} | {name: round(value, 4) for name, value in figures.items()}

    def shift(self, rank: int) -> float:
        """By how many ranks the row found at `rank` is truly deeper, on average; missed rows move others up."""
        order = np.argsort(~self.hits, axis=1, kind="stable")
        known = self.hits.sum(axis=1) > rank
        return float((order[known, rank] - rank).mean()) if known.any() else 0.0


def places(found: Ints, true: Ints) -> Ints:
    """(m, depth): the position of each true row among its anchor's found rows, or their number if missing."""
    width = found.shape[1]
    anchor = np.arange(len(true), dtype=np.int64)[:, None] << 32
    keys = np.where(found < 0, -1, anchor + found).ravel()
    order = np.argsort(keys, kind="stable")
    at = np.minimum(np.searchsorted(keys, (anchor + true).ravel(), sorter=order), keys.size - 1)
    there = keys[order[at]] == (anchor + true).ravel()
    place: Ints = np.where(there, order[at] % width, width).reshape(true.shape)
    return place
