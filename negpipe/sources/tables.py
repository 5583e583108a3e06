"""Rows of any table: a JSON Lines, CSV, TSV or Parquet file, local or remote, or a split of a dataset.

Memory is bounded by one line or one batch. What is wrong with a whole table raises InputError when its first
row is asked for; what is wrong with one row comes out as a BadRow.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple, TypeAlias

from negpipe.errors import InputError
from negpipe.sources import hub
from negpipe.sources.places import EXTENSIONS, Table, bare_name, extension_of, locate
from negpipe.sources.records import BadRow, Place, RowError, raw_of

_BATCH_ROWS = 1024
_RAW_BYTES = 4096  # enough to show how a broken line begins
_log = logging.getLogger(__name__)


class Column(NamedTuple):
    """A wanted column: its name in the table and the config key that names it."""

    name: str
    key: str
    required: bool = True


class Row(NamedTuple):
    """The values of the wanted columns, in their order; None for null or absent. `raw`: the row as it was read."""

    place: Place
    values: Sequence[Any]
    raw: str | Sequence[Any]


Rows: TypeAlias = Iterator[Row | BadRow]


def rows(table: Table, columns: Sequence[Column]) -> Rows:
    """The rows of a table.

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
            f"unknown kind of file '{extension}'", file=table.path, remedy=f"Known: {', '.join(EXTENSIONS)}, also .gz"
        )
    _log.info("reading %s", table.path)
    yield from _READERS[extension](table.path, columns)


def all_splits(table: Table, columns: Sequence[Column]) -> dict[str, Rows]:
    """The rows of every split of a dataset, by split."""
    splits = hub.load(table.path, table.subset, table.revision)
    return {split: _dataset(table, split, dataset, columns) for split, dataset in splits.items()}


def _open(path: str) -> Any:
    import fsspec

    try:
        file = fsspec.open(path, "rb", compression="gzip" if bare_name(path).endswith(".gz") else None).open()
    except FileNotFoundError:
        raise InputError("there is no such file", file=path, remedy="Check the address") from None
    except (ImportError, ValueError) as error:
        raise InputError("this kind of address cannot be opened", file=path, remedy=str(error)) from None
    except OSError as error:
        raise InputError(f"the file cannot be opened ({error})", file=path, remedy="Check address and rights") from None
    return io.BufferedReader(file, 2**20) if "://" in path else file


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    number = 0
    with _open(path) as file:
        try:
            for number, line in enumerate(file, 1):
                yield number, line
        except (EOFError, zlib.error, OSError) as error:
            raise InputError(
                f"the file cannot be read on ({error})", file=path, row=number + 1, remedy="Fetch or pack it again"
            ) from None


def _decode(line: bytes, place: Place) -> str:
    try:
        return line.decode("utf-8-sig" if place.row == 1 else "utf-8")
    except UnicodeDecodeError as error:
        problem = f"invalid UTF-8 at byte {error.start} of the line"
        raise RowError("broken", problem, place, remedy="Save the file as UTF-8") from None


def _decoded(path: str) -> Iterator[str]:
    for number, line in _lines(path):
        try:
            yield _decode(line, Place(path, number))
        except RowError as error:  # a quoted field may run over several lines, so no single row is to blame
            raise error.row.error from None


def _jsonl(path: str, columns: Sequence[Column]) -> Rows:
    names = [column.name for column in columns]
    checked = False
    for number, line in _lines(path):
        if line.isspace():
            continue
        place = Place(path, number)
        try:
            text = _decode(line, place).rstrip("\r\n")
            row = _object(text, place)
        except RowError as error:
            yield error.row._replace(raw=raw_of(line[:_RAW_BYTES].decode(errors="backslashreplace")))
            continue
        if not checked:
            _check(columns, list(row), path, number)
            checked = True
        yield Row(place, [row.get(name) for name in names], text)


def _object(line: str, place: Place) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        what = str(error)
        if isinstance(error, json.JSONDecodeError):
            what = f"{error.msg.removesuffix(' at')} at character {error.pos + 1}"
        raise RowError("broken", f"broken JSON ({what})", place, remedy="Write one JSON object a line") from None
    if not isinstance(row, dict):
        raise RowError("broken", "the line is not a JSON object", place, remedy='Write {"...": ...} on every line')
    # Only an escape can bring half a surrogate pair in: such a text could be neither written nor hashed.
    if "\\ud" in line or "\\uD" in line:
        for name, value in row.items():
            if not (_whole(name) and _whole(value)):
                field, remedy = name if _whole(name) else None, "Write the whole character, or leave it out"
                raise RowError("broken", "half a surrogate pair (\\ud800 to \\udfff)", place, field, remedy)
    return row


def _whole(value: Any) -> bool:
    """Whether every character in it can be written."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _csv(path: str, columns: Sequence[Column], delimiter: str = ",") -> Rows:
    csv.field_size_limit(2**31 - 1)  # the default refuses documents longer than 128 KiB
    # strict: a quote in the wrong place is an error instead of a text silently joined to the next rows
    reader = csv.reader(_decoded(path), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    wanted: list[int | None] = []
    while True:
        start = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            if header is None:
                raise InputError("the file is empty", file=path, row=1, remedy="Its first line is the header") from None
            return
        except csv.Error as error:
            remedy = "Put fields that hold quotes or line ends in quotes and double the quotes inside, or use JSONL"
            raise InputError(f"broken quoting ({error})", file=path, row=start, remedy=remedy) from None
        if not fields:
            continue
        if header is None:
            header = fields
            _check(columns, header, path, start, _header_hint(header, delimiter))
            wanted = [header.index(column.name) if column.name in header else None for column in columns]
        elif len(fields) != len(header):
            problem = f"{len(fields)} fields, but the header names {len(header)}"
            bad = RowError("broken", problem, Place(path, start), remedy="Check separators and quotes").row
            yield bad._replace(raw=raw_of(fields))
        else:
            yield Row(Place(path, start), [None if at is None else fields[at] for at in wanted], fields)


def _tsv(path: str, columns: Sequence[Column]) -> Rows:
    return _csv(path, columns, "\t")


def _header_hint(header: list[str], delimiter: str) -> str:
    name = {",": "commas", "\t": "tabs"}[delimiter]
    parts = delimiter.join(header).split()
    if len(parts) == 4 and parts[1] in ("0", "Q0"):
        return (
            "This looks like TREC qrels: put the header query-id, corpus-id, score in front, drop the second column"
            f" and separate by {name}"
        )
    if len(header) == 1 and any(sign in header[0] for sign in "\t,; "):
        return f"The fields are not separated by {name}: write them so, or use the file's right extension"
    if header[-1].replace(".", "").isdecimal():
        return "The file seems to have no header: its first line names the columns"
    return ""


def _parquet(path: str, columns: Sequence[Column]) -> Rows:
    import pyarrow
    import pyarrow.parquet

    with _open(path) as file:
        try:
            parquet = pyarrow.parquet.ParquetFile(file, pre_buffer=False)
            _check(columns, parquet.schema_arrow.names, path)
            names = _there(columns, parquet.schema_arrow.names)
            yield from _arrow(parquet.iter_batches(_BATCH_ROWS, columns=names), names, columns, path)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            problem = f"not a readable Parquet file ({error})"
            raise InputError(problem, file=path, remedy="Fetch or write it again") from None


def _dataset(table: Table, split: str, dataset: Any, columns: Sequence[Column]) -> Rows:
    place = f"{table.path} ({', '.join(filter(None, (table.subset, split)))})"
    _check(columns, dataset.column_names, place)
    _log.info("reading %s", place)
    names = _there(columns, dataset.column_names)
    yield from _arrow(dataset.select_columns(names).with_format("arrow").iter(_BATCH_ROWS), names, columns, place)


def _arrow(batches: Iterable[Any], names: list[str], columns: Sequence[Column], file: str) -> Rows:
    first = 0
    for batch in batches:
        values = [
            _values(batch.column(column.name), file, first, column.name) if column.name in names else repeat(None)
            for column in columns
        ]
        for row, cells in enumerate(zip(*values, strict=False), first):
            yield Row(Place(file, row), cells, cells)
        first += batch.num_rows


def _values(column: Any, file: str, first: int, field: str) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        for row, scalar in enumerate(column, first):
            try:
                scalar.as_py()
            except UnicodeDecodeError as error:
                problem = f"invalid UTF-8 at byte {error.start}"
                raise InputError(problem, file=file, row=row, field=field, remedy="Write UTF-8 text") from None
        raise
    return values


def _there(columns: Sequence[Column], there: Sequence[str]) -> list[str]:
    """The wanted columns that there are, each once: one column may be wanted for two things."""
    return list(dict.fromkeys(column.name for column in columns if column.name in there))


def _check(columns: Sequence[Column], there: Sequence[str], file: str, row: int | None = None, hint: str = "") -> None:
    for column in columns:
        if column.required and column.name not in there:
            remedy = f"Columns here: {', '.join(there)}. {hint or f'Name the right one in {column.key}'}"
            raise InputError("there is no such column", file=file, row=row, field=column.name, remedy=remedy)
        if list(there).count(column.name) > 1:
            raise InputError("two columns have this name", file=file, row=row, field=column.name, remedy="Rename one")


_READERS: dict[str, Callable[[str, Sequence[Column]], Rows]] = {
    ".jsonl": _jsonl,
    ".json": _jsonl,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
