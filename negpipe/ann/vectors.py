"""Vectors in files: .npy parts, or one file that FAISS opens; read as float32, a block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from negpipe.ann.library import faiss
from negpipe.data.arrays import Floats, Ints
from negpipe.data.npy import BROKEN, header
from negpipe.errors import DamagedError
from negpipe.store import mapped

READ_ROWS = 1024


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

        Reads instead of mapping, so that pages of a large file do not count as this process's memory.

        Raises:
            DamagedError: a file ends early or cannot be read.
        """
        for file in self.files:
            low, high = max(start, file.first), min(start + len(out), file.first + file.rows)
            for row in range(low, high, READ_ROWS):
                stop = min(row + READ_ROWS, high)
                size = (stop - row) * self.dimension
                offset = file.offset + (row - file.first) * self.dimension * file.dtype.itemsize
                try:
                    values = np.fromfile(file.path, file.dtype, size, offset=offset)
                except OSError as error:
                    raise DamagedError(f"{file.path}: cannot be read ({error}). Run `negpipe verify`") from None
                if len(values) < size:
                    raise DamagedError(f"{file.path}: ends before row {stop - file.first}. Run `negpipe verify`")
                out[row - start : stop - start] = values.reshape(-1, self.dimension)

    def take(self, rows: Ints) -> Floats:
        """Some rows, in the order given, as (len(rows), dimension) float32; reads only their pages."""
        out = np.empty((len(rows), self.dimension), np.float32)
        for file in self.files:
            here = np.flatnonzero((rows >= file.first) & (rows < file.first + file.rows))
            if len(here):
                stored = mapped.numbers(file.path, file.dtype, file.offset, (file.rows, self.dimension))
                out[here] = stored[rows[here] - file.first]
        return out

    def all(self) -> Floats:
        """Every row, as (rows, dimension) float32."""
        out = np.empty((self.rows, self.dimension), np.float32)
        self.read(0, out)
        return out

    def blocks(self, rows: int) -> Iterator[tuple[int, Floats]]:
        """(first row, (m, dimension) float32) for at most `rows` rows at a time, each a new array.

        Whoever deletes a block before asking for the next holds only one in memory.
        """
        for start in range(0, self.rows, rows):
            block = np.empty((min(rows, self.rows - start), self.dimension), np.float32)
            self.read(start, block)
            yield start, block
            del block

    def place(self, row: int) -> str:
        """The file of a row and its row in that file, for messages."""
        file = next(file for file in self.files if row < file.first + file.rows)
        return f"{file.path}, row {row - file.first}"


@dataclass(frozen=True)
class Held:
    """Vectors in memory, for code that takes vectors in files: (rows, dimension) float32."""

    values: Floats

    @property
    def rows(self) -> int:
        return len(self.values)

    @property
    def dimension(self) -> int:
        return int(self.values.shape[1])

    def read(self, start: int, out: Floats) -> None:
        out[:] = self.values[start : start + len(out)]

    def place(self, row: int) -> str:
        return f"vector {row}"


def open_parts(paths: Sequence[Path]) -> Vectors:
    """Vectors of .npy files (m, dimension) of float16 or float32, in the given order. Reads only the headers.

    Raises:
        DamagedError: a file is missing, cut off, or does not hold such vectors, all of one dimension.
    """
    files: list[_File] = []
    first, dimension = 0, 0
    for path in paths:
        try:
            shape, dtype, in_rows, offset = header(path)
        except BROKEN as error:
            raise DamagedError(f"{path}: is not a complete .npy file ({error}). Run `negpipe verify`") from None
        shaped = in_rows and len(shape) == 2 and shape[1] == (dimension := dimension or shape[1])
        if not shaped or dtype not in (np.float16, np.float32):
            raise DamagedError(
                f"{path}: holds {dtype} of shape {shape}, expected float16 or float32 vectors of"
                f" dimension {dimension}. Run `negpipe verify`"
            )
        files.append(_File(path, first, shape[0], dtype, offset))
        first += shape[0]
    return Vectors(tuple(files), dimension)


def write_part(values: NDArray[Any], file: BinaryIO) -> None:
    """Write (m, dimension) vectors of float16 or float32 in the format of `open_parts`."""
    np.save(file, values, allow_pickle=False)


def _flat_header(dimension: int, rows: int) -> bytes:
    """The bytes that faiss writes before the vectors of an IndexFlatIP: an empty index's, with the counts set."""
    header = bytearray(faiss().serialize_index(faiss().IndexFlatIP(dimension)).tobytes())
    header[8:16] = rows.to_bytes(8, "little")
    header[-8:] = (rows * dimension).to_bytes(8, "little")
    return bytes(header)


def write_flat(file: BinaryIO, vectors: Vectors) -> None:
    """Write an `IndexFlatIP` that `faiss.read_index` opens, one tile of rows in memory at a time."""
    file.write(_flat_header(vectors.dimension, vectors.rows))
    for _, block in vectors.blocks(READ_ROWS):
        file.write(block.astype("<f4", copy=False).data)


def open_flat(path: Path) -> Vectors:
    """The vectors of a file written by `write_flat`.

    Raises:
        DamagedError: the file is missing, is not an IndexFlatIP, or its size contradicts its header.
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
        raise DamagedError(f"{path}: is not a complete IndexFlatIP ({size} bytes). Run `negpipe index`")
    return Vectors((_File(path, 0, rows, np.dtype("<f4"), len(header)),), dimension)
