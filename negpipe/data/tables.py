"""Arrow IPC parts: written as bytes, memory-mapped for reading, gathered by row across parts.

Nothing here holds an entire corpus: a gather touches only the requested rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from negpipe.config.schema import Config
from negpipe.data.arrays import Hashes, Ints
from negpipe.data.texts import hashes
from negpipe.engine.manifest import Manifest, Part
from negpipe.errors import DamagedError
from negpipe.store import mapped

_PAGE = 1024  # rows
EXTRA = "extra:"
"""Prefix of the names of columns kept by `data.extra`."""


def documents(manifest: Manifest) -> list[Part]:
    """The parts of ingest or encode with documents, in row order."""
    return manifest.of_kind("corpus") + manifest.of_kind("added")


def texts(manifest: Manifest) -> list[Part]:
    """The parts of ingest or encode with texts or their vectors, in order: documents, then anchors."""
    return documents(manifest) + manifest.of_kind("anchors")


def searchable(manifest: Manifest, config: Config) -> list[Part]:
    """The parts whose documents can be candidates."""
    return documents(manifest) if config.data.add_positives else manifest.of_kind("corpus")


def to_bytes(table: pa.Table) -> pa.Buffer:
    """A table as one Arrow IPC file with one record batch; equal tables give equal bytes."""
    # Concatenating copies only the values; a slice would include more of its parent's buffers.
    columns = [pa.concat_arrays([*column.chunks, pa.array([], column.type)]) for column in table.columns]
    table = pa.table(columns, schema=table.schema)
    counted = pa.MockOutputStream()
    write(table, counted)
    content = pa.allocate_buffer(counted.size())
    write(table, pa.FixedSizeBufferWriter(content))
    return content


def write(table: pa.Table, sink: Any) -> None:
    """Write a table as an Arrow IPC file, with unchanged record batches."""
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def open_table(path: Path) -> pa.Table:
    """Memory-map an Arrow IPC file.

    Raises:
        DamagedError: the file is incomplete.
    """
    try:
        table = pa.ipc.open_file(mapped.arrow(path)).read_all()
        table.validate()
        if not all(_ascending(chunk) for column in table.columns for chunk in column.chunks):
            raise pa.ArrowInvalid("a value ends before it begins")
    except (OSError, pa.ArrowException) as error:
        raise DamagedError(f"{path} cannot be read ({error}): run `negpipe verify`, then run the stage again") from None
    return table


def count_rows(path: Path) -> int:
    """The rows of an Arrow IPC file by the headers of its batches, without looking at values.

    Raises:
        OSError, pyarrow.ArrowException: they cannot be read.
    """
    with mapped.arrow(path) as file:
        reader = pa.ipc.open_file(file)
        return sum(reader.get_batch(number).num_rows for number in range(reader.num_record_batches))


def _ascending(array: pa.Array) -> bool:
    """Whether the offsets of texts and lists ascend: reading a damaged one would crash the process."""
    if pa.types.is_list(array.type):
        lengths, inner = pc.list_value_length(array), _ascending(array.values)
    elif pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        lengths, inner = pc.binary_length(array), True
    else:
        return True
    return inner and (pc.min(lengths).as_py() or 0) >= 0


class Rows:
    """The rows of several parts as one table, in order, without loading it."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._tables = [open_table(path) for path in paths]
        self.starts = np.cumsum([0, *(table.num_rows for table in self._tables)], dtype=np.int64)
        pages = np.arange(0, max(1, len(self)), _PAGE)
        self._part_of = np.searchsorted(self.starts, pages, side="right") - 1

    def __len__(self) -> int:
        return int(self.starts[-1])

    def find(self, ids: set[str]) -> dict[str, int]:
        """The rows of ids, by any id of a row; unknown ids are left out."""
        names = sorted(ids)
        name_of = dict(zip(hashes(names).tolist(), names, strict=True))
        wanted = np.fromiter(name_of, np.uint64, len(name_of))
        found: dict[str, int] = {}
        for start, table in zip(self.starts, self._tables, strict=False):
            for row in np.flatnonzero(np.isin(table["id_hash"].to_numpy(), wanted)):
                found[name_of[int(table["id_hash"][int(row)].as_py())]] = int(start + row)
            others = table["other_ids"]
            for row in np.flatnonzero(pc.list_value_length(others).to_numpy() > 0):
                found |= {name: int(start + row) for name in others[int(row)].as_py() if name in ids}
        return found

    def numbers(self, column: str, rows: Ints) -> npt.NDArray[Any]:
        """A numeric column at `rows` (any shape, every row valid), in that shape."""
        flat = rows.ravel()
        columns = [table[column] for table in self._tables]
        out = np.empty(flat.shape, dtype=columns[0].type.to_pandas_dtype() if columns else np.int64)
        for part, where in self._by_part(flat):
            out[where] = columns[part].to_numpy()[flat[where] - self.starts[part]]
        return out.reshape(rows.shape)

    def hashes(self, column: str, rows: Ints) -> Hashes:
        """`hashed` of a text column at `rows` (any shape, every row valid), in that shape; each text is read once."""
        unique, inverse = np.unique(rows, return_inverse=True)
        out = np.empty(len(unique), np.uint64)
        for part, where in self._by_part(unique):
            out[where] = hashed(self._tables[part][column].take(pa.array(unique[where] - self.starts[part])))
        return out[inverse].reshape(rows.shape)

    def strings(self, column: str, rows: Ints) -> pa.LargeStringArray:
        """A text column at `rows` (1-D, any order, repeats allowed; each text is read once)."""
        return self.encoded([column], rows)[0].dictionary_decode()

    def encoded(self, columns: Sequence[str], rows: Ints) -> list[pa.DictionaryArray]:
        """Text columns at `rows` (1-D, any order, repeats allowed), each text read and held once."""
        if not columns:
            return []
        unique, inverse = np.unique(rows, return_inverse=True)
        codes = pa.array(inverse.astype(np.int32))
        where = [
            (part, pa.array(unique[low:high] - self.starts[part]))
            for part, (low, high) in enumerate(pairwise(np.searchsorted(unique, self.starts)))
            if high > low
        ]
        found = []
        for column in columns:
            pieces = [self._tables[part][column].take(at) for part, at in where]
            chunks = [pc.cast(chunk, pa.large_string()) for piece in pieces for chunk in piece.chunks]
            values = pa.concat_arrays(chunks) if chunks else pa.array([], pa.large_string())
            # Ids and texts are unique per row.
            found.append(dictionary(values, codes, distinct=column in ("id", "text")))
        return found

    def sizes(self, column: str, rows: Ints) -> Ints:
        """Bytes of a text column at `rows` (1-D), without reading the texts."""
        out = np.empty(rows.shape, np.int64)
        for part, where in self._by_part(rows):
            # A part is one record batch, so a column is one chunk.
            texts = self._tables[part][column].chunk(0)
            width = np.int64 if pa.types.is_large_string(texts.type) else np.int32  # documents, anchors
            offsets = np.frombuffer(texts.buffers()[1], width)[texts.offset :]
            at = rows[where] - self.starts[part]
            out[where] = offsets[at + 1] - offsets[at]
        return out

    def _by_part(self, rows: Ints) -> list[tuple[int, Ints]]:
        """For every part with some of `rows`: the positions of those rows."""
        if not rows.size:
            return []
        # The part where a row's page begins, or one soon after it. Small integers are radix-sorted.
        parts = self._part_of[rows // _PAGE]
        while (later := rows >= self.starts[parts + 1]).any():
            parts += later
        order = np.argsort(parts.astype(np.min_scalar_type(len(self._tables))), kind="stable")
        bounds = np.searchsorted(parts[order], np.arange(len(self._tables) + 1))
        return [(part, order[low:high]) for part, (low, high) in enumerate(pairwise(bounds)) if high > low]


def hashed(texts: pa.ChunkedArray) -> Hashes:
    """64-bit digests of values, each distinct one hashed once; 0 for null or an empty text (CSV has no null)."""
    encoded = texts.cast(pa.large_string()).combine_chunks().dictionary_encode()
    digested = np.append(hashes(encoded.dictionary), np.uint64(0))
    digested[:-1][pc.equal(encoded.dictionary, "").to_numpy(zero_copy_only=False)] = 0
    places: npt.NDArray[np.int32] = encoded.indices.fill_null(len(encoded.dictionary)).to_numpy()
    found: Hashes = digested[places]
    return found


def dictionary(values: pa.LargeStringArray, codes: pa.Int32Array, *, distinct: bool) -> pa.DictionaryArray:
    """`values` at `codes`. Equal values share an entry, as Parquet requires; `distinct`: no values are equal."""
    if distinct:
        return pa.DictionaryArray.from_arrays(codes, values)
    encoded = values.dictionary_encode()
    return pa.DictionaryArray.from_arrays(encoded.indices.take(codes), encoded.dictionary)


def within(lengths: Ints) -> Ints:
    """Positions within consecutive ragged lists: 0, 1, … lengths[0] - 1, 0, 1, … lengths[1] - 1, …"""
    return np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def members(offsets: Ints, wanted: Ints) -> tuple[Ints, Ints]:
    """Some of the lists that are ragged by `offsets`, in any order, repeats allowed.

    Returns:
        positions of their values, and the offsets of the lists among those.
    """
    lengths = offsets[wanted + 1] - offsets[wanted]
    return np.repeat(offsets[wanted], lengths) + within(lengths), np.concatenate([[0], np.cumsum(lengths)])


def ragged(column: pa.ChunkedArray) -> tuple[npt.NDArray[Any], Ints]:
    """A list column as (values, offsets): row i is `values[offsets[i]:offsets[i + 1]]`."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return array.flatten().to_numpy(zero_copy_only=False), offsets
