"""Exact nearest neighbours by inner product, streamed from files in bounded memory.

Guarantees: every score that leaves this module comes from `pair_scores`, which gives the same bits for a pair whoever
asks; candidates are the true top by (-score, row), ties of any size included; so results are the same bytes for any
block size, memory budget and thread count, and for float16 parts or the float32 flat file made from them.

How: FAISS only proposes, a few rows more than are wanted from each block of the corpus, and `pair_scores` scores them
while the block is in memory. The errors of both have a proven bound: where the last row proposed lies below an
anchor's cut by more than that bound, no other row of the block can belong to its top; elsewhere more are proposed.
This is the only module that imports faiss.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from negpipe.errors import ConfigError, DamagedError

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Keys = NDArray[np.uint64]

_ANCHORS = 1024  # at most, of one search: large enough for its speed
_BLOCK_ROWS = 131072  # at most, at a time: in small blocks FAISS spends its time on collecting the first few
_READ_ROWS = 1024
_SPARE = 16  # proposed beyond the depth, so that rounding leaves the last one behind the cut
_TINY = float(np.finfo(np.float32).tiny)  # more than what underflow can add to a rounding error
_NOTHING = np.uint64(0xFF800000_FFFFFFFF)  # the key of score -inf, row -1: sorts behind every real key


@functools.cache
def _faiss() -> Any:
    """Imported on first use: stages import this module when the command line starts."""
    import faiss

    # By default 333 anchors of dimension 384 are compared one by one, 12 times slower than as a matrix.
    faiss.cvar.distance_compute_blas_threshold = 1
    return faiss


@dataclass(frozen=True)
class _File:
    path: Path
    first: int
    rows: int
    dtype: np.dtype[Any]
    offset: int


@dataclass(frozen=True)
class Vectors:
    """Vectors in files, in row order: `rows` x `dimension`, stored as float16 or float32, read as float32."""

    files: tuple[_File, ...]
    dimension: int

    @property
    def rows(self) -> int:
        """Number of vectors."""
        return self.files[-1].first + self.files[-1].rows if self.files else 0

    def read(self, start: int, out: Floats) -> None:
        """Fill `out` (m, dimension) with rows start … start + m.

        Reads instead of mapping, so that pages of a large file never count as this process's memory.

        Raises:
            DamagedError: a file ends early or cannot be read.
        """
        for file in self.files:
            low, high = max(start, file.first), min(start + len(out), file.first + file.rows)
            for row in range(low, high, _READ_ROWS):
                stop = min(row + _READ_ROWS, high)
                size = (stop - row) * self.dimension
                offset = file.offset + (row - file.first) * self.dimension * file.dtype.itemsize
                try:
                    values = np.fromfile(file.path, file.dtype, size, offset=offset)
                except OSError as error:
                    raise DamagedError(f"{file.path}: cannot be read ({error}). Run `negpipe verify`") from None
                if len(values) < size:
                    raise DamagedError(f"{file.path}: ends before row {stop - file.first}. Run `negpipe verify`")
                out[row - start : stop - start] = values.reshape(-1, self.dimension)

    def blocks(self, rows: int) -> Iterator[tuple[int, Floats]]:
        """(first row, (m, dimension) float32) for at most `rows` rows at a time, each a new array."""
        for start in range(0, self.rows, rows):
            block = np.empty((min(rows, self.rows - start), self.dimension), np.float32)
            self.read(start, block)
            yield start, block

    def place(self, row: int) -> str:
        """File and row in the file of a row, for messages."""
        file = next(file for file in self.files if row < file.first + file.rows)
        return f"{file.path}, row {row - file.first}"


def open_parts(paths: Sequence[Path]) -> Vectors:
    """Vectors of .npy files (m, dimension) of float16 or float32, in the order given. Reads only the headers.

    Raises:
        DamagedError: a file is missing, cut off, or does not hold such vectors, all of one dimension.
    """
    files: list[_File] = []
    first, dimension = 0, 0
    for path in paths:
        try:
            array = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise DamagedError(f"{path}: is no whole .npy file ({error}). Run `negpipe verify`") from None
        dimension = dimension or array.shape[-1]
        shaped = array.ndim == 2 and array.shape[1] == dimension and array.flags.c_contiguous
        if not shaped or array.dtype not in (np.float16, np.float32):
            raise DamagedError(
                f"{path}: holds {array.dtype} of shape {array.shape}, expected float16 or float32 vectors of"
                f" dimension {dimension}. Run `negpipe verify`"
            )
        files.append(_File(path, first, len(array), array.dtype, array.offset))
        first += len(array)
    return Vectors(tuple(files), dimension)


def _flat_header(dimension: int, rows: int) -> bytes:
    """What faiss writes before the vectors of an IndexFlatIP: an empty one's bytes, with the counts put in."""
    header = bytearray(_faiss().serialize_index(_faiss().IndexFlatIP(dimension)).tobytes())
    header[8:16] = rows.to_bytes(8, "little")
    header[-8:] = (rows * dimension).to_bytes(8, "little")
    return bytes(header)


def write_flat(file: BinaryIO, vectors: Vectors) -> None:
    """Write an `IndexFlatIP` that `faiss.read_index` opens, one tile of rows in memory at a time."""
    file.write(_flat_header(vectors.dimension, vectors.rows))
    for _, block in vectors.blocks(_READ_ROWS):
        file.write(block.astype("<f4", copy=False).data)


def open_flat(path: Path) -> Vectors:
    """The vectors of a file that `write_flat` wrote.

    Raises:
        DamagedError: the file is missing, is no IndexFlatIP, or its size is not what its header says.
    """
    try:
        with path.open("rb") as file:
            header = file.read(45)
        size = path.stat().st_size
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read ({error}). Run `negpipe index`") from None
    dimension, rows = int.from_bytes(header[4:8], "little"), int.from_bytes(header[8:16], "little")
    sane = 0 < dimension < 2**20 and len(header) + rows * dimension * 4 == size
    if not sane or header != _flat_header(dimension, rows):
        raise DamagedError(f"{path}: is no whole IndexFlatIP ({size} bytes). Run `negpipe index`")
    return Vectors((_File(path, 0, rows, np.dtype("<f4"), len(header)),), dimension)


def pair_scores(anchors: Floats, anchor_of: Ints, vectors: Floats, row_of: Ints) -> Floats:
    """Inner products of pairs: the one function whose scores are stored.

    Args:
        anchors: (n, d) float32. vectors: (m, d) float32.
        anchor_of, row_of: (p,) int64, the pair's row in each.

    Returns:
        (p,) float32; the bits of a pair do not depend on the other pairs, on their order or on threads.

    Raises:
        IndexError: a pair names a row that is not there.
    """
    for index, rows in ((anchor_of, len(anchors)), (row_of, len(vectors))):
        if len(index) and not 0 <= index.min() <= index.max() < rows:
            raise IndexError(f"pairs name rows {index.min()} to {index.max()} of {rows}")
    arrays = [
        np.ascontiguousarray(array, dtype)
        for array, dtype in ((anchors, "f4"), (anchor_of, "i8"), (vectors, "f4"), (row_of, "i8"))
    ]
    scores = np.empty(len(anchor_of), np.float32)
    pointers = [_faiss().swig_ptr(array) for array in (*arrays, scores)]
    _faiss().pairwise_indexed_inner_product(anchors.shape[1], len(scores), *pointers)
    scores += np.float32(0)  # -0 becomes 0, so that equal scores have equal bits
    return scores


@dataclass(frozen=True)
class Found:
    """The top of n anchors by (-score, row), and the scores of known pairs."""

    rows: Ints  # (n, depth), -1 beyond the corpus
    scores: Floats  # (n, depth), -inf beyond the corpus
    positive_scores: Floats  # (p,)


def search_exact(
    anchors: Floats,
    vectors: Vectors,
    depth: int,
    *,
    positives: tuple[Ints, Ints],
    candidates: int | None = None,
    memory: int,
    threads: int,
    progress: Callable[[int], None] = lambda rows: None,
) -> Found:
    """The `depth` best rows of every anchor, and the scores of its positives.

    Args:
        anchors: (n, d) float32.
        vectors: the corpus, fewer than 2**32 - 1 rows.
        positives: (p,) int64 anchor and (p,) int64 corpus row of each known pair.
        candidates: the rows before this one can be among the best, those after it only have positives' scores;
            None: all can.
        memory: bytes this call may use, its results included; changes no result.
        threads: threads that compute; one more reads ahead. Changes no result.
        progress: called after each block with the number of corpus rows just searched.

    Raises:
        ConfigError: `memory` does not suffice.
        DamagedError: a vector is not finite, or a file cannot be read to its end.
    """
    anchors = np.ascontiguousarray(anchors, np.float32)
    if len(anchors) and anchors.shape[1] != vectors.dimension:
        raise DamagedError(f"anchors have dimension {anchors.shape[1]}, the corpus {vectors.dimension}")
    if not np.isfinite(anchors).all():
        row = int(np.flatnonzero(~np.isfinite(anchors).all(axis=1))[0])
        raise DamagedError(f"anchor {row}: its vector is not finite. Run `negpipe encode` again")
    if vectors.rows >= 2**32 - 1:
        raise ConfigError(f"exact search takes fewer than 2**32 - 1 rows, the corpus has {vectors.rows}")
    anchor_of, row_of = positives
    positive_scores = np.full(len(row_of), -np.inf, np.float32)
    count, block_rows = _layout(len(anchors), vectors, depth, memory, threads)
    buffers = [np.empty((block_rows, vectors.dimension), np.float32) for _ in range(2)]
    last = vectors.rows if candidates is None else candidates
    # No block straddles the border.
    starts = [*range(0, last, block_rows), *range(last, vectors.rows, block_rows)]
    ends = [*starts[1:], vectors.rows]
    tiles = [_Tile(part, depth) for part in np.array_split(anchors, count)] if count else []

    def load(number: int) -> _Block:
        return _Block.load(vectors, starts[number], buffers[number % 2][: ends[number] - starts[number]])

    def score_positives(block: _Block) -> None:
        pairs = np.flatnonzero((row_of >= block.first) & (row_of < block.first + len(block.vectors)))
        positive_scores[pairs] = pair_scores(anchors, anchor_of[pairs], block.vectors, row_of[pairs] - block.first)

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(threads, initializer=_one_thread) as pool:
        ahead = reader.submit(load, 0) if starts else None
        for number in range(len(starts)):
            assert ahead is not None
            block = ahead.result()
            ahead = reader.submit(load, number + 1) if number + 1 < len(starts) else None
            work = [pool.submit(tile.search, block) for tile in tiles if block.first < last]
            work.append(pool.submit(score_positives, block))
            for done in work:
                done.result()
            progress(len(block.vectors))
        rows = np.empty((len(anchors), depth), np.int64)
        scores = np.empty((len(anchors), depth), np.float32)
        first = 0
        for tile in tiles:
            here = slice(first, first + len(tile.anchors))
            rows[here], scores[here] = tile.result()
            first = here.stop
    return Found(rows, scores, positive_scores)


def _one_thread() -> None:
    """faiss keeps its thread count per calling thread: the pool's threads are the only parallelism."""
    _faiss().omp_set_num_threads(1)


def _scratch(proposed: int) -> int:
    """Bytes that searching a block takes for each anchor: a strip of products, FAISS's collection, pairs, a merge."""
    return 4096 + 128 * proposed


def _layout(anchors: int, vectors: Vectors, depth: int, memory: int, threads: int) -> tuple[int, int]:
    """Number of tiles and rows of a block, so that results, two blocks and every thread's scratch fit into `memory`."""
    scratch = threads * _scratch(depth + _SPARE)
    width = min(_ANCHORS, max(1, memory // (4 * scratch)))
    # Equally many tiles a thread, or the last ones would leave threads idle at the end of each block.
    tiles = min(anchors, -(-anchors // (width * threads)) * threads)
    fixed = anchors * (depth * 20 + vectors.dimension * 4) + scratch * -(-anchors // max(1, tiles))
    row = 2 * (4 * vectors.dimension + 4)
    least = fixed + min(_READ_ROWS, vectors.rows) * row
    if least > memory:
        raise ConfigError(
            f"searching {anchors} anchors to depth {depth} with {threads} threads needs {math.ceil(least / 2**20)} MiB,"
            f" there are {memory // 2**20}: raise resources.memory_budget, or lower resources.cpus or search.depth"
        )
    return tiles, max(1, min(_BLOCK_ROWS, vectors.rows, (memory - fixed) // row))


@dataclass(frozen=True)
class _Block:
    """Consecutive rows of the corpus."""

    first: int
    vectors: Floats
    longest: float  # the largest norm

    @classmethod
    def load(cls, source: Vectors, first: int, vectors: Floats) -> _Block:
        """Fill `vectors` with the rows from `first` on."""
        source.read(first, vectors)
        squares = np.einsum("ij,ij->i", vectors, vectors)
        if not np.isfinite(squares).all():
            place = source.place(first + int(np.flatnonzero(~np.isfinite(squares))[0]))
            raise DamagedError(f"{place}: the vector is not finite. Run `negpipe encode` again")
        return cls(first, vectors, math.sqrt(float(squares.max(initial=0.0))))


@dataclass
class _Tile:
    """Up to `_ANCHORS` anchors and the keys of the best rows each has met so far."""

    anchors: Floats
    depth: int
    best: Keys = field(init=False)  # (w, depth); the worst key last, the others in any order

    def __post_init__(self) -> None:
        width, dimension = self.anchors.shape
        self.best = np.full((width, self.depth), _NOTHING)
        # Float32 inner products summed in different orders differ by at most 2 * gamma_d * |q| * |v|, gamma_d about
        # d * 2**-24 (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1); 8 covers the "about".
        self.slack = np.linalg.norm(self.anchors.astype(np.float64), axis=1) * (dimension + 8) * 2.0**-23

    def search(self, block: _Block) -> None:
        """Let the rows of a block compete."""
        rows = len(block.vectors)
        proposed = min(self.depth + _SPARE, rows)
        room = len(self.anchors) * _scratch(proposed)
        waiting = np.arange(len(self.anchors))
        while len(waiting):
            chunk = max(1, room // _scratch(proposed))
            unproven = [self._compete(block, waiting[i : i + chunk], proposed) for i in range(0, len(waiting), chunk)]
            waiting = np.concatenate(unproven)
            proposed = min(4 * proposed, rows)

    def result(self) -> tuple[Ints, Floats]:
        """Rows and scores, (w, depth) each, in order."""
        self.best.sort(axis=1)
        rows = (self.best & np.uint64(0xFFFFFFFF)).astype(np.int64)
        rows[self.best == _NOTHING] = -1
        return rows, _scores(self.best)

    def _compete(self, block: _Block, chosen: Ints, proposed: int) -> Ints:
        """Merge the rows FAISS proposes to the chosen anchors; returns the anchors to whom others may belong."""
        best, anchors = self.best[chosen], self.anchors[chosen]
        knn = _faiss().knn(anchors, block.vectors, proposed, metric=_faiss().METRIC_INNER_PRODUCT)
        products: Floats = knn[0]
        rows: Ints = knn[1]
        anchor_of, column = np.nonzero(products >= self._cut(best, chosen, block)[:, None])
        row_of = rows[anchor_of, column]
        keys = np.full(products.shape, _NOTHING)
        keys[anchor_of, column] = _keys(pair_scores(anchors, anchor_of, block.vectors, row_of), block.first + row_of)
        table = np.concatenate((best, keys), axis=1)
        table.partition(self.depth - 1, axis=1)
        best = table[:, : self.depth]
        proven = products[:, -1] < self._cut(best, chosen, block) if proposed < len(block.vectors) else True
        proven = np.broadcast_to(proven, len(chosen))
        self.best[chosen[proven]] = best[proven]
        return chosen[~proven]

    def _cut(self, best: Keys, chosen: Ints, block: _Block) -> Floats:
        """The product below which a row of the block cannot displace any of the best, or -inf."""
        lowest = _scores(best[:, -1]) - self.slack[chosen] * block.longest - _TINY
        cut: Floats = np.nextafter(lowest.astype(np.float32), np.float32(-np.inf))
        return cut


def _keys(scores: Floats, rows: Ints) -> Keys:
    """One integer a pair that sorts like (-score, row)."""
    return (_flip(scores.view(np.int32)).view(np.uint32).astype(np.uint64) << np.uint64(32)) | rows.astype(np.uint64)


def _scores(keys: Keys) -> Floats:
    return _flip((keys >> np.uint64(32)).astype(np.uint32).view(np.int32)).view(np.float32)


def _flip(bits: NDArray[np.int32]) -> NDArray[np.int32]:
    """The bits of float32 numbers, changed so that as unsigned integers they fall where the numbers rise; and back."""
    return bits ^ (~(bits >> 31) & np.int32(0x7FFFFFFF))
