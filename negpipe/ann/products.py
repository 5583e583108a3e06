"""Which pairs may reach a score: matrix products, in float32, or in bfloat16 where the processor has units for it.

A product decides nothing, it only says which pairs are worth `pair_scores`. How far it can be from the score has a
proven bound, larger for bfloat16: there some more pairs are scored, for products ten times as fast.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from negpipe.ann.library import one_thread
from negpipe.ann.vectors import Floats, Ints
from negpipe.engine import processor

STRIP = 1024  # anchors, and rows, of one product: it stays in the processor's cache
_WORTH_TORCH = 5e11  # multiplications and additions that take float32 as long as importing torch takes
_GRAIN = 128
_PAIRS = 2**17  # at a time, and one anchor's more: each takes more memory than its product
_SMALL = 1e-18  # the squares of smaller numbers underflow
_TINY = float(np.finfo(np.float32).tiny)  # more than what underflow adds to the error of multiplying two numbers


@dataclass(frozen=True)
class Operand:
    """Vectors, as they are multiplied."""

    values: Any  # (n, d), whatever the arithmetic takes; rows beyond n mean nothing
    lengths: NDArray[np.float64]  # (n,) norms of the vectors
    errors: NDArray[np.float64]  # (n,) how far they lie from `values`, as vectors

    def __getitem__(self, rows: slice) -> Operand:
        return Operand(self.values[rows], self.lengths[rows], self.errors[rows])


class Arithmetic(Protocol):
    """A way to multiply."""

    dtype: type[Any]
    """Of its products."""

    def limited(self) -> AbstractContextManager[object]:
        """While a pool of threads multiplies, the pool is the only parallelism."""

    def one_thread(self) -> None:
        """What each thread of that pool calls first."""

    def room(self, rows: int, dimension: int) -> Any:
        """Memory for the values of an operand."""

    def operand(self, vectors: Floats, room: Any = None) -> Operand:
        """(n, d) vectors for `multiply`, in `room` if it is given."""

    def take(self, operand: Operand, rows: Ints) -> Operand:
        """Some rows of an operand."""

    def multiply(self, anchors: Any, rows: Any, out: NDArray[Any]) -> None:
        """Fill `out` (n, m) with the products of two operands' values."""

    def order(self, products: NDArray[Any]) -> None:
        """Change products so that they compare like the numbers they stand for: as they are, only positive ones do."""

    def ordered(self, numbers: Floats) -> NDArray[Any]:
        """Numbers, rounded as products are, in order."""

    def numbers(self, ordered: NDArray[Any]) -> Floats:
        """The numbers that ordered products stand for."""


class Float32:
    """By numpy: everywhere."""

    dtype = np.float32

    def limited(self) -> AbstractContextManager[object]:
        limits: AbstractContextManager[object] = threadpool_limits(1, "blas")
        return limits

    def one_thread(self) -> None:
        one_thread()

    def room(self, rows: int, dimension: int) -> None:
        pass  # The vectors are multiplied where they are.

    def operand(self, vectors: Floats, room: Any = None) -> Operand:
        return Operand(vectors, _lengths(vectors), np.zeros(len(vectors)))

    def take(self, operand: Operand, rows: Ints) -> Operand:
        return Operand(operand.values[rows], operand.lengths[rows], operand.errors[rows])

    def multiply(self, anchors: Any, rows: Any, out: NDArray[Any]) -> None:
        np.matmul(anchors, rows.T, out=out)

    def order(self, products: NDArray[Any]) -> None:
        pass

    def ordered(self, numbers: Floats) -> NDArray[Any]:
        return numbers

    def numbers(self, ordered: NDArray[Any]) -> Floats:
        return ordered


class BFloat16:
    """By torch, which uses the processor's matrix units. A product is the bits of a bfloat16, as an integer.

    Values come in multiples of `_GRAIN` rows: for every new shape of a product a program is made, which takes longer
    than the product.
    """

    dtype = np.int16

    @contextmanager
    def limited(self) -> Iterator[None]:
        # A thread that sets its number sets that of all threads that have not begun to compute.
        before = _torch().get_num_threads()
        try:
            yield
        finally:
            _torch().set_num_threads(before)

    def one_thread(self) -> None:
        one_thread()
        _torch().set_num_threads(1)

    def room(self, rows: int, dimension: int) -> Any:
        return _torch().zeros((_grains(rows), dimension), dtype=_torch().bfloat16)

    def operand(self, vectors: Floats, room: Any = None) -> Operand:
        values = self.room(*vectors.shape) if room is None else room[: _grains(len(vectors))]
        values[: len(vectors)].copy_(_torch().from_numpy(vectors))
        lengths = _lengths(vectors)
        # Eight binary digits, rounded to the nearest: no number is off by more than its 2**8th part.
        return Operand(values, lengths, lengths * 2.0**-8 + _SMALL)

    def take(self, operand: Operand, rows: Ints) -> Operand:
        chosen = np.zeros(_grains(len(rows)), np.int64)
        chosen[: len(rows)] = rows
        values = operand.values.index_select(0, _torch().from_numpy(chosen))
        return Operand(values, operand.lengths[rows], operand.errors[rows])

    def multiply(self, anchors: Any, rows: Any, out: NDArray[Any]) -> None:
        torch = _torch()
        torch.mm(anchors, rows.T, out=torch.from_numpy(out).view(torch.bfloat16))

    def order(self, products: NDArray[Any]) -> None:
        products ^= (products >> 15) & np.int16(0x7FFF)

    def ordered(self, numbers: Floats) -> NDArray[Any]:
        torch = _torch()
        bits: NDArray[np.int16] = torch.from_numpy(numbers).bfloat16().view(torch.int16).numpy()
        self.order(bits)
        return bits

    def numbers(self, ordered: NDArray[Any]) -> Floats:
        bits = ordered.copy()
        self.order(bits)
        return (bits.astype(np.int32) << 16).view(np.float32)


def arithmetic(multiplications: float) -> Arithmetic:
    """The fastest on this machine for so much work; changes no result."""
    return BFloat16() if _matrix_units() and 2 * multiplications > _WORTH_TORCH else Float32()


def rate(multiplications: float, dimension: int) -> float:
    """Multiplications a second of one thread, in a search that needs so many. Measures for half a second."""
    numbers = arithmetic(multiplications)
    vectors = np.random.default_rng(0).standard_normal((STRIP, dimension), np.float32)
    with pool(numbers, 1) as thread:
        products, operand = Products(numbers, STRIP), numbers.operand(vectors)
        floor = floors(numbers, np.full(STRIP, 3 * np.sqrt(dimension), np.float32), operand, 0.0, 0.0)

        def measure() -> float:
            list(products.reaching(floor, operand, operand))
            started, count = time.perf_counter(), 0
            while time.perf_counter() - started < 0.5:
                list(products.reaching(floor, operand, operand))
                count += 1
            return count * STRIP * STRIP * dimension / (time.perf_counter() - started)

        return thread.submit(measure).result()


@contextmanager
def pool(numbers: Arithmetic, threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that multiply, each by itself: the pool is the only parallelism."""
    with numbers.limited(), ThreadPoolExecutor(threads, initializer=numbers.one_thread) as executor:
        yield executor


def _matrix_units() -> bool:
    """Whether the processor multiplies bfloat16 matrices in units of their own (Intel AMX)."""
    return "amx_bf16" in processor.flags()


@functools.cache
def _torch() -> Any:
    """Imported on first use: it takes seconds."""
    import torch

    return torch


class Products:
    """Products of up to `anchors` anchors with up to `rows` rows. Has memory of its own: for one thread."""

    def __init__(self, arithmetic: Arithmetic, anchors: int, rows: int = STRIP) -> None:
        self._arithmetic = arithmetic
        self._products = np.empty(_grains(anchors) * _grains(rows), arithmetic.dtype)
        self._reached = np.empty(anchors * rows, np.bool_)

    def reaching(self, floor: NDArray[Any], anchors: Operand, rows: Operand) -> Iterator[tuple[Ints, Ints]]:
        """Anchor and row of the pairs whose product is at least the anchor's floor, by anchor and row, in pieces.

        Args:
            floor: (n,) see `floors`.
        """
        return self._at_least(floor, self._multiply(anchors, rows))

    def greatest(self, anchors: Operand, rows: Operand, score: Callable[[Ints], Floats]) -> Iterator[tuple[Ints, Ints]]:
        """Anchor and row of a few pairs, by anchor and row, among them the greatest score of every anchor, in pieces.

        No anchor is in two of them.

        Args:
            score: (n,) scores of the anchors with the (n,) rows it is given.
        """
        products = self._multiply(anchors, rows)
        scores = score(products.argmax(axis=1))  # of bits that are not in order: of some row, where all are negative
        longest, error = rows.lengths.max(initial=0.0), rows.errors.max(initial=0.0)
        return self._at_least(floors(self._arithmetic, scores, anchors, longest, error), products)

    def _at_least(self, floor: NDArray[Any], products: NDArray[Any]) -> Iterator[tuple[Ints, Ints]]:
        if floor.min(initial=1) <= 0:
            self._arithmetic.order(products)
        reached = self._reached[: products.size].reshape(products.shape)
        np.greater_equal(products, floor[:, None], out=reached)
        cuts = np.zeros(1, np.int64)
        if np.count_nonzero(reached) > _PAIRS:
            until = np.cumsum(np.count_nonzero(reached, axis=1))
            cuts = np.flatnonzero(np.diff(until // _PAIRS, prepend=-1))
        for low, high in pairwise([*cuts.tolist(), len(reached)]):
            at = np.flatnonzero(reached[low:high])
            anchor_of = at // products.shape[1]
            yield low + anchor_of, at - anchor_of * products.shape[1]

    def guess(self, anchors: Operand, sample: Operand, depth: int, rows: int) -> Floats:
        """(n,): a number that, going by a random sample of `rows` rows, somewhat more than `depth` of them reach.

        -inf where the sample tells too little.
        """
        count = len(sample.lengths)
        expected = depth * count / max(1, rows)
        rank = int(np.ceil(expected + 3.5 * np.sqrt(expected) + 2))  # its standard deviation is a square root
        if rank > count // 2:
            return np.full(len(anchors.lengths), -np.inf, np.float32)
        table = np.empty((len(anchors.lengths), count), self._arithmetic.dtype)
        for low in range(0, count, STRIP):
            table[:, low : low + STRIP] = self._multiply(anchors, sample[low : low + STRIP])
        self._arithmetic.order(table)
        table.partition(count - rank, axis=1)
        return self._arithmetic.numbers(table[:, count - rank].copy())  # a view would keep the table

    def _multiply(self, anchors: Operand, rows: Operand) -> NDArray[Any]:
        shape = len(anchors.values), len(rows.values)
        products = self._products[: shape[0] * shape[1]].reshape(shape)
        self._arithmetic.multiply(anchors.values, rows.values, products)
        return products[: len(anchors.lengths), : len(rows.lengths)]


def floors(arithmetic: Arithmetic, scores: Floats, anchors: Operand, longest: float, error: float) -> NDArray[Any]:
    """(n,): a pair whose score is at least `scores` has a product that is at least this.

    Of rows no longer than `longest` and no farther than `error` from what is multiplied. Float32 inner products summed
    in different orders differ by at most 2 * gamma_d * |q| * |v|, gamma_d about d * 2**-24 (Higham, Accuracy and
    Stability of Numerical Algorithms, 2002, section 3.1; 8 covers the "about"); rounding the vectors adds what Cauchy
    and Schwarz allow; rounding a product takes it past no number that is rounded in the same way.
    """
    dimension = anchors.values.shape[1]
    lengths = anchors.lengths + anchors.errors
    summing = (dimension + 8) * 2.0**-23 * lengths * (longest + error) + dimension * _TINY
    apart = anchors.errors * longest + lengths * error + summing
    below: Floats = np.nextafter((scores - apart).astype(np.float32), np.float32(-np.inf))
    return arithmetic.ordered(below)


def _grains(rows: int) -> int:
    return -(-rows // _GRAIN) * _GRAIN


def _lengths(vectors: Floats) -> NDArray[np.float64]:
    """(n,): norms, rather too large than too small; inf or NaN where a vector is not finite."""
    lengths: NDArray[np.float64] = np.sqrt(np.einsum("ij,ij->i", vectors, vectors)) * 1.001 + _SMALL
    return lengths
