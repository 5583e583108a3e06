"""Consecutive rows of a table, read as columns if all of them are plain, else one by one.

`columns` of a chunk has the same content as its `rows`, in columns, or is None: if anything is unusual (a bad row, a
type to be checked, an escape that Python reads and Arrow does not), rows are read one by one and report errors.
"""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from negpipe.data.arrays import Ints
from negpipe.errors import InputError, closest, count_of
from negpipe.sources.records import BadRow, Place, RowError, raw_of

_log = logging.getLogger(__name__)
_RAW_BYTES = 4096  # enough to show the start of a malformed line
_DEEP = 500  # opening brackets in a line: Python rejects nesting of about 1,000 levels
_LONG = 4300  # digits of a number, the maximum that Python reads
_MOST = 2**31 - 1  # bytes that Arrow's reader accepts at a time
_DIGITS = re.compile(rb"[0-9]{%d}" % _LONG)


class Column(NamedTuple):
    """A wanted column: its name in the table, the config key for it, and alternative names if it is absent. `assumed`:
    what is assumed without it, which is said if the table has columns that nobody reads."""

    name: str
    key: str
    required: bool = True
    others: tuple[str, ...] = ()
    assumed: str = ""

    def among(self, there: Sequence[str]) -> str | None:
        """Its name among the existing columns; where names are only guessed, upper and lower case are alike."""
        names = (self.name, *self.others)
        exact = next((name for name in names if name in there), None)
        # An optional column that was not read before would change texts.
        if exact is not None or not (self.required and self.others):
            return exact
        folded = {name.casefold(): name for name in there}
        return next((folded[name] for name in names if name in folded), None)


class Row(NamedTuple):
    """The values of the wanted columns, in their order; None for null or absent. `raw`: the original row."""

    place: Place
    values: Sequence[Any]
    raw: str | Sequence[Any]


Rows: TypeAlias = Iterator[Row | BadRow]


class Values(NamedTuple):
    """One wanted column, in Arrow: strings, integers or floats, possibly with nulls, or only nulls."""

    kind: Literal["text", "integer", "number", "null"]
    array: Any


class ChunkColumns(NamedTuple):
    """All rows of a chunk: the file, (n,) int64 row numbers, and the wanted columns in order."""

    file: str
    rows: Ints
    values: list[Values]


class Chunk(Protocol):
    """Consecutive rows of a table."""

    def rows(self) -> Rows:
        """The rows one by one."""

    def columns(self) -> ChunkColumns | None:
        """All rows as columns; None: they must be read one by one."""

    @property
    def check(self) -> Check:
        """The columns of its table, known after its first row at the latest."""


@dataclass
class Check:
    """Whether a table has the wanted columns, and their names in it; `there`: its columns, once known.

    `watched`: prefixes of columns that must be in the first row if they are in any, where rows may differ.
    """

    columns: Sequence[Column]
    file: str
    watched: tuple[str, ...] = ()
    _late: set[str] = field(default_factory=set, init=False)
    names: list[str] = field(default_factory=list, init=False)
    there: list[str] = field(default_factory=list, init=False)
    done: bool = field(default=False, init=False)

    def __call__(self, there: Sequence[str], row: int | None = None, *, cause: str = "", doubt: str = "") -> Check:
        """Raises InputError: a column is missing or duplicated. `cause`: why one is missing; `doubt`: why it may be, if
        no column has a similar name."""
        self.there, self.done = list(there), True
        for column in self.columns:
            name = column.among(there)
            if column.required and name is None:
                near = closest(column.name, there)
                way = f"Did you mean '{near}'? S" if near else f"{doubt}; else s" if doubt else "S"
                way = cause or f"{way}et the right one in {column.key}"
                remedy = f"Columns here: {', '.join(there)}. {way}"
                raise InputError("column not found", file=self.file, row=row, field=column.name, remedy=remedy)
            if self.there.count(name or "") > 1:
                raise InputError("duplicate column name", file=self.file, row=row, field=name, remedy="Rename one")
            if name not in (None, column.name):
                _log.info("%s: using column '%s' for %s ('%s')", self.file, name, column.key, column.name)
            if name != column.name:  # another of its names would be missed
                self._late |= {column.name, *column.others} - {*self.there}
            self.names.append(name or column.name)
        unread = [name for name in there if name not in self.names]
        for column in self.columns:
            if column.assumed and unread and column.among(there) is None:
                said = "%s: no column '%s' (%s): %s. Columns not read: %s"
                _log.warning(said, self.file, column.name, column.key, column.assumed, ", ".join(unread))
        return self

    def row(self, there: Iterable[str], place: Place) -> None:
        """Raises InputError: a row has a relevant column that the first row lacks."""
        for name in there:
            if name not in self.there and (name in self._late - {*self.names} or self._is_watched(name)):
                problem, remedy = (
                    "the first row does not have this column",
                    "Write it in every row, with null if it is empty",
                )
                raise InputError(problem, file=self.file, row=place.row, field=name, remedy=remedy)

    def read(self, text: str, place: Place, raw: str) -> Row:
        """A row that is a JSON object. Raises RowError: it is not one."""
        row = _object(text, place)
        if not self.done:
            self(list(row), place.row)
        self.row(row, place)
        return Row(place, [row.get(name) for name in self.names], raw)

    def may_differ(self, block: bytes) -> bool:
        """Whether JSON lines may have such a column."""
        if any(json.dumps(name).encode() in block for name in self._late - {*self.names}):
            return True
        if not self.watched:
            return False
        keys = re.compile(rb'"((?:%s)\w*)"\s*:' % "|".join(self.watched).encode(), re.ASCII)
        return any(found[1].decode() not in self.there for found in keys.finditer(block))

    def _is_watched(self, name: str) -> bool:
        return name.startswith(self.watched) if self.watched else False


@dataclass(frozen=True)
class JsonChunk:
    """Complete lines of JSON objects, and the number of the first."""

    file: str
    first: int
    block: bytes
    check: Check

    def rows(self) -> Rows:
        """See `Chunk`."""
        for number, line in enumerate(io.BytesIO(self.block), self.first):
            if line.isspace():
                continue
            place = Place(self.file, number)
            try:
                text = decoded(line, place).rstrip("\r\n")
                yield self.check.read(text, place, text)
            except RowError as error:
                yield error.row._replace(raw=raw_of(line[:_RAW_BYTES].decode(errors="backslashreplace")))

    def columns(self) -> ChunkColumns | None:
        """See `Chunk`."""
        import pyarrow as pa
        import pyarrow.json

        block = self.block.removeprefix(b"\xef\xbb\xbf") if self.first == 1 else self.block
        first, lines = self._first(block), _plain(block)
        if first is None or lines is None or len(block) >= _MOST:
            return None
        if not self.check.done:
            self.check(list(first), self.first)
        if self.check.may_differ(block):
            return None
        names = list(dict.fromkeys(self.check.names))
        types = {str: pa.string(), int: pa.int64(), float: pa.float64(), type(None): pa.string()}
        kinds = [types.get(type(first.get(name))) for name in names]
        if None in kinds:
            return None
        try:
            table = pyarrow.json.read_json(
                pa.BufferReader(block),
                pyarrow.json.ReadOptions(use_threads=False, block_size=len(block) + 1),
                pyarrow.json.ParseOptions(
                    explicit_schema=pa.schema(zip(names, kinds, strict=True)), unexpected_field_behavior="ignore"
                ),
            )
        except (pa.ArrowException, UnicodeDecodeError):
            return None
        # Every line starts and ends an object: with as many objects as lines, each line is one object.
        if table.num_rows != lines:
            return None
        rows = np.arange(self.first, self.first + table.num_rows)
        return _columns(self.file, rows, {name: table[name] for name in names}, self.check.names)

    def _first(self, block: bytes) -> dict[str, Any] | None:
        """The object of the first line."""
        try:
            return _object(block.partition(b"\n")[0].decode(), Place(self.file, self.first))
        except (RowError, UnicodeDecodeError):
            return None


def _plain(block: bytes) -> int | None:
    """The number of complete JSON lines; None: Python and Arrow may read them differently."""
    array = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(array == ord("\n"))
    if not block.endswith(b"\n"):
        ends = np.append(ends, len(block))
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts < 2).any():
        return None
    last = array[ends - 1]
    last = np.where(last == ord("\r"), array[ends - 2], last)
    if not ((array[starts] == ord("{")) & (last == ord("}"))).all():
        return None
    # Half a surrogate pair is an escape; other invalid text is not UTF-8. Arrow reads Inf and -NaN as numbers.
    if _holds(array, b"\\", b"u", b"dD") or _holds(array, b"I", b"n", b"f", b" \t\r\n,]}"):
        return None
    if _holds(array, b"-", b"N"):
        return None
    opening = sum(np.count_nonzero(array == ord(sign)) for sign in "{[") - len(starts)
    if opening > _DEEP:
        every = (array == ord("{")) | (array == ord("["))
        if np.add.reduceat(every, starts, dtype=np.int64).max() > _DEEP:
            return None
    if any(_DIGITS.search(block, starts[at], ends[at]) for at in np.flatnonzero(ends - starts > _LONG)):
        return None
    return len(starts) if _is_text(block) else None


def _holds(array: npt.NDArray[np.uint8], first: bytes, *others: bytes) -> bool:
    """Whether a byte is followed by one of each of the others."""
    at = np.flatnonzero(array == ord(first))
    for place, signs in enumerate(others, 1):
        at = at[at < len(array) - place]
        at = at[np.isin(array[at + place], np.frombuffer(signs, np.uint8))]
    return bool(len(at))


def _is_text(block: bytes) -> bool:
    """Whether bytes are UTF-8."""
    import pyarrow as pa

    ends = pa.py_buffer(np.array([0, len(block)], np.int64))
    try:
        pa.LargeStringArray.from_buffers(1, ends, pa.py_buffer(block)).validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


@dataclass(frozen=True)
class ElementsChunk:
    """Elements of a JSON text, and the number of the first; those of an object come with their keys."""

    file: str
    first: int
    elements: list[tuple[str | None, str]]
    check: Check

    def rows(self) -> Rows:
        """See `Chunk`."""
        for number, (name, text) in enumerate(self.elements, self.first):
            place = Place(self.file, number)
            try:
                row = text if name is None else f'{{"key": {json.dumps(name)}, "value": {text}}}'
                yield self.check.read(row, place, text)
            except RowError as error:
                yield error.row._replace(raw=raw_of(text))

    def columns(self) -> ChunkColumns | None:
        """See `Chunk`."""
        return None


@dataclass(frozen=True)
class FieldsChunk:
    """Rows of a text file with a header: the first line and the fields of each."""

    file: str
    fields: list[tuple[int, list[str]]]
    header: list[str]
    check: Check

    def rows(self) -> Rows:
        """See `Chunk`."""
        wanted = self._places()
        for start, fields in self.fields:
            place = Place(self.file, start)
            if len(fields) != len(self.header):
                problem = f"{count_of(len(fields), 'field')}, but the header names {len(self.header)}"
                bad = RowError("broken", problem, place, remedy="Check delimiters and quotes").row
                yield bad._replace(raw=raw_of(fields))
            else:
                yield Row(place, [None if at is None else fields[at] for at in wanted], fields)

    def columns(self) -> ChunkColumns | None:
        """See `Chunk`."""
        if not self.fields or any(len(fields) != len(self.header) for _, fields in self.fields):
            return None
        import pyarrow as pa

        starts, rows = zip(*self.fields, strict=True)
        every = list(zip(*rows, strict=True))
        nothing = Values("null", pa.nulls(len(rows)))
        values = [nothing if at is None else Values("text", pa.array(every[at], pa.string())) for at in self._places()]
        return ChunkColumns(self.file, np.array(starts, np.int64), values)

    def _places(self) -> list[int | None]:
        return [self.header.index(name) if name in self.header else None for name in self.check.names]


@dataclass(frozen=True)
class ArrowChunk:
    """A batch of Arrow rows, and the number of the first; it has the existing ones of the wanted columns."""

    file: str
    first: int
    batch: Any
    check: Check

    def rows(self) -> Rows:
        """See `Chunk`."""
        values = [
            _values(self.batch.column(name), self.file, self.first, name)
            if name in self.batch.schema.names
            else repeat(None)
            for name in self.check.names
        ]
        for row, cells in enumerate(zip(*values, strict=False), self.first):
            yield Row(Place(self.file, row), cells, cells)

    def columns(self) -> ChunkColumns | None:
        """See `Chunk`."""
        rows = np.arange(self.first, self.first + self.batch.num_rows)
        there = {name: self.batch.column(name) for name in self.batch.schema.names}
        return _columns(self.file, rows, there, self.check.names)


def _columns(file: str, rows: Ints, there: dict[str, Any], wanted: Sequence[str]) -> ChunkColumns | None:
    import pyarrow as pa

    known: dict[str, Values] = {}
    for name, column in there.items():
        array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        if pa.types.is_null(array.type):
            known[name] = Values("null", array)
        elif pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
            try:
                array.validate(full=True)
            except pa.ArrowInvalid:
                return None
            known[name] = Values("text", array)
        elif pa.types.is_integer(array.type):
            known[name] = Values("integer", array)
        elif pa.types.is_floating(array.type):
            known[name] = Values("number", array)
        else:
            return None
    nothing = Values("null", pa.nulls(len(rows)))
    return ChunkColumns(file, rows, [known.get(name, nothing) for name in wanted])


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


def decoded(line: bytes, place: Place) -> str:
    """A line as text. Raises RowError: it is not UTF-8."""
    try:
        return line.decode("utf-8-sig" if place.row == 1 else "utf-8")
    except UnicodeDecodeError as error:
        problem = f"invalid UTF-8 at byte {error.start} of the line"
        raise RowError("broken", problem, place, remedy="Save the file as UTF-8") from None


def _object(line: str, place: Place) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        what = str(error)
        if isinstance(error, json.JSONDecodeError):
            what = f"{error.msg.removesuffix(' at')} at character {error.pos + 1}"
        raise RowError("broken", f"broken JSON ({what})", place, remedy="Write one JSON object per line") from None
    if not isinstance(row, dict):
        raise RowError("broken", "the line is not a JSON object", place, remedy='Write {"...": ...} on every line')
    # Only an escape can contain half a surrogate pair: such a text can be neither written nor hashed.
    if "\\ud" in line or "\\uD" in line:
        for name, value in row.items():
            if not (_whole(name) and _whole(value)):
                field, remedy = name if _whole(name) else None, "Write the complete character, or remove it"
                raise RowError("broken", "half a surrogate pair (\\ud800 to \\udfff)", place, field, remedy)
    return row


def _whole(value: Any) -> bool:
    """Whether all its characters can be encoded."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
