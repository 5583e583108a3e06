"""The lists of an inverted file: their centres, and the assignment of vectors to them.

Guarantees: the same bytes for any number of threads and any arithmetic: `pair_scores` decides.
"""

from __future__ import annotations

import io
import threading
from contextlib import redirect_stdout
from functools import partial
from typing import Any

import numpy as np

from negpipe.ann.auto import ITERATIONS
from negpipe.ann.pairs import NOTHING, grouped, keys_of, pair_scores, rows_of
from negpipe.ann.products import Arithmetic, Products, arithmetic, pool
from negpipe.data.arrays import Floats, Ints

_TILE, _STRIP = 512, 2048  # vectors and centres per product
_SUMMED = 64  # lists at a time


def centres(sample: Floats, count: int, *, seed: int, threads: int) -> Floats:
    """(count, d) float32 of length 1, by spherical k-means on the sample (n, d)."""
    from faiss.contrib.clustering import kmeans

    numbers = arithmetic(float(ITERATIONS) * sample.size * count)
    with redirect_stdout(io.StringIO()):  # It prints even if not verbose.
        found = kmeans(count, _Sample(sample, numbers, threads), niter=ITERATIONS, seed=seed % 2**32, verbose=False)
    return _unit(found)


def nearest(vectors: Floats, centres: Floats, *, numbers: Arithmetic, threads: int) -> Ints:
    """(n,) int64: the centre with the highest score for each vector, the first of equals."""
    held, local = numbers.operand(centres), threading.local()

    def of(low: int) -> Ints:
        if not hasattr(local, "products"):
            local.products = Products(numbers, _TILE, _STRIP)
        tile = vectors[low : low + _TILE]
        own, operand, best = np.arange(len(tile)), numbers.operand(tile), np.full(len(tile), NOTHING)
        for start in range(0, len(centres), _STRIP):
            some = centres[start : start + _STRIP]
            score = partial(pair_scores, tile, own, some)
            for vector_of, centre_of in local.products.greatest(operand, held[start : start + _STRIP], score):
                keys = keys_of(pair_scores(tile, vector_of, some, centre_of), start + centre_of)
                first = np.flatnonzero(np.diff(vector_of, prepend=-1))
                here = vector_of[first]
                best[here] = np.minimum(best[here], np.minimum.reduceat(keys, first))
        return rows_of(best)

    with pool(numbers, threads) as executor:
        return np.concatenate([np.zeros(0, np.int64), *executor.map(of, range(0, len(vectors), _TILE))])


class _Sample:
    """The data interface of `faiss.contrib.clustering.kmeans`."""

    def __init__(self, vectors: Floats, numbers: Arithmetic, threads: int) -> None:
        self._vectors, self._numbers, self._threads = vectors, numbers, threads

    def count(self) -> int:
        return len(self._vectors)

    def dim(self) -> int:
        return int(self._vectors.shape[1])

    def get_subset(self, rows: Ints) -> Floats:
        return self._vectors[rows]

    def assign_to(self, centroids: Floats, weights: Any = None) -> tuple[Ints, Floats, Floats]:
        """The centroid of each vector, distances (unused), and the sum of each centroid's vectors."""
        count = len(centroids)
        number = nearest(self._vectors, _unit(centroids), numbers=self._numbers, threads=self._threads)
        order, bounds = grouped(number, count)

        def sums(low: int) -> list[Floats]:
            high = min(count, low + _SUMMED)
            return [self._vectors[order[bounds[at] : bounds[at + 1]]].sum(axis=0) for at in range(low, high)]

        with pool(self._numbers, self._threads) as executor:
            summed = [row for rows in executor.map(sums, range(0, count, _SUMMED)) for row in rows]
        return number, np.zeros(1, np.float32), np.stack(summed)


def _unit(vectors: Floats) -> Floats:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Floats = (vectors / np.maximum(lengths, np.finfo(np.float32).tiny)).astype(np.float32)
    return unit
