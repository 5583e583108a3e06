"""Rows of any table: JSON, JSON Lines, CSV, TSV or Parquet files, local or remote, or a split of a dataset.

Memory is bounded by one line, element or batch. An error in an entire table raises InputError when its first row is
requested; an error in one row yields a BadRow.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, TypeAlias

import numpy as np

from negpipe.errors import InputError
from negpipe.sources import hub
from negpipe.sources.chunks import ArrowChunk, Check, Chunk, Column, ElementsChunk, FieldsChunk, JsonChunk, decoded
from negpipe.sources.elements import elements, keys
from negpipe.sources.places import ALL, EXTENSIONS, PACKED, SourceTable, extension_of, file_system, locate
from negpipe.sources.records import BadRow, Place, RowError

_ROWS = 8192  # maximum per chunk, if they are not JSON lines
_BLOCK_BYTES = 2**22  # per chunk, approximately
_STREAMED = 1024  # rows per chunk of a dataset of unknown size
_ELEMENTS = 256  # elements of a JSON list per chunk
_FIRST = 64  # rows that are searched for columns
_WHOLE_BYTES = 2**20  # of JSON, enough to detect whether it is one text
_NAME = 64  # characters, longer than the name of a column
_SIGNS = {"\t": "tab", ";": "semicolon", "|": "pipe", ",": "comma", " ": "' '"}  # as delimiters are set
CUT = (EOFError, OSError, zlib.error, lzma.LZMAError, UnicodeDecodeError)
"""Errors of a compressed file that is truncated or damaged, and of one that is not UTF-16."""
_log = logging.getLogger(__name__)

Chunks: TypeAlias = Iterator[Chunk]
_Reader: TypeAlias = Callable[[Check, SourceTable], Chunks]
"""Reads the file of the check."""


def chunks(table: SourceTable, columns: Sequence[Column], watched: tuple[str, ...] = ()) -> Chunks:
    """Consecutive rows of a table, some at a time; `watched`: see `Check`.

    Raises:
        InputError: a file, split or column is not found, unknown extension, unreadable content.
    """
    for path in table.paths:
        if locate(path) in ("hub", "folder"):
            one = table._replace(paths=(path,))
            split, dataset = _split(one)
            yield from _dataset(one, split, dataset, columns)
        else:
            _log.info("reading %s", path)
            yield from _reader(path)(Check(columns, path, watched), table)


def column_names(table: SourceTable) -> list[str]:
    """The columns of a table, from all its files; for JSON, those of the first row.

    Raises:
        InputError: as in `chunks`, and if no row can be read.
    """
    found: dict[str, None] = {}
    for path in table.paths:
        if locate(path) in ("hub", "folder"):
            found |= dict.fromkeys(_columns_of(_split(table._replace(paths=(path,)))[1]))
            continue
        check, bad = Check([], path), None
        for chunk in _reader(path)(check, table):
            rows = list(islice(chunk.rows(), _FIRST))
            bad = bad or next((row for row in rows if isinstance(row, BadRow)), None)
            if check.done or bad:
                break
        if bad and not check.done:
            raise bad.error
        found |= dict.fromkeys(check.there)
    return list(found)


def inside(path: str, key: str) -> list[str]:
    """The texts of the elements under a key of a file's only JSON object.

    Raises InputError: the file is not one object, or lacks the key.
    """
    with opened(path) as file:
        return [text for _, text in elements(file, path, key)]


def keys_of(path: str) -> list[str]:
    """The keys of a file with one JSON object; empty for other files."""
    with opened(path) as file:
        try:
            return keys(file, path)
        except (*CUT, InputError):
            return []


def _split(table: SourceTable) -> tuple[str, Any]:
    """The split of a dataset to read, and its rows."""
    splits = hub.load(table.path, table.subset, table.revision, streaming=table.streaming)
    if table.split == ALL and ALL not in splits:
        import datasets

        whole = list(splits.values())
        return ALL, whole[0] if len(whole) == 1 else datasets.concatenate_datasets(whole)
    if table.split is None and len(splits) > 1 and "train" not in splits:
        raise InputError(
            f"the dataset has several splits ({', '.join(splits)})", file=table.path, field="split", remedy="Set one"
        )
    split = table.split or ("train" if "train" in splits else next(iter(splits)))
    if split not in splits:
        problem, remedy = f"split '{split}' not found", f"Available splits: {', '.join(splits)}"
        raise InputError(problem, file=table.path, field="split", remedy=remedy, there=list(splits))
    return split, splits[split]


def _reader(path: str) -> _Reader:
    """The reader of a file, by its extension."""
    extension = extension_of(path)
    if extension not in _READERS:
        raise InputError(
            f"unknown file extension '{extension}'",
            file=path,
            remedy=f"Supported: {', '.join(EXTENSIONS)}, also with {', '.join(PACKED)}",
        )
    return _READERS[extension]


def gathered(rows: Iterator[tuple[int, list[str]]], header: list[str], check: Check) -> Chunks:
    """Rows of fields, some at a time; those before an error are yielded before it is raised."""
    gathered: list[tuple[int, list[str]]] = []
    characters = 0
    while True:
        try:
            row = next(rows, None)
        except InputError:
            if gathered:
                yield FieldsChunk(check.file, gathered, header, check)
            raise
        if row is None or len(gathered) == _ROWS or characters >= _BLOCK_BYTES:
            if gathered:
                yield FieldsChunk(check.file, gathered, header, check)
            gathered, characters = [], 0
        if row is None:
            return
        gathered.append(row)
        characters += sum(map(len, row[1]))


def all_splits(table: SourceTable, columns: Sequence[Column]) -> dict[str, Chunks]:
    """The rows of every split of a dataset, by split."""
    splits = hub.load(table.path, table.subset, table.revision, streaming=table.streaming)
    return {split: _dataset(table, split, dataset, columns) for split, dataset in splits.items()}


def opened(path: str) -> Any:
    """A binary file, local or remote, decompressed, and converted to UTF-8 if its first bytes show UTF-16.

    Raises:
        InputError: the file cannot be opened.
    """
    filesystem, name = file_system(path)
    try:
        return _as_utf8(_unpacked(io.BufferedReader(filesystem.open(name, "rb"), 2**20)))
    except FileNotFoundError:
        raise InputError("file not found", file=path, remedy="Check the address") from None
    except OSError as error:
        raise InputError(f"the file cannot be opened ({error})", file=path, remedy="Check permissions") from None


def _unpacked(file: Any) -> Any:
    """The decompressed content of a file, by its first bytes, as its name may be wrong. Some files cannot seek."""
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


def _as_utf8(file: Any) -> Any:
    """A file as UTF-8, converted from UTF-16 if its first bytes show that."""
    try:
        begin = file.peek(2)[:2]
    except CUT:  # the reader reports it
        return file
    # Without a byte order mark, a zero beside the first character shows the order.
    marked = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    encoding = marked.get(begin) or {0: "utf-16-be", 1: "utf-16-le"}.get(begin.find(0))
    if encoding is None:
        return file
    import pyarrow as pa

    return io.BufferedReader(pa.transcoding_input_stream(pa.PythonFile(file, "r"), encoding, "utf-8"), 2**20)


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    number = 0
    with opened(path) as file:
        try:
            for number, line in enumerate(file, 1):
                yield number, line
        except CUT as error:
            raise _not_read(path, number + 1, error) from None


def _not_read(path: str, row: int, error: Exception) -> InputError:
    remedy = "Fetch or compress it again"
    return InputError(f"the rest of the file cannot be read ({error})", file=path, row=row, remedy=remedy)


def decoded_lines(path: str) -> Iterator[str]:
    """The lines of a text file.

    Raises:
        InputError: the file cannot be read to its end, or is not UTF-8.
    """
    for number, line in _lines(path):
        try:
            yield decoded(line, Place(path, number))
        except RowError as error:  # a quoted field may span several lines, so the error has no single row
            raise error.row.error from None


def _json(check: Check, table: SourceTable) -> Chunks:
    if table.inside or is_whole(check.file):
        yield from _elements(check, table.inside)
        return
    for first, block in _blocks(check.file):
        yield JsonChunk(check.file, first, block, check)


def is_whole(path: str) -> bool:
    """Whether a file is a JSON list, or objects that span several lines, rather than JSON Lines."""
    with opened(path) as file:
        try:
            begin = file.read(_WHOLE_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
        except CUT:
            return False
    first, ended, rest = begin.partition(b"\n")
    if first[:1] not in (b"[", b"{") or not (ended or first[:1] == b"["):
        return False
    try:
        json.loads(first)
    except UnicodeDecodeError:
        return False
    except (ValueError, RecursionError):
        return first[:1] == b"[" or bool(rest.strip() and not rest.lstrip().startswith(b"{"))
    return first[:1] == b"[" and not rest.strip()


def _elements(check: Check, inside: str | None) -> Chunks:
    gathered: list[tuple[str | None, str]] = []
    first = 0
    with opened(check.file) as file:
        try:
            for element in elements(file, check.file, inside):
                gathered.append(element)
                if len(gathered) == _ELEMENTS:
                    yield ElementsChunk(check.file, first, gathered, check)
                    first, gathered = first + len(gathered), []
        except (*CUT, InputError) as error:
            yield ElementsChunk(check.file, first, gathered, check)
            if isinstance(error, InputError):
                raise
            raise _not_read(check.file, first + len(gathered), error) from None
    if gathered:
        yield ElementsChunk(check.file, first, gathered, check)


def _blocks(path: str) -> Iterator[tuple[int, bytes]]:
    """Complete lines, some at a time, with the number of the first; the boundaries depend on the content only."""
    first, waiting = 1, bytearray()
    with opened(path) as file:
        while True:
            try:
                read = file.read(_BLOCK_BYTES)
            except CUT as error:
                yield from _last_lines(path, first)
                raise _not_read(path, first, error) from None
            waiting += read
            while waiting and (len(waiting) >= _BLOCK_BYTES or not read):
                end = waiting.rfind(b"\n", 0, _BLOCK_BYTES) + 1 or waiting.find(b"\n", _BLOCK_BYTES) + 1
                if not end and read:
                    break  # an incomplete line
                block = bytes(waiting[: end or len(waiting)])
                del waiting[: len(block)]
                yield first, block
                first += int(np.count_nonzero(np.frombuffer(block, np.uint8) == ord("\n")))
            if not read:
                return


def _last_lines(path: str, first: int) -> Iterator[tuple[int, bytes]]:
    """The lines that can be read before an error, which is then raised."""
    lines: list[bytes] = []
    try:
        lines.extend(line for number, line in _lines(path) if number >= first)
    except InputError:
        yield first, b"".join(lines)
        raise


def _separated(check: Check, table: SourceTable) -> Chunks:
    """A text file of fields."""
    dialect, path = table.dialect, check.file
    delimiter = _delimiter(path, table)
    rows = (_fields if dialect.quoting == "none" else _quoted)(path, delimiter)
    try:
        begin = next(rows, None)
    except InputError as error:
        first_line = next(decoded_lines(path))  # quoted fields with another delimiter are not broken
        if delimiter in first_line or not (remedy := not_separated([first_line], path, table)):
            raise
        raise InputError(error.problem, file=path, row=1, remedy=remedy) from None
    if begin is None:
        raise InputError("the file is empty", file=path, row=1, remedy="The first line must be the header")
    start, first = begin
    if dialect.header:
        check(dialect.header, start)
    else:
        check(first, start, cause=not_separated(first, path, table), doubt=_no_header(first, table))
    # The file may have the header nevertheless, in its first line.
    yield from gathered(rows if first == check.there else chain([begin], rows), check.there, check)


def _delimiter(path: str, table: SourceTable) -> str:
    return table.dialect.sign("," if extension_of(path) == ".csv" else "\t")


def _fields(path: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The fields of each line, with quotes as ordinary characters."""
    for number, line in enumerate(decoded_lines(path), 1):
        if text := line.rstrip("\r\n"):
            yield number, text.split(delimiter)


def _quoted(path: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The fields of each row, which may be quoted and span several lines."""
    csv.field_size_limit(2**31 - 1)  # the default rejects documents longer than 128 KiB
    # strict: a misplaced quote is an error instead of silently joining a text to the next rows
    reader = csv.reader(decoded_lines(path), delimiter=delimiter, strict=True)
    while True:
        start = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            remedy = (
                "If quotes are ordinary characters here, set data.table.quoting: none; else quote fields that contain"
                " quotes or line breaks, and double the quotes inside"
            )
            raise InputError(f"broken quoting ({error})", file=path, row=start, remedy=remedy) from None
        if fields:
            yield start, fields


def not_separated(columns: Sequence[str], path: str, table: SourceTable) -> str:
    """What to set if the only column of a file is its entire header; empty if it is not."""
    if _READERS.get(extension_of(path)) is not _separated or len(columns) != 1:
        return ""
    there = next((sign for sign in _SIGNS if sign in columns[0]), None)
    if there is None:
        return ""
    delimiter = _delimiter(path, table)
    name = {",": "commas", "\t": "tabs"}.get(delimiter, repr(delimiter))
    ways = [f"{table.section}: {{path: …, table: {{delimiter: {_SIGNS[there]}}}}}"] if table.section else []
    # Set already, data.table.delimiter suits another table.
    if table.dialect.delimiter is None or not ways:
        ways.insert(0, f"data.table.delimiter: {_SIGNS[there]}")
    return f"The fields are not separated by {name}: set {', or for this table only '.join(ways)}"


def _no_header(first: Sequence[str], table: SourceTable) -> str:
    """What to set if the first line of a file seems to be no header; empty if it seems to be one."""
    if not any(no_name(cell) or " " in cell for cell in first):
        return ""
    own = f"{table.section}.table.header"
    setting = f"data.table.header, or for this table only in {own}" if table.section else "data.table.header"
    if table.section == "data.qrels":  # the names of other tables' columns are not theirs
        setting = own
    return f"If the file has no header, set its {len(first)} columns in {setting}, such as [id, text]"


def no_name(cell: str) -> bool:
    """Whether it is too long for the name of a column, or a number."""
    return len(cell) > _NAME or cell.replace(".", "").isdecimal()


def _parquet(check: Check, _: SourceTable) -> Chunks:
    import pyarrow
    import pyarrow.parquet

    with opened(check.file) as file:
        try:
            parquet = pyarrow.parquet.ParquetFile(file, pre_buffer=False)
            check(parquet.schema_arrow.names)
            groups = [parquet.metadata.row_group(number) for number in range(parquet.num_row_groups)]
            size = _rows_of(sum(group.total_byte_size for group in groups), parquet.metadata.num_rows)
            yield from _arrow(parquet.iter_batches(size, columns=_there(check)), check)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            problem = f"not a readable Parquet file ({error})"
            raise InputError(problem, file=check.file, remedy="Fetch or write it again") from None


def _dataset(table: SourceTable, split: str, dataset: Any, columns: Sequence[Column]) -> Chunks:
    place = f"{table.path} ({', '.join(filter(None, (table.subset, split)))})"
    check = Check(columns, place)(_columns_of(dataset))
    _log.info("reading %s", place)
    wanted = dataset.select_columns(_there(check)).with_format("arrow")
    rows = _STREAMED if table.streaming else _rows_of(wanted.data.nbytes, len(wanted))
    yield from _arrow(wanted.iter(rows), check)


def _columns_of(dataset: Any) -> list[str]:
    # The columns of a stream may be unknown before its first row.
    return list(dataset.column_names or next(iter(dataset.take(1)), ()))


def _rows_of(size: int, rows: int) -> int:
    """Rows per chunk, for a table of `size` bytes and `rows` rows."""
    return max(16, min(_ROWS, _BLOCK_BYTES * rows // max(1, size)))


def _arrow(batches: Iterable[Any], check: Check) -> Chunks:
    first = 0
    for batch in batches:
        yield ArrowChunk(check.file, first, batch, check)
        first += batch.num_rows


def _there(check: Check) -> list[str]:
    """The wanted columns that exist, each once: one column may serve two purposes."""
    return list(dict.fromkeys(name for name in check.names if name in check.there))


_READERS: dict[str, _Reader] = {
    ".jsonl": _json,
    ".ndjson": _json,
    ".json": _json,
    **dict.fromkeys((".csv", ".tsv", ".txt", ".trec", ".qrels"), _separated),
    ".parquet": _parquet,
}
