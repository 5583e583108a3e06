"""Finds pairs that may reach a score: matrix products in float32 (on a GPU too), or in bfloat16 if the processor has
units for it.

A product decides nothing, it only selects the pairs worth passing to `pair_scores`. Its distance from the score has a
proven bound, larger for bfloat16: then a few more pairs are scored, but products are ten times as fast. Products are
evaluated where they are computed: from a GPU, only the pairs are returned.
"""

from __future__ import annotations

import functools
import time
from abc import ABC, abstractmethod
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
from negpipe.data.arrays import Floats, Ints, Mask
from negpipe.engine import devices, processor
from negpipe.engine.budget import DEFAULT, Budget
from negpipe.errors import BudgetError, ConfigError

STRIP = 1024  # anchors, and rows, per product: fits into the processor's cache
_WORTH_TORCH = 5e11  # operations that take float32 as long as importing torch
_GRAIN = 128
_PAIRS = 2**17  # pairs at a time, plus one anchor's: each takes more memory than its product
_SMALL = 1e-18  # squares of smaller numbers underflow
_TINY = float(np.finfo(np.float32).tiny)  # smaller numbers are subnormal: less exact, or flushed to 0
_MOST_ROWS = 2**14  # rows per product on a GPU; enough to keep it busy
_CELL = 8  # bytes on the GPU per product, including its comparison and search


@dataclass(frozen=True)
class Operand:
    """Vectors in the form in which they are multiplied."""

    values: Any  # (n, d), type depends on the arithmetic; rows beyond n are meaningless
    lengths: NDArray[np.float64]  # (n,) norms of the vectors
    errors: NDArray[np.float64]  # (n,) their distances from `values`, as vectors

    def __getitem__(self, rows: slice) -> Operand:
        return Operand(self.values[rows], self.lengths[rows], self.errors[rows])


class Arithmetic(Protocol):
    """A way to multiply, and to evaluate products where they are."""

    strip: int
    """Rows per product."""

    def limited(self) -> AbstractContextManager[object]:
        """Context in which a thread pool multiplies and is the only parallelism."""

    def one_thread(self) -> None:
        """Called first in each thread of that pool."""

    def rows(self, anchors: int, dimension: int) -> int:
        """Maximum rows of a block; two blocks are in memory next to the anchors.

        Raises:
            BudgetError: too few fit.
        """

    def room(self, rows: int, dimension: int) -> Any:
        """Memory for the values of an operand."""

    def operand(self, vectors: Floats, room: Any = None) -> Operand:
        """(n, d) vectors prepared for `multiply`, in `room` if given."""

    def take(self, operand: Operand, rows: Ints) -> Operand:
        """Some rows of an operand."""

    def scratch(self, anchors: int, rows: int) -> Any:
        """One thread's memory for `multiply` and `reached`."""

    def multiply(self, anchors: Operand, rows: Operand, scratch: Any) -> Any:
        """(n, m) products of two operands."""

    def greatest(self, products: Any) -> Ints:
        """(n,) the row of each anchor's greatest product; any row if all are negative."""

    def reached(self, products: Any, floor: NDArray[Any], scratch: Any) -> Any:
        """(n, m) which products are at least their anchor's floor, see `floors`. May modify the products."""

    def pieces(self, reached: Any) -> Ints:
        """The anchors at which pieces of about `_PAIRS` pairs start."""

    def pairs(self, reached: Any) -> tuple[Ints, Ints]:
        """Anchors and rows that are reached, sorted by anchor and row."""

    def table(self, anchors: int, rows: int) -> Any:
        """Memory for products that are kept."""

    def nth(self, table: Any, number: int) -> Floats:
        """(n,) the product at place `number` of each anchor, in ascending order. May modify the table."""

    def ordered(self, numbers: Floats) -> NDArray[Any]:
        """Numbers rounded like products, for comparison in `reached`."""


class _OnCores(ABC):
    """Products in main memory."""

    dtype: type[Any]
    """Data type of products."""
    strip = STRIP

    def rows(self, anchors: int, dimension: int) -> int:
        return 2**32  # The task's budget accounts for them.

    def scratch(self, anchors: int, rows: int) -> tuple[NDArray[Any], Mask]:
        return np.empty(_grains(anchors) * _grains(rows), self.dtype), np.empty(anchors * rows, np.bool_)

    def multiply(self, anchors: Operand, rows: Operand, scratch: Any) -> NDArray[Any]:
        shape = len(anchors.values), len(rows.values)
        products: NDArray[Any] = scratch[0][: shape[0] * shape[1]].reshape(shape)
        self._fill(anchors.values, rows.values, products)
        return products[: len(anchors.lengths), : len(rows.lengths)]

    def greatest(self, products: NDArray[Any]) -> Ints:
        rows: Ints = products.argmax(axis=1)
        return rows

    def reached(self, products: NDArray[Any], floor: NDArray[Any], scratch: Any) -> Mask:
        if floor.min(initial=1) <= 0:
            self._order(products)
        reached: Mask = scratch[1][: products.size].reshape(products.shape)
        np.greater_equal(products, floor[:, None], out=reached)
        return reached

    def pieces(self, reached: Mask) -> Ints:
        few = np.count_nonzero(reached) <= _PAIRS
        return np.zeros(1, np.int64) if few else _pieces(np.count_nonzero(reached, axis=1))

    def pairs(self, reached: Mask) -> tuple[Ints, Ints]:
        at = np.flatnonzero(reached)
        anchor_of = at // reached.shape[1]
        return anchor_of, at - anchor_of * reached.shape[1]

    def table(self, anchors: int, rows: int) -> NDArray[Any]:
        return np.empty((anchors, rows), self.dtype)

    def nth(self, table: NDArray[Any], number: int) -> Floats:
        self._order(table)
        table.partition(number, axis=1)
        return self._numbers(table[:, number].copy())  # a view would keep the table

    @abstractmethod
    def _fill(self, anchors: Any, rows: Any, out: NDArray[Any]) -> None:
        """Fill `out` (n, m) with the products of two operands' values."""

    @abstractmethod
    def _order(self, products: NDArray[Any]) -> None:
        """Modify products so that they compare like the numbers they represent."""

    def _numbers(self, ordered: NDArray[Any]) -> Floats:
        """The numbers represented by ordered products."""
        return ordered


class Float32(_OnCores):
    """With numpy: works everywhere."""

    dtype = np.float32

    def limited(self) -> AbstractContextManager[object]:
        limits: AbstractContextManager[object] = threadpool_limits(1, "blas")
        return limits

    def one_thread(self) -> None:
        one_thread()

    def room(self, rows: int, dimension: int) -> None:
        pass  # The vectors are multiplied in place.

    def operand(self, vectors: Floats, room: Any = None) -> Operand:
        return Operand(vectors, _lengths(vectors), np.zeros(len(vectors)))

    def take(self, operand: Operand, rows: Ints) -> Operand:
        return Operand(operand.values[rows], operand.lengths[rows], operand.errors[rows])

    def ordered(self, numbers: Floats) -> NDArray[Any]:
        return numbers

    def _fill(self, anchors: Any, rows: Any, out: NDArray[Any]) -> None:
        np.matmul(anchors, rows.T, out=out)

    def _order(self, products: NDArray[Any]) -> None:
        pass  # they already compare that way


class _ByTorch:
    """Thread handling for torch."""

    @contextmanager
    def limited(self) -> Iterator[None]:
        # Setting the thread count in one thread sets it for all threads that have not started computing.
        before = _torch().get_num_threads()
        try:
            yield
        finally:
            _torch().set_num_threads(before)

    def one_thread(self) -> None:
        one_thread()
        _torch().set_num_threads(1)


class BFloat16(_ByTorch, _OnCores):
    """With torch, which uses the processor's matrix units. A product is the bits of a bfloat16, as an integer.

    Values are padded to multiples of `_GRAIN` rows: for every new shape of a product, a program is compiled, which
    takes longer than the product.
    """

    dtype = np.int16

    def room(self, rows: int, dimension: int) -> Any:
        return _torch().zeros((_grains(rows), dimension), dtype=_torch().bfloat16)

    def operand(self, vectors: Floats, room: Any = None) -> Operand:
        values = self.room(*vectors.shape) if room is None else room[: _grains(len(vectors))]
        values[: len(vectors)].copy_(_torch().from_numpy(vectors))
        lengths = _lengths(vectors)
        # Eight binary digits, rounded to nearest: the relative error is at most 2**-8.
        return Operand(values, lengths, lengths * 2.0**-8 + _SMALL)

    def take(self, operand: Operand, rows: Ints) -> Operand:
        chosen = np.zeros(_grains(len(rows)), np.int64)
        chosen[: len(rows)] = rows
        values = operand.values.index_select(0, _torch().from_numpy(chosen))
        return Operand(values, operand.lengths[rows], operand.errors[rows])

    def ordered(self, numbers: Floats) -> NDArray[Any]:
        torch = _torch()
        bits: NDArray[np.int16] = torch.from_numpy(numbers).bfloat16().view(torch.int16).numpy()
        self._order(bits)
        return bits

    def _fill(self, anchors: Any, rows: Any, out: NDArray[Any]) -> None:
        torch = _torch()
        torch.mm(anchors, rows.T, out=torch.from_numpy(out).view(torch.bfloat16))

    def _order(self, products: NDArray[Any]) -> None:
        products ^= (products >> 15) & np.int16(0x7FFF)

    def _numbers(self, ordered: NDArray[Any]) -> Floats:
        self._order(ordered)
        return (ordered.astype(np.int32) << 16).view(np.float32)


class OnDevice(_ByTorch):
    """With torch, in float32, in the memory of a device, to which vectors are copied.

    TF32, which keeps eleven of a number's 24 binary digits, is switched off, so the bound of Float32 applies: it holds
    for sums in any order, by any number of units. Fewer digits would be faster, but with a bound that depends on how
    the units add.

    Args:
        device: its name in torch.
        threads: number of threads that multiply at a time.
        memory: free bytes there. Half are for vectors, a quarter for products.
    """

    def __init__(self, device: str, threads: int, memory: int) -> None:
        self._device, self._memory = device, memory
        self.strip = min(max(1, memory // 4 // (threads * STRIP * _CELL * _GRAIN)) * _GRAIN, _MOST_ROWS)

    @contextmanager
    def limited(self) -> Iterator[None]:
        products = _torch().backends.cuda.matmul
        # Older torch has the second name only, and newer torch refuses it once the first was used.
        name, exact = ("fp32_precision", "ieee") if hasattr(products, "fp32_precision") else ("allow_tf32", False)
        before = getattr(products, name)
        setattr(products, name, exact)
        try:
            with super().limited():
                yield
        finally:
            setattr(products, name, before)

    def rows(self, anchors: int, dimension: int) -> int:
        row = 4 * dimension
        rows = (self._memory // 2 - anchors * row) // (2 * row)
        if rows < STRIP:
            raise self._refused(f"{anchors:,} anchors of dimension {dimension:,}", "data.part_rows")
        return rows

    def room(self, rows: int, dimension: int) -> Any:
        return self._empty(rows, dimension)

    def operand(self, vectors: Floats, room: Any = None) -> Operand:
        values = self._empty(*vectors.shape) if room is None else room[: len(vectors)]
        values.copy_(_torch().from_numpy(vectors))
        # Subnormal numbers may be treated as 0.
        return Operand(values, _lengths(vectors), np.full(len(vectors), np.sqrt(vectors.shape[1]) * _TINY))

    def take(self, operand: Operand, rows: Ints) -> Operand:
        with self._memory_for("vectors"):
            values = operand.values.index_select(0, self._copied(rows))
        return Operand(values, operand.lengths[rows], operand.errors[rows])

    def scratch(self, anchors: int, rows: int) -> None:
        pass  # torch keeps released memory for the next product.

    def multiply(self, anchors: Operand, rows: Operand, scratch: Any) -> Any:
        with self._memory_for("products"):
            return _torch().mm(anchors.values, rows.values.T)

    def greatest(self, products: Any) -> Ints:
        return _fetched(products.argmax(1))

    def reached(self, products: Any, floor: NDArray[Any], scratch: Any) -> Any:
        with self._memory_for("products"):
            return products >= self._copied(floor)[:, None]

    def pieces(self, reached: Any) -> Ints:
        counts = _fetched(reached.sum(1))
        return _pieces(counts) if counts.any() else counts[:0]

    def pairs(self, reached: Any) -> tuple[Ints, Ints]:
        with self._memory_for("pairs"):
            anchor_of, row_of = _fetched(reached.nonzero().T.contiguous())
        return anchor_of, row_of

    def table(self, anchors: int, rows: int) -> Any:
        return self._empty(anchors, rows)

    def nth(self, table: Any, number: int) -> Floats:
        with self._memory_for("products"):
            return _fetched(table.kthvalue(number + 1, dim=1).values)

    def ordered(self, numbers: Floats) -> NDArray[Any]:
        return numbers

    def check(self) -> None:
        """Check that products keep their bound: TF32 may be forced on from outside.

        Short sums show it best, as errors do not cancel out.

        Raises:
            ConfigError: they do not.
        """
        vectors = np.random.default_rng(0).standard_normal((STRIP, 64), np.float32)
        operand = self.operand(vectors)
        with self.limited():
            products = _fetched(self.multiply(operand, operand, None))
        off = np.abs(products - vectors.astype(np.float64) @ vectors.astype(np.float64).T)
        if not (off <= apart(operand, operand.lengths.max(), operand.errors.max())[:, None]).all():
            raise ConfigError(
                f"search.device multiplies less precisely than float32, by up to {off.max():.2g}. Something may force"
                " TF32 on it (NVIDIA_TF32_OVERRIDE, TORCH_ALLOW_TF32_CUBLAS_OVERRIDE): unset it, or set"
                " search.device: cpu"
            )

    def _empty(self, *shape: int) -> Any:
        with self._memory_for("vectors"):
            return _torch().empty(shape, device=self._device)

    def _copied(self, array: NDArray[Any]) -> Any:
        return _torch().from_numpy(array).to(self._device)

    @contextmanager
    def _memory_for(self, what: str) -> Iterator[None]:
        try:
            yield
        except _torch().OutOfMemoryError:
            raise self._refused(f"more {what}", "executor.workers, resources.cpus or data.part_rows") from None

    def _refused(self, what: str, setting: str) -> BudgetError:
        remedy = f"lower {setting}, or set search.device: cpu"
        there = self._memory
        return BudgetError(
            f"search.device does not have the memory for {what}, {there // 2**20:,} MiB were free: {remedy}",
            there=there,
            remedy=remedy,
        )


def arithmetic(multiplications: float, budget: Budget = DEFAULT) -> Arithmetic:
    """The fastest arithmetic that a task may use for so much work; does not affect results."""
    if 2 * multiplications <= _WORTH_TORCH:
        return Float32()
    return _on_gpu(budget) or (BFloat16() if _matrix_units() else Float32())


def _on_gpu(budget: Budget) -> OnDevice | None:
    """Arithmetic on the granted GPU; None if it does not exist (it was optional)."""
    if not devices.is_gpu(budget.device):
        return None
    cuda, device = _torch().cuda, _torch().device(devices.own(budget.device))
    if not cuda.is_available() or device.index >= cuda.device_count():
        return None
    held = cuda.memory_reserved(device) - cuda.memory_allocated(device)  # held by torch from an earlier search
    numbers = OnDevice(str(device), budget.threads, cuda.mem_get_info(device)[0] + held)
    numbers.check()
    return numbers


def rate(multiplications: float, dimension: int) -> float:
    """Multiplications per second of one thread, in a search that needs so many. Measures for half a second."""
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
    """Threads that multiply independently: the pool is the only parallelism."""
    with numbers.limited(), ThreadPoolExecutor(threads, initializer=numbers.one_thread) as executor:
        yield executor


def _matrix_units() -> bool:
    """Whether the processor has units for bfloat16 matrix products (Intel AMX)."""
    return "amx_bf16" in processor.flags()


@functools.cache
def _torch() -> Any:
    """Imported on first use: it takes seconds."""
    import torch

    return torch


class Products:
    """Products of up to `anchors` anchors with up to `rows` rows. Owns scratch memory: for one thread only."""

    def __init__(self, arithmetic: Arithmetic, anchors: int, rows: int = 0) -> None:
        self._arithmetic = arithmetic
        self._scratch = arithmetic.scratch(anchors, rows or arithmetic.strip)

    def reaching(self, floor: NDArray[Any], anchors: Operand, rows: Operand) -> Iterator[tuple[Ints, Ints]]:
        """Anchors and rows of pairs whose product is at least the anchor's floor, sorted by anchor and row, in pieces.

        Args:
            floor: (n,) see `floors`.
        """
        return self._at_least(floor, self._multiply(anchors, rows))

    def greatest(self, anchors: Operand, rows: Operand, score: Callable[[Ints], Floats]) -> Iterator[tuple[Ints, Ints]]:
        """Anchors and rows of a few pairs, sorted, including the highest score of every anchor, in pieces.

        No anchor is in two pieces.

        Args:
            score: returns the (n,) scores of the anchors with the given (n,) rows.
        """
        products = self._multiply(anchors, rows)
        scores = score(self._arithmetic.greatest(products))
        longest, error = rows.lengths.max(initial=0.0), rows.errors.max(initial=0.0)
        return self._at_least(floors(self._arithmetic, scores, anchors, longest, error), products)

    def _at_least(self, floor: NDArray[Any], products: Any) -> Iterator[tuple[Ints, Ints]]:
        reached = self._arithmetic.reached(products, floor, self._scratch)
        for low, high in pairwise([*self._arithmetic.pieces(reached).tolist(), len(reached)]):
            anchor_of, row_of = self._arithmetic.pairs(reached[low:high])
            yield low + anchor_of, row_of

    def guess(self, anchors: Operand, sample: Operand, depth: int, rows: int) -> Floats:
        """(n,): a number that, according to a random sample of `rows` rows, slightly more than `depth` of them reach.

        -inf if the sample is too small.
        """
        count = len(sample.lengths)
        expected = depth * count / max(1, rows)
        rank = int(np.ceil(expected + 3.5 * np.sqrt(expected) + 2))  # its standard deviation is sqrt(expected)
        if rank > count // 2:
            return np.full(len(anchors.lengths), -np.inf, np.float32)
        table, strip = self._arithmetic.table(len(anchors.lengths), count), self._arithmetic.strip
        for low in range(0, count, strip):
            table[:, low : low + strip] = self._multiply(anchors, sample[low : low + strip])
        return self._arithmetic.nth(table, count - rank)

    def _multiply(self, anchors: Operand, rows: Operand) -> Any:
        return self._arithmetic.multiply(anchors, rows, self._scratch)


def floors(arithmetic: Arithmetic, scores: Floats, anchors: Operand, longest: float, error: float) -> NDArray[Any]:
    """(n,): if a pair's score is at least `scores`, its product is at least this.

    For rows no longer than `longest` and no farther than `error` from what is multiplied. Rounding a product never
    moves it past a number that is rounded in the same way.
    """
    below: Floats = np.nextafter((scores - apart(anchors, longest, error)).astype(np.float32), np.float32(-np.inf))
    return arithmetic.ordered(below)


def apart(anchors: Operand, longest: float, error: float) -> NDArray[np.float64]:
    """(n,): maximum distance of a pair's product, before rounding, from its score, see `floors`.

    Float32 inner products summed in different orders differ by at most 2 * gamma_d * |q| * |v|, gamma_d about d *
    2**-24 (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1; 8 covers the "about"), and by the
    effect of underflow: for each of d products and d sums, less than the smallest normal number, even if it becomes 0.
    Vectors that are not multiplied unchanged add the bound of Cauchy and Schwarz.
    """
    dimension = anchors.values.shape[1]
    lengths = anchors.lengths + anchors.errors
    summing = (dimension + 8) * 2.0**-23 * lengths * (longest + error) + 2 * dimension * _TINY
    bound: NDArray[np.float64] = anchors.errors * longest + lengths * error + summing
    return bound


def _grains(rows: int) -> int:
    return -(-rows // _GRAIN) * _GRAIN


def _pieces(counts: Ints) -> Ints:
    return np.flatnonzero(np.diff(np.cumsum(counts) // _PAIRS, prepend=-1))


def _fetched(values: Any) -> NDArray[Any]:
    array: NDArray[Any] = values.cpu().numpy()
    return array


def _lengths(vectors: Floats) -> NDArray[np.float64]:
    """(n,): norms, rounded up; inf or NaN if a vector is not finite."""
    lengths: NDArray[np.float64] = np.sqrt(np.einsum("ij,ij->i", vectors, vectors)) * 1.001 + _SMALL
    return lengths
