"""The lists of an inverted file: their centres, and which of them a vector belongs to.

Guarantees: the same bytes for any number of threads. FAISS's own way depends on it, for a near tie; here the shape of
every product depends on the vectors alone, and one thread makes it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from negpipe.ann.vectors import Floats, Ints
from negpipe.kinds import ITERATIONS

_TILE, _STRIP = 1024, 4096  # vectors and centres of one product


def centres(sample: Floats, count: int, *, seed: int, threads: int) -> Floats:
    """(count, d) float32 of length 1, by spherical k-means on the sample (n, d)."""
    from faiss.contrib.clustering import kmeans

    with redirect_stdout(io.StringIO()):  # It prints, verbose or not.
        found = kmeans(count, _Sample(sample, threads), niter=ITERATIONS, seed=seed % 2**32, verbose=False)
    return _unit(found)


def nearest(vectors: Floats, centres: Floats, *, threads: int) -> Ints:
    """(n,) int64: the centre with the greatest product with each vector."""

    def of(low: int) -> Ints:
        tile = vectors[low : low + _TILE]
        best = np.full(len(tile), -np.inf, np.float32)
        number = np.zeros(len(tile), np.int64)
        for start in range(0, len(centres), _STRIP):
            products = tile @ centres[start : start + _STRIP].T
            at = products.argmax(axis=1)
            product = np.take_along_axis(products, at[:, None], axis=1)[:, 0]
            better = product > best
            best[better], number[better] = product[better], start + at[better]
        return number

    with _pool(threads) as pool:
        return np.concatenate([np.zeros(0, np.int64), *pool.map(of, range(0, len(vectors), _TILE))])


class _Sample:
    """What `faiss.contrib.clustering.kmeans` asks of its data."""

    def __init__(self, vectors: Floats, threads: int) -> None:
        self._vectors, self._threads = vectors, threads

    def count(self) -> int:
        return len(self._vectors)

    def dim(self) -> int:
        return int(self._vectors.shape[1])

    def get_subset(self, rows: Ints) -> Floats:
        return self._vectors[rows]

    def assign_to(self, centroids: Floats, weights: Any = None) -> tuple[Ints, Floats, Floats]:
        """The centroid of each vector, distances, which are not needed, and the sum of each centroid's vectors."""
        number = nearest(self._vectors, _unit(centroids), threads=self._threads)
        order = np.argsort(number, kind="stable")
        bounds = np.searchsorted(number[order], np.arange(len(centroids) + 1))
        with _pool(self._threads) as pool:
            sums = pool.map(
                lambda at: self._vectors[order[bounds[at] : bounds[at + 1]]].sum(axis=0), range(len(centroids))
            )
            return number, np.zeros(1, np.float32), np.stack([*sums])


def _unit(vectors: Floats) -> Floats:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Floats = (vectors / np.maximum(lengths, np.finfo(np.float32).tiny)).astype(np.float32)
    return unit


@contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads) as pool:
        yield pool
