"""The pass over a source: its records in numbered columnar files, from which an interrupted pass resumes.

A batch is some pieces of the source. Its files are written first, then a note of what was read for it, which is not
read again. Memory holds the batch being written, the next one, and some pieces that are read ahead.
"""

from __future__ import annotations

import json
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa

from negpipe import sources
from negpipe.config.schema import Config
from negpipe.data.arrays import Ints
from negpipe.data.tables import EXTRA, open_table, write
from negpipe.data.texts import ids_of, text_id
from negpipe.errors import DamagedError, VanishedError, count_of
from negpipe.ingest import rejected
from negpipe.ingest.hashing import Hasher, hashed
from negpipe.store.files import publish, remove, write_json

if TYPE_CHECKING:
    import duckdb

logger = logging.getLogger(__name__)

_Item = TypeVar("_Item")

BATCH = 8192  # rows that fill a batch
_BYTES = 2**23  # of texts that fill a batch
_WARNED = 10
_TOGETHER = 256  # files mapped at a time
_AHEAD = 4  # pieces read, and their texts hashed, while earlier ones are written
_PLACE = [("file", pa.string()), ("line", pa.int64())]
_TEXT = [("source_row", pa.int64()), ("id", pa.string())]
_HASHES = [("d1", pa.uint64()), ("d2", pa.uint64()), ("normalized", pa.uint64())]
_TABLES = {
    "documents": pa.schema([("corpus", pa.bool_()), ("position", pa.int64()), *_TEXT, *_HASHES, *_PLACE]),
    "queries": pa.schema([*_TEXT, ("text", pa.string()), ("extra", pa.list_(pa.string())), *_HASHES, *_PLACE]),
    "judgments": pa.schema(
        [("query", pa.string()), ("document", pa.string()), ("grade", pa.float64()), ("split", pa.string()), *_PLACE]
    ),
    "skipped": pa.schema(
        [
            *[("id", pa.string()), ("of_query", pa.bool_()), ("in_corpus", pa.bool_()), ("bad", pa.bool_())],
            *_PLACE,
            *[(name, pa.string()) for name in ("field", "kind", "reason", "raw")],
        ]
    ),
}
"""Tables of the database."""
_FILES = {"documents": ("corpus", "added")} | {name: (name,) for name in ("queries", "judgments", "skipped")}
"""The kinds of files they are read from; those of documents also contain texts and extra columns."""


class Spool:
    """The files of a pass over a source, batch by batch, and the notes of what was read for each.

    Only files in a note of this pass are read; other files belong to other processes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._notes: list[dict[str, dict[str, int]]] = []
        with suppress(OSError, ValueError):  # the first that is missing or incomplete
            while True:
                self._notes.append(json.loads(self._note(len(self._notes)).read_text()))

    @property
    def totals(self) -> Counter[str]:
        """Totals of what was read, by name."""
        return Counter(self._notes[-1]["totals"]) if self._notes else Counter()

    def add(self, batch: _Batch) -> None:
        """Write a batch, then its note."""
        number, rows = len(self._notes), {}
        for kind, tables in batch.tables.items():
            table = pa.concat_tables(tables)
            publish(self._folder, self._name(kind, number), partial(write, table))
            rows[kind] = table.num_rows
        note = {"totals": dict(batch.totals), "rows": rows}
        write_json(self._note(number), note)
        self._notes.append(note)

    def drop(self) -> None:
        """Delete everything."""
        remove(self._folder)
        self._notes = []

    def tables(self, kind: str) -> Iterator[pa.Table]:
        """The tables of a kind, mapped.

        Raises:
            VanishedError: one is missing or was modified.
        """
        for number, note in enumerate(self._notes):
            if rows := note["rows"].get(kind, 0):
                yield self._table(kind, number, rows)

    def texts(self, kind: str, names: tuple[str, ...]) -> SpooledTexts:
        """Texts and extra columns of documents."""
        numbers = [number for number, note in enumerate(self._notes) if note["rows"].get(kind)]
        rows = [self._notes[number]["rows"][kind] for number in numbers]
        columns = ["text", *extra_columns(names)]
        return SpooledTexts(rows, lambda at: self._table(kind, numbers[at], rows[at]).select(columns))

    def _table(self, kind: str, number: int, rows: int) -> pa.Table:
        path = self._folder / self._name(kind, number)
        with suppress(DamagedError):
            table = open_table(path)
            if table.num_rows == rows:
                return table
        self.drop()
        raise VanishedError(f"{path} disappeared or changed while the source was read: run the same command again")

    def _note(self, number: int) -> Path:
        return self._folder / f"read-{number:06d}.json"

    def _name(self, kind: str, number: int) -> str:
        return f"{kind}-{number:06d}.arrow"


def read(config: Config, spool: Spool, threads: int) -> None:
    """Read the rest of a source, once.

    Args:
        config: the source.
        spool: the output.
        threads: threads to use. Changes no result.

    Raises:
        ConfigError, InputError: the source cannot be read, or there are more bad rows than allowed.
        VanishedError: it is not the source of the interrupted pass.
    """
    pieces = sources.pieces(config.data, config.mining.given_negatives != "ignore")
    if before := spool.totals["pieces"]:
        logger.info("resuming after %s of the source read before", count_of(before, "piece"))
        for _ in range(before):
            piece = next(pieces, None)
            if piece is None:
                spool.drop()
                raise VanishedError("the source is shorter than what was read before: run the same command again")
            piece.skip()
    with ThreadPoolExecutor(1) as writing, closing(Hasher(threads)) as hashes:
        written: Future[None] | None = None
        for batch in _batches(config, pieces, spool.totals, hashes):
            if written:
                written.result()
            written = writing.submit(spool.add, batch)
        if written:
            written.result()


def load(spool: Spool, database: duckdb.DuckDBPyConnection) -> None:
    """Load everything except texts and extra columns of documents into tables of an empty database."""
    for table, schema in _TABLES.items():
        database.register("read", schema.empty_table())
        database.execute(f"create table {table} as select * from read")
        tables = chain.from_iterable(spool.tables(kind) for kind in _FILES[table])
        while some := list(islice(tables, _TOGETHER)):
            database.register("read", pa.concat_tables([one.select(schema.names) for one in some]))
            database.execute(f"insert into {table} select * from read")
        database.unregister("read")


def _batches(config: Config, pieces: Iterator[sources.Piece], totals: Counter[str], hashes: Hasher) -> Iterator[_Batch]:
    batch = _Batch(config, totals)
    for read in ahead((_Read.of(piece, hashes) for piece in pieces), _AHEAD):
        batch.add(read)
        if batch.is_full():
            yield batch
            batch = _Batch(config, batch.totals)
    if batch.pieces:
        yield batch


@dataclass(frozen=True)
class _Read:
    """A piece of the source: its records as columns, with hashes, or one by one; and the error that stopped reading."""

    records: sources.RecordColumns | list[sources.Record]
    error: Exception | None = None
    hashes: tuple[Future[pa.RecordBatch] | None, ...] = ()
    """Hashes of the texts of corpus, added and queries."""

    @classmethod
    def of(cls, piece: sources.Piece, hashes: Hasher) -> _Read:
        if block := piece.block():
            texts = (block.corpus, block.added, block.queries)
            return cls(block, None, tuple(None if one is None else hashes(one.texts) for one in texts))
        records: list[sources.Record] = []
        try:
            records.extend(piece.records())
        except Exception as error:
            return cls(records, error)
        return cls(records)


def ahead(items: Iterator[_Item], count: int = 1) -> Iterator[_Item]:
    """The same items, produced by another thread, some of them ahead of time."""
    with ThreadPoolExecutor(1) as making:
        waiting = deque(making.submit(next, items, None) for _ in range(count))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(making.submit(next, items, None))
            yield item


class _Batch:
    """Some pieces of the source as tables.

    Args:
        totals: totals before this batch, by name, which it continues.
    """

    def __init__(self, config: Config, totals: Counter[str]) -> None:
        self.totals = Counter(totals)
        self.pieces = 0
        self._config = config
        self.tables: dict[str, list[pa.Table]] = {}
        self._rows = self._bytes = 0

    def is_full(self) -> bool:
        """Whether the batch is due to be written."""
        return self._rows >= BATCH or self._bytes >= _BYTES

    def add(self, read: _Read) -> None:
        """Add a piece.

        Raises:
            InputError: there are more bad rows than allowed.
            Exception: the error that stopped reading the piece.
        """
        if isinstance(read.records, sources.RecordColumns):
            self._add_block(read.records, [one and one.result() for one in read.hashes])
        else:
            self._add_records(read.records)
        if read.error:
            raise read.error
        self.pieces += 1
        self.totals["pieces"] += 1

    def _add(self, kind: str, schema: pa.Schema, columns: dict[str, Any], size: int = 0) -> None:
        arrays = [_array(columns[name], one.type) for name, one in zip(schema.names, schema, strict=True)]
        table = pa.table(arrays, schema=schema)
        self.tables.setdefault(kind, []).append(table)
        self._rows += len(table)
        self._bytes += size

    def _next(self, name: str, count: int) -> Ints:
        """Numbers of the next rows of the source."""
        first = self.totals[name]
        self.totals[name] += count
        return np.arange(first, first + count)

    def _add_block(self, block: sources.RecordColumns, hashes: list[pa.RecordBatch | None]) -> None:
        # A judgment by text shares the text with its query or document.
        named: dict[int, pa.Array] = {}
        for documents, kind, own in ((block.corpus, "corpus", hashes[0]), (block.added, "added", hashes[1])):
            if documents:
                # Only documents of the corpus have a row in the source that vectors can be matched to.
                count = len(documents.texts)
                rows = self._next("document", count) if kind == "corpus" else np.full(count, -1)
                named[id(documents.texts)] = self._add_documents(kind, documents, rows, own)
        if block.queries:
            rows = self._next("query", len(block.queries.texts))
            named[id(block.queries.texts)] = self._add_queries(block.queries, rows, hashes[2])
        if judged := block.judgments:
            sides = judged.queries, judged.documents
            by_text = judged.query_by_text, judged.document_by_text
            ids = [named[id(side)] if flag else side for side, flag in zip(sides, by_text, strict=True)]
            self._add_judgments(judged._replace(queries=ids[0], documents=ids[1]))

    def _add_records(self, records: list[sources.Record]) -> None:
        """Add records one by one, including bad rows, which count as rows of the source."""
        documents: dict[str, list[tuple[int, sources.Document]]] = {"corpus": [], "added": []}
        queries: list[tuple[int, sources.Query]] = []
        judgments: list[sources.Judgment] = []
        skipped: list[sources.BadRow] = []
        for record in records:
            if isinstance(record, sources.Document):
                row = self.totals["document"] if record.in_corpus else -1
                self.totals["document"] += record.in_corpus
                documents["corpus" if record.in_corpus else "added"].append((row, record))
            elif isinstance(record, sources.Query):
                queries.append((self.totals["query"], record))
                self.totals["query"] += 1
            elif isinstance(record, sources.Judgment):
                judgments.append(record)
            else:
                self._skip(record)
                skipped.append(record)
        for kind, numbered in documents.items():
            if numbered:
                self._add_documents(kind, *_in_columns(numbered, self._config.data.extra.corpus))
        if queries:
            self._add_queries(*_in_columns(queries, self._config.data.extra.queries))
        if judgments:
            self._add_judgments(
                sources.Judgments(
                    _by_id([(one.query, one.query_by_text) for one in judgments]),
                    _by_id([(one.document, one.document_by_text) for one in judgments]),
                    [one.grade if one.grade is None else float(one.grade) for one in judgments],
                    judgments[0].split,
                    judgments[0].place.file,
                    np.array([one.place.row for one in judgments]),
                    False,
                    False,
                )
            )
        if skipped:
            self._add_skipped(skipped)

    def _skip(self, row: sources.BadRow) -> None:
        """Count a skipped row and its position in the source, as vectors are matched to the original rows."""
        if self._is_bad(row):
            self.totals["bad"] += 1
            if self.totals["bad"] > self._config.data.max_bad_rows:
                raise rejected.too_many(row.error, self._config.data.max_bad_rows)
            if self.totals["bad"] <= _WARNED:
                logger.warning("rejected: %s", row.error)
        self.totals["query"] += row.of_query
        self.totals["document"] += row.in_corpus

    def _is_bad(self, row: sources.BadRow) -> bool:
        """Whether it counts against `data.max_bad_rows`."""
        return not (row.kind == "empty_text" and self._config.data.on_empty == "skip")

    def _add_skipped(self, rows: list[sources.BadRow]) -> None:
        columns: dict[str, Any] = {
            "id": [row.id for row in rows],
            "of_query": [row.of_query for row in rows],
            "in_corpus": [row.in_corpus for row in rows],
            "bad": [self._is_bad(row) for row in rows],
            "file": [row.error.file for row in rows],
            "line": [row.error.row for row in rows],
            "field": [row.error.field for row in rows],
            "kind": [row.kind for row in rows],
            "reason": [row.error.problem for row in rows],
            "raw": [row.raw for row in rows],
        }
        self._add("skipped", _TABLES["skipped"], columns)

    def _add_documents(self, kind: str, documents: sources.TextColumns, rows: Ints, hashes: Any = None) -> pa.Array:
        """Add documents of these rows of the source; return their ids."""
        names = ["text", *extra_columns(self._config.data.extra.corpus)]
        nothing = [pa.nulls(len(rows))] * (len(names) - 1)
        of_text = _of_texts(documents, hashes)
        columns = of_text | {"corpus": pa.repeat(kind == "corpus", len(rows)), "source_row": rows}
        columns |= {"position": self._next(kind, len(rows))}
        columns |= dict(zip(names, [documents.texts, *(documents.extra or nothing)], strict=True))
        schema = _TABLES["documents"]
        for name in names:
            schema = schema.append(pa.field(name, pa.large_string()))
        self._add(kind, schema, columns, _length(documents))
        return of_text["id"]

    def _add_queries(self, queries: sources.TextColumns, rows: Ints, hashes: Any = None) -> pa.Array:
        """Add queries of these rows of the source; return their ids."""
        of_text = _of_texts(queries, hashes)
        more = [column.to_pylist() for column in queries.extra]
        extra = [list(one) for one in zip(*more, strict=True)] if more else [[]] * len(rows)
        columns = of_text | {"source_row": rows, "text": queries.texts, "extra": extra}
        self._add("queries", _TABLES["queries"], columns, _length(queries))
        return of_text["id"]

    def _add_judgments(self, judged: sources.Judgments) -> None:
        count = len(judged.grades)
        columns = {"query": judged.queries, "document": judged.documents, "grade": judged.grades}
        columns |= {"split": pa.repeat(judged.split, count), "file": pa.repeat(judged.file, count)}
        columns |= {"line": judged.places}
        self._add("judgments", _TABLES["judgments"], columns)


def _in_columns(numbered: Sequence[tuple[int, Any]], extra: tuple[str, ...]) -> tuple[sources.TextColumns, Ints]:
    """Documents or queries of one file as columns, and their rows in the source."""
    rows, records = zip(*numbered, strict=True)
    ids = _by_id([(one.text if one.id is None else one.id, one.id is None) for one in records])
    nothing = (None,) * len(extra)
    columns = zip(*(one.extra or nothing for one in records), strict=True)
    more = [pa.array(column, pa.string()) for column in columns]
    places = np.array([one.place.row for one in records])
    texts = pa.array([one.text for one in records], pa.large_string())
    return sources.TextColumns(ids, texts, more, records[0].place.file, places), np.array(rows)


def _by_id(names: list[tuple[str, bool]]) -> pa.Array:
    """Ids, some of which are derived from texts."""
    return pa.array([text_id(name) if by_text else name for name, by_text in names], pa.string())


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    return values.cast(kind) if isinstance(values, pa.Array) else pa.array(values, kind)


def _of_texts(texts: sources.TextColumns, hashes: pa.RecordBatch | None) -> dict[str, Any]:
    hashes = hashes or hashed(texts.texts)
    ids = texts.ids
    if ids is None:
        ids = pa.array(ids_of(np.stack([hashes[name].to_numpy() for name in ("d1", "d2")], axis=1)), pa.string())
    return {
        "id": ids,
        **{name: hashes[name] for name in hashes.schema.names},
        "file": pa.repeat(texts.file, len(texts.texts)),
        "line": texts.places,
    }


def _length(texts: sources.TextColumns) -> int:
    """Bytes of texts and extra columns."""
    return sum(array.nbytes for array in (texts.texts, *texts.extra))


def extra_columns(names: tuple[str, ...]) -> list[str]:
    """Names of the columns of `data.extra` in the parts."""
    return [EXTRA + name for name in names]


class SpooledTexts:
    """Texts and extra columns of documents at ascending positions, with one file open at a time.

    Args:
        rows: rows of each file.
        opened: opens a file by its index.
    """

    def __init__(self, rows: list[int], opened: Callable[[int], pa.Table]) -> None:
        self._ends, self._opened = np.cumsum(rows, dtype=np.int64), opened
        self._held: tuple[int, pa.Table] | None = None

    def take(self, positions: Ints) -> Iterator[tuple[slice, pa.Table]]:
        """The rows at `positions`, which ascend from call to call, some at a time."""
        files = np.searchsorted(self._ends, positions, side="right")
        for file in np.unique(files).tolist():
            if self._held is None or self._held[0] != file:
                self._held = file, self._opened(file)
            here = slice(*np.searchsorted(files, [file, file + 1]))
            own = positions[here] - (self._ends[file - 1] if file else 0)
            table = self._held[1]
            together = own[-1] - own[0] == len(own) - 1
            yield here, table.slice(int(own[0]), len(own)) if together else table.take(pa.array(own))
