"""Rows of any table: a JSON Lines, CSV, TSV or Parquet file, local or remote, or a split of a dataset.

Memory is bounded by one line or one batch. What is wrong with a whole table raises InputError when its first
row is asked for; what is wrong with one row comes out as a BadRow.
"""

from __future__ import annotations

import csv
import io
import logging
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from negpipe.errors import InputError
from negpipe.sources import hub
from negpipe.sources.chunks import ArrowChunk, Check, Chunk, Column, FieldsChunk, JsonChunk, decoded
from negpipe.sources.places import EXTENSIONS, PACKED, Table, extension_of, locate
from negpipe.sources.records import Place, RowError

__all__ = ["Chunks", "all_splits", "chunks", "judgments"]

_ROWS = 8192  # of a chunk at most, where they are not lines of JSON
_BLOCK_BYTES = 2**22  # of a chunk, about
_LINE_BYTES = 4096  # of a first line, that tell a layout
_CUT = (EOFError, OSError, zlib.error, lzma.LZMAError)
_log = logging.getLogger(__name__)

Chunks: TypeAlias = Iterator[Chunk]


def chunks(table: Table, columns: Sequence[Column]) -> Chunks:
    """Consecutive rows of a table, some at a time.

    Raises:
        InputError: no such file, split or column, unknown extension, unreadable content.
    """
    kind = locate(table.path)
    if kind in ("hub", "folder"):
        splits = hub.load(table.path, table.subset, table.revision)
        if table.split is None and len(splits) > 1 and "train" not in splits:
            raise InputError(
                f"there are several splits ({', '.join(splits)})", file=table.path, field="split", remedy="Name one"
            )
        split = table.split or ("train" if "train" in splits else next(iter(splits)))
        if split not in splits:
            raise InputError(
                f"there is no split '{split}'", file=table.path, field="split", remedy=f"Splits: {', '.join(splits)}"
            )
        yield from _dataset(table, split, splits[split], columns)
        return
    extension = extension_of(table.path)
    if extension not in EXTENSIONS:
        raise InputError(
            f"unknown kind of file '{extension}'",
            file=table.path,
            remedy=f"Known: {', '.join(EXTENSIONS)}, also with {', '.join(PACKED)}",
        )
    _log.info("reading %s", table.path)
    yield from _READERS[extension](table.path, columns)


def judgments(table: Table, columns: Sequence[Column]) -> Chunks:
    """The rows of a table of relevance judgments, which may be as TREC writes them: query, 0, document, grade."""
    if locate(table.path) == "file" and _is_trec(table.path):
        _log.info("reading %s, relevance judgments as TREC writes them", table.path)
        return _trec(table.path, columns)
    return chunks(table, columns)


def _is_trec(path: str) -> bool:
    with _open(path) as file:
        try:
            begin: list[bytes] = file.readline(_LINE_BYTES).split()
        except _CUT:
            return False
    return len(begin) == 4 and begin[1] in (b"0", b"Q0")


def _trec(path: str, columns: Sequence[Column]) -> Chunks:
    query, document, grade = (column.name for column in columns)
    gathered: list[tuple[int, list[str]]] = []
    for number, line in enumerate(_decoded(path), 1):
        if fields := line.split():
            gathered.append((number, fields))
        if len(gathered) == _ROWS:
            yield FieldsChunk(path, gathered, [query, "", document, grade], columns)
            gathered = []
    if gathered:
        yield FieldsChunk(path, gathered, [query, "", document, grade], columns)


def all_splits(table: Table, columns: Sequence[Column]) -> dict[str, Chunks]:
    """The rows of every split of a dataset, by split."""
    splits = hub.load(table.path, table.subset, table.revision)
    return {split: _dataset(table, split, dataset, columns) for split, dataset in splits.items()}


def _open(path: str) -> Any:
    import fsspec

    try:
        return _unpacked(io.BufferedReader(fsspec.open(path, "rb").open(), 2**20))
    except FileNotFoundError:
        raise InputError("there is no such file", file=path, remedy="Check the address") from None
    except (ImportError, ValueError) as error:
        raise InputError("this kind of address cannot be opened", file=path, remedy=str(error)) from None
    except OSError as error:
        raise InputError(f"the file cannot be opened ({error})", file=path, remedy="Check address and rights") from None


def _unpacked(file: Any) -> Any:
    """What a file holds, by its first bytes: a name may say nothing, or something else. Some files cannot seek."""
    import bz2
    import gzip

    begin = file.peek(6)
    if begin.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file)
    if begin.startswith(b"BZh"):
        return bz2.BZ2File(file)
    if begin.startswith(b"\xfd7zXZ\x00"):
        return lzma.LZMAFile(file)
    if begin.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd"), 2**20)
    return file


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    number = 0
    with _open(path) as file:
        try:
            for number, line in enumerate(file, 1):
                yield number, line
        except _CUT as error:
            raise _not_read(path, number + 1, error) from None


def _not_read(path: str, row: int, error: Exception) -> InputError:
    remedy = "Fetch or pack it again"
    return InputError(f"the file cannot be read on ({error})", file=path, row=row, remedy=remedy)


def _decoded(path: str) -> Iterator[str]:
    for number, line in _lines(path):
        try:
            yield decoded(line, Place(path, number))
        except RowError as error:  # a quoted field may run over several lines, so no single row is to blame
            raise error.row.error from None


def _jsonl(path: str, columns: Sequence[Column]) -> Chunks:
    check = Check(columns, path)
    for first, block in _blocks(path):
        yield JsonChunk(path, first, block, columns, check)


def _blocks(path: str) -> Iterator[tuple[int, bytes]]:
    """Whole lines, some at a time, with the number of the first; where they are cut depends on the content alone."""
    first, waiting = 1, bytearray()
    with _open(path) as file:
        while True:
            try:
                read = file.read(_BLOCK_BYTES)
            except _CUT as error:
                yield from _last_lines(path, first)
                raise _not_read(path, first, error) from None
            waiting += read
            while waiting and (len(waiting) >= _BLOCK_BYTES or not read):
                end = waiting.rfind(b"\n", 0, _BLOCK_BYTES) + 1 or waiting.find(b"\n", _BLOCK_BYTES) + 1
                if not end and read:
                    break  # a line that goes on
                block = bytes(waiting[: end or len(waiting)])
                del waiting[: len(block)]
                yield first, block
                first += int(np.count_nonzero(np.frombuffer(block, np.uint8) == ord("\n")))
            if not read:
                return


def _last_lines(path: str, first: int) -> Iterator[tuple[int, bytes]]:
    """The lines that can still be read before an error, which is raised where it is."""
    lines: list[bytes] = []
    try:
        lines.extend(line for number, line in _lines(path) if number >= first)
    except InputError:
        yield first, b"".join(lines)
        raise


def _csv(path: str, columns: Sequence[Column], delimiter: str = ",") -> Chunks:
    csv.field_size_limit(2**31 - 1)  # the default refuses documents longer than 128 KiB
    # strict: a quote in the wrong place is an error instead of a text silently joined to the next rows
    reader = csv.reader(_decoded(path), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    gathered: list[tuple[int, list[str]]] = []
    characters = 0
    while True:
        start = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            break
        except (csv.Error, InputError) as error:
            if header is not None and gathered:
                yield FieldsChunk(path, gathered, header, columns)
            if isinstance(error, InputError):
                raise
            remedy = "Put fields that hold quotes or line ends in quotes and double the quotes inside, or use JSONL"
            raise InputError(f"broken quoting ({error})", file=path, row=start, remedy=remedy) from None
        if not fields:
            continue
        if header is None:
            header = fields
            Check(columns, path)(header, start, _header_hint(header, delimiter))
            continue
        gathered.append((start, fields))
        characters += sum(map(len, fields))
        if len(gathered) == _ROWS or characters >= _BLOCK_BYTES:
            yield FieldsChunk(path, gathered, header, columns)
            gathered, characters = [], 0
    if header is None:
        raise InputError("the file is empty", file=path, row=1, remedy="Its first line is the header")
    if gathered:
        yield FieldsChunk(path, gathered, header, columns)


def _tsv(path: str, columns: Sequence[Column]) -> Chunks:
    return _csv(path, columns, "\t")


def _header_hint(header: list[str], delimiter: str) -> str:
    name = {",": "commas", "\t": "tabs"}[delimiter]
    if len(header) == 1 and any(sign in header[0] for sign in "\t,; "):
        return f"The fields are not separated by {name}: write them so, or use the file's right extension"
    if header[-1].replace(".", "").isdecimal():
        return "The file seems to have no header: its first line names the columns"
    return ""


def _parquet(path: str, columns: Sequence[Column]) -> Chunks:
    import pyarrow
    import pyarrow.parquet

    with _open(path) as file:
        try:
            parquet = pyarrow.parquet.ParquetFile(file, pre_buffer=False)
            Check(columns, path)(parquet.schema_arrow.names)
            names = _there(columns, parquet.schema_arrow.names)
            groups = [parquet.metadata.row_group(number) for number in range(parquet.num_row_groups)]
            size = _rows_of(sum(group.total_byte_size for group in groups), parquet.metadata.num_rows)
            yield from _arrow(parquet.iter_batches(size, columns=names), names, columns, path)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            problem = f"not a readable Parquet file ({error})"
            raise InputError(problem, file=path, remedy="Fetch or write it again") from None


def _dataset(table: Table, split: str, dataset: Any, columns: Sequence[Column]) -> Chunks:
    place = f"{table.path} ({', '.join(filter(None, (table.subset, split)))})"
    Check(columns, place)(dataset.column_names)
    _log.info("reading %s", place)
    names = _there(columns, dataset.column_names)
    wanted = dataset.select_columns(names).with_format("arrow")
    yield from _arrow(wanted.iter(_rows_of(wanted.data.nbytes, len(wanted))), names, columns, place)


def _rows_of(size: int, rows: int) -> int:
    """How many of so many rows make a chunk, if all together have so many bytes."""
    return max(16, min(_ROWS, _BLOCK_BYTES * rows // max(1, size)))


def _arrow(batches: Iterable[Any], names: list[str], columns: Sequence[Column], file: str) -> Chunks:
    first = 0
    for batch in batches:
        yield ArrowChunk(file, first, batch, names, columns)
        first += batch.num_rows


def _there(columns: Sequence[Column], there: Sequence[str]) -> list[str]:
    """The wanted columns that there are, each once: one column may be wanted for two things."""
    return list(dict.fromkeys(column.name for column in columns if column.name in there))


_READERS: dict[str, Callable[[str, Sequence[Column]], Chunks]] = {
    ".jsonl": _jsonl,
    ".json": _jsonl,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
