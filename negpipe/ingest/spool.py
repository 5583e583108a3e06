"""The one pass over a source: texts to a spool on disk, everything that must be joined to a database.

The spool and the database stand in a temporary folder of the run; memory holds one batch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from negpipe import sources
from negpipe.config.schema import Config
from negpipe.data.tables import EXTRA
from negpipe.data.texts import digests, hashes, normalize, text_id
from negpipe.ingest import rejected

if TYPE_CHECKING:
    import duckdb

logger = logging.getLogger(__name__)

BATCH = 8192
_CHARACTERS = 2**23  # of a batch's texts: what is read, hashed and written at a time
_WARNED = 10


def load(config: Config, database: duckdb.DuckDBPyConnection, folder: Path) -> None:
    """Read the source once: texts and extra columns to the spool, everything else to the database.

    Raises:
        ConfigError, InputError: the source cannot be read, or a row is bad and may not be skipped.
    """
    database.execute("""
        create table documents (corpus boolean, position bigint, source_row bigint, id varchar,
            d1 ubigint, d2 ubigint, normalized ubigint, file varchar, line bigint);
        create table queries (source_row bigint, id varchar, text varchar, extra varchar[],
            d1 ubigint, d2 ubigint, normalized ubigint, file varchar, line bigint);
        create table judgments (query varchar, document varchar, grade double, split varchar,
            file varchar, line bigint);
        create table skipped (id varchar, of_query boolean, in_corpus boolean, bad boolean,
            file varchar, line bigint, field varchar, kind varchar, reason varchar, raw varchar);
    """)
    writer = _Writer(config, database, folder)
    with writer:
        for batch in _batches(sources.read(config.data)):
            writer.add(batch)


def _batches(records: Iterator[sources.Record]) -> Iterator[list[sources.Record]]:
    batch: list[sources.Record] = []
    characters = 0
    for record in records:
        batch.append(record)
        if isinstance(record, sources.Document | sources.Query):
            characters += len(record.text) + sum(len(value or "") for value in record.extra)
        if len(batch) == BATCH or characters >= _CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Writer:
    """Sorts records into the spool and the tables, a batch at a time."""

    def __init__(self, config: Config, database: duckdb.DuckDBPyConnection, folder: Path) -> None:
        self._config, self._database = config, database
        names = ["text", *extra_columns(config.data.extra.corpus)]
        schema = pa.schema([(name, pa.large_string()) for name in names])
        self._spools = {c: pq.ParquetWriter(_path(folder, c), schema, compression="lz4") for c in (True, False)}
        self._positions = {True: 0, False: 0}
        self._rows = {"document": 0, "query": 0}
        self._bad = 0

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        for spool in self._spools.values():
            spool.close()

    def add(self, records: list[sources.Record]) -> None:
        documents: dict[bool, list[tuple[int, sources.Document]]] = {True: [], False: []}
        queries: list[tuple[int, sources.Query]] = []
        judgments: list[sources.Judgment] = []
        skipped: list[sources.BadRow] = []
        for record in records:
            if isinstance(record, sources.Document):
                # Only the corpus has a row in the source that vectors can be matched to.
                row = self._next("document") if record.in_corpus else -1
                documents[record.in_corpus].append((row, record))
            elif isinstance(record, sources.Query):
                queries.append((self._next("query"), record))
            elif isinstance(record, sources.Judgment):
                judgments.append(record)
            else:
                self._skip(record)
                skipped.append(record)
        for corpus, rows in documents.items():
            if rows:
                self._add_documents(corpus, rows)
        if queries:
            self._add_queries(queries)
        if judgments:
            self._add_judgments(judgments)
        if skipped:
            self._add_skipped(skipped)

    def _next(self, kind: str) -> int:
        self._rows[kind] += 1
        return self._rows[kind] - 1

    def _skip(self, row: sources.BadRow) -> None:
        """Count a row that is left out, and its place in the source: vectors are matched to what was there."""
        if self._is_bad(row):
            self._bad += 1
            if self._bad > self._config.data.max_bad_rows:
                raise rejected.too_many(row.error, self._config.data.max_bad_rows)
            if self._bad <= _WARNED:
                logger.warning("left out: %s", row.error)
        if row.of_query:
            self._next("query")
        if row.in_corpus:
            self._next("document")

    def _is_bad(self, row: sources.BadRow) -> bool:
        """Whether it counts against `data.max_bad_rows`."""
        return not (row.kind == "empty_text" and self._config.data.on_empty == "skip")

    def _add_skipped(self, rows: list[sources.BadRow]) -> None:
        self._insert(
            "skipped",
            {
                "id": pa.array([row.id for row in rows], pa.string()),
                "of_query": [row.of_query for row in rows],
                "in_corpus": [row.in_corpus for row in rows],
                "bad": [self._is_bad(row) for row in rows],
                "file": [row.error.file for row in rows],
                "line": [row.error.row for row in rows],
                "field": pa.array([row.error.field for row in rows], pa.string()),
                "kind": [row.kind for row in rows],
                "reason": [row.error.problem for row in rows],
                "raw": [row.raw for row in rows],
            },
        )

    def _add_documents(self, corpus: bool, rows: list[tuple[int, sources.Document]]) -> None:
        texts = [document.text for _, document in rows]
        start = self._positions[corpus]
        self._positions[corpus] += len(rows)
        spool = self._spools[corpus]
        nothing = (None,) * len(self._config.data.extra.corpus)
        values = [texts, *zip(*(document.extra or nothing for _, document in rows), strict=True)]
        spool.write_table(pa.table([pa.array(column, pa.large_string()) for column in values], schema=spool.schema))
        self._insert(
            "documents",
            {
                "corpus": [corpus] * len(rows),
                "position": np.arange(start, start + len(rows)),
                "source_row": [row for row, _ in rows],
                "id": [document.id if document.id is not None else text_id(document.text) for _, document in rows],
                **_hash_columns(texts),
                "file": [document.place.file for _, document in rows],
                "line": [document.place.row for _, document in rows],
            },
        )

    def _add_queries(self, rows: list[tuple[int, sources.Query]]) -> None:
        texts = [query.text for _, query in rows]
        self._insert(
            "queries",
            {
                "source_row": [row for row, _ in rows],
                "id": [query.id if query.id is not None else text_id(query.text) for _, query in rows],
                "text": texts,
                "extra": pa.array([query.extra for _, query in rows], pa.list_(pa.string())),
                **_hash_columns(texts),
                "file": [query.place.file for _, query in rows],
                "line": [query.place.row for _, query in rows],
            },
        )

    def _add_judgments(self, rows: list[sources.Judgment]) -> None:
        self._insert(
            "judgments",
            {
                "query": [text_id(row.query) if row.query_by_text else row.query for row in rows],
                "document": [text_id(row.document) if row.document_by_text else row.document for row in rows],
                "grade": [float(row.grade) for row in rows],
                "split": [row.split for row in rows],
                "file": [row.place.file for row in rows],
                "line": [row.place.row for row in rows],
            },
        )

    def _insert(self, table: str, columns: dict[str, Any]) -> None:
        self._database.register("incoming", pa.table(columns))
        self._database.execute(f"insert into {table} by name select * from incoming")
        self._database.unregister("incoming")


def _hash_columns(texts: list[str]) -> dict[str, npt.NDArray[np.uint64]]:
    both = digests(texts)
    return {"d1": both[:, 0], "d2": both[:, 1], "normalized": hashes(map(normalize, texts))}


def extra_columns(names: tuple[str, ...]) -> list[str]:
    """What columns of `data.extra` are called in the parts."""
    return [EXTRA + name for name in names]


def _path(folder: Path, corpus: bool) -> Path:
    return folder / ("corpus.parquet" if corpus else "positives.parquet")


class Spool:
    """Rows of a spool at ascending positions, one batch in memory."""

    def __init__(self, folder: Path, *, corpus: bool) -> None:
        self._file = pq.ParquetFile(_path(folder, corpus))
        groups = range(self._file.num_row_groups)
        self._ends = np.cumsum([self._file.metadata.row_group(group).num_rows for group in groups], dtype=np.int64)
        self._held: tuple[int, pa.Table] | None = None

    def take(self, positions: npt.NDArray[np.int64]) -> Iterator[tuple[slice, pa.Table]]:
        """The rows at `positions`, which ascend from call to call: of some of them, and of the next."""
        groups = np.searchsorted(self._ends, positions, side="right")
        for group in np.unique(groups):
            if self._held is None or self._held[0] != group:
                self._held = None
                self._held = int(group), self._file.read_row_group(int(group))
            here = slice(*np.searchsorted(groups, [group, group + 1]))
            first = self._ends[group - 1] if group else 0
            yield here, self._held[1].take(pa.array(positions[here] - first))
