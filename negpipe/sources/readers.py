"""Readers of tables of documents, queries and judgments.

Each converts the rows of one table to records, as columns if all rows of a chunk are plain, else one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from negpipe.config import schema
from negpipe.sources.chunks import Chunk, ChunkColumns, Column, Row
from negpipe.sources.fields import Template, extra_of, extras_of, grade_of, grades_of, id_of, ids_of, text_of, texts_of
from negpipe.sources.places import SourceTable
from negpipe.sources.records import (
    BadRow,
    Document,
    Judgment,
    Judgments,
    Place,
    Query,
    Record,
    RecordColumns,
    RowError,
    TextColumns,
    raw_of,
)
from negpipe.sources.tables import Chunks, all_splits, chunks
from negpipe.sources.trec import judgments

_Build: TypeAlias = Callable[[Place, Sequence[Any]], Sequence[Record]]
_BuildAll: TypeAlias = Callable[[ChunkColumns], RecordColumns | None]

_DOCUMENT_IDS = ("id", "docid", "doc_id", "document_id", "corpus_id", "passage_id", "pid")
_QUERY_IDS = ("id", "qid", "query_id", "query-id")
_NAMES = {
    "corpus_id": _DOCUMENT_IDS,
    "query_id": _QUERY_IDS,
    "query_text": ("query", "question", "query_text"),
    "qrels_query_id": ("query_id", "qid", "queryid"),
    "qrels_corpus_id": ("corpus_id", "document-id", *_DOCUMENT_IDS[1:4], "pid"),
    "grade": ("relevance", "grade", "rel", "label"),
    "anchor": ("query", "question", "anchor_text"),
    "positive": ("pos", "answer", "answers", "document", "passage"),
}
"""Common alternative names of columns, used if the config has the default name."""


@dataclass(frozen=True)
class Reader:
    """Converts the rows of a table to records.

    Attributes:
        chunks: the rows.
        build: converts one row; raises RowError if the entire row is bad.
        build_all: converts all rows of a chunk; None if they must be read one by one.
        of_query, in_corpus: whether a bad row takes the position of a query or a document of the corpus.
    """

    chunks: Chunks
    build: _Build
    build_all: _BuildAll = lambda columns: None
    of_query: bool = False
    in_corpus: bool = False

    def pieces(self) -> Iterator[Piece]:
        """The rows, chunk by chunk."""
        return (Piece(self, chunk) for chunk in self.chunks)

    def records_of(self, chunk: Chunk) -> Iterator[Record]:
        """The records of a chunk, one by one."""
        for row in chunk.rows():
            if isinstance(row, BadRow):
                yield row._replace(of_query=self.of_query, in_corpus=self.in_corpus)
                continue
            try:
                records = self.build(row.place, row.values)
            except RowError as error:
                yield error.row._replace(of_query=self.of_query, in_corpus=self.in_corpus, raw=raw_of(row.raw))
                continue
            for record in records:
                yield record._replace(raw=raw_of(row.raw)) if isinstance(record, BadRow) else record


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a source."""

    _reader: Reader
    _chunk: Chunk

    def block(self) -> RecordColumns | None:
        """Their records as columns; None: they must be read one by one."""
        columns = self._chunk.columns()
        return None if columns is None else self._reader.build_all(columns)

    def records(self) -> Iterator[Record]:
        """Their records one by one, including bad rows."""
        return self._reader.records_of(self._chunk)

    def skip(self) -> None:
        """Skip them, but not the following pieces: the first row may name the columns."""
        if not self._chunk.check.done:
            next((row for row in self._chunk.rows() if isinstance(row, Row)), None)


def column(data: schema.Data, key: str, *, required: bool = True) -> Column:
    """A column of `data.columns`, and its alternative names."""
    name = getattr(data.columns, key)
    default = schema.Columns.model_fields[key].default
    return Column(name, f"data.columns.{key}", required, _NAMES.get(key, ()) if name == default else ())


def documents(table: SourceTable, data: schema.Data, *, pool: bool = False) -> Reader:
    """Documents of the corpus; in a `pool`, an extra corpus for rows that contain texts, they need no ids."""
    template = Template.compile(data.text)
    name = data.columns.corpus_id
    # The default id column may be absent from an extra corpus: FlagEmbedding's pools have only `text`.
    needed = not (pool and name == schema.Columns.model_fields["corpus_id"].default)
    ids = [] if name is None else [column(data, "corpus_id") if needed else Column(name, "", required=False)]
    extra = data.extra.corpus

    def build(place: Place, values: Sequence[Any]) -> Sequence[Record]:
        identity = None
        if name is not None:
            if needed or values[0] is not None:
                identity = id_of(values[0], place, name)
            values = values[1:]
        end = len(values) - len(extra)
        try:
            text = template.render(values[:end], place)
            return (Document(identity, text, place, True, extra_of(values[end:], extra, place)),)
        except RowError as error:
            return (error.row._replace(id=identity, in_corpus=True),)

    def build_all(columns: ChunkColumns) -> RecordColumns | None:
        values = columns.values
        named: list[str] | None = None
        if name is not None:
            named = ids_of(values[0])
            if named is None and (needed or values[0].array.null_count < len(values[0].array)):
                return None
            values = values[1:]
        end = len(values) - len(extra)
        rendered, more = template.render_all(values[:end]), extras_of(values[end:])
        if rendered is None or more is None:
            return None
        return RecordColumns(corpus=TextColumns(named, rendered, more, columns.file, columns.rows))

    wanted = [*ids, *template.columns(), *extra_columns(extra, "data.extra.corpus")]
    return Reader(chunks(table, wanted), build, build_all, in_corpus=True)


def extra_columns(names: Sequence[str], key: str, *, required: bool = True) -> list[Column]:
    """The columns of `data.extra` in a table."""
    return [Column(name, key, required) for name in names]


def queries(table: SourceTable, data: schema.Data) -> Reader:
    """Queries with ids."""
    names, extra = data.columns, data.extra.queries

    def build(place: Place, values: Sequence[Any]) -> Sequence[Record]:
        identity = id_of(values[0], place, names.query_id)
        return (query_of(identity, values[1], place, names.query_text, values[2:], extra),)

    def build_all(columns: ChunkColumns) -> RecordColumns | None:
        ids, texts = ids_of(columns.values[0]), texts_of(columns.values[1])
        more = extras_of(columns.values[2:])
        if ids is None or texts is None or more is None:
            return None
        return RecordColumns(queries=TextColumns(ids, texts, more, columns.file, columns.rows))

    wanted = [column(data, "query_id"), column(data, "query_text"), *extra_columns(extra, "data.extra.queries")]
    return Reader(chunks(table, wanted), build, build_all, of_query=True)


def judged(table: SourceTable, data: schema.Data, split: str) -> Reader:
    """Judgments of one split."""
    return _judgments(judgments(table, _judged_columns(data)), data, split)


def judged_splits(table: SourceTable, data: schema.Data) -> dict[str, Reader]:
    """Judgments of every split of a dataset."""
    splits = all_splits(table, _judged_columns(data))
    return {split: _judgments(rows, data, split) for split, rows in splits.items()}


def _judged_columns(data: schema.Data) -> list[Column]:
    return [
        column(data, "qrels_query_id"),
        column(data, "qrels_corpus_id"),
        column(data, "grade", required=False)._replace(assumed="every judgment counts as relevant, with grade 1"),
    ]


def _judgments(judged: Chunks, data: schema.Data, split: str) -> Reader:
    names = data.columns

    def build(place: Place, values: Sequence[Any]) -> Sequence[Record]:
        query = id_of(values[0], place, names.qrels_query_id)
        document = id_of(values[1], place, names.qrels_corpus_id)
        return (Judgment(query, document, grade_of(values[2], place, names.grade), split, place, False, False),)

    def build_all(columns: ChunkColumns) -> RecordColumns | None:
        queries, documents = (ids_of(one) for one in columns.values[:2])
        grades = grades_of(columns.values[2])
        if queries is None or documents is None or grades is None:
            return None
        return RecordColumns(
            judgments=Judgments(queries, documents, grades, split, columns.file, columns.rows, False, False)
        )

    return Reader(judged, build, build_all)


def query_of(
    identity: str | None, value: Any, place: Place, field: str, extra: Sequence[Any], names: Sequence[str]
) -> Query | BadRow:
    """A query, or the error in its text."""
    try:
        return Query(identity, text_of(value, place, field), place, extra_of(extra, names, place))
    except RowError as error:
        return error.row._replace(id=identity, of_query=True)
