"""The reader of rows of an anchor with its passages: pairs, triplets, and the formats of trainers and miners.

A passage is a text, the messages of a chat, an object with a text and optionally an id and a title, or a document id.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from negpipe.config import schema
from negpipe.errors import count_of
from negpipe.sources.chunks import ChunkColumns, Column
from negpipe.sources.fields import Template, extra_of, extras_of, grade_of, id_of, ids_of, text_of, texts_of
from negpipe.sources.places import SourceTable
from negpipe.sources.readers import Reader, extra_columns, query_of
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
)
from negpipe.sources.tables import chunks

_IDS = ("docid", "doc_id", "document_id", "passage_id", "corpus_id", "_id", "id", "pid")
"""Names of the id in a passage that is an object."""


class Passages(NamedTuple):
    """The column of one passage or a list of them; `ids`: the column of their ids; `part`: a slice of the list."""

    column: Column
    ids: Column | None = None
    part: slice = slice(None)


class Fields(NamedTuple):
    """The columns of a row.

    Attributes:
        anchor: the anchor's text; None: queries have a separate table.
        anchor_id: its id; None: a digest of the text.
        positives, negatives: its passages.
        label: grades of the positives, one number or a list; None: 1.
        by_id: passages are ids of documents in a separate table.
        extra: further columns of the row's positives.
        watched: prefixes of relevant column names that must not first appear in a later row.
    """

    anchor: Column | None
    anchor_id: Column | None
    positives: tuple[Passages, ...]
    negatives: tuple[Passages, ...] = ()
    label: Column | None = None
    by_id: bool = False
    extra: tuple[str, ...] = ()
    watched: tuple[str, ...] = ()


def anchored(table: SourceTable, data: schema.Data, fields: Fields, *, in_corpus: bool, given: bool) -> Reader:
    """Anchors with their passages.

    Args:
        table: of the rows.
        data: the settings of the source.
        fields: the columns of a row.
        in_corpus: passages make up the corpus; else there is one, and a passage missing from it is only a positive.
        given: keep the negatives of rows as such.
    """
    wanted = [fields.anchor, fields.anchor_id, fields.label]
    wanted += [column for one in (*fields.positives, *fields.negatives) for column in (one.column, one.ids)]
    asked = list(dict.fromkeys(column for column in wanted if column))
    asked += extra_columns(data.extra.queries, "data.extra.queries")
    # With an extra corpus, the rows may lack the corpus's columns.
    asked += extra_columns(fields.extra, "data.extra.corpus", required=in_corpus)
    reading = _Anchored(data, fields, asked, in_corpus, given, Template.compile(data.text))
    return Reader(
        chunks(table, asked, fields.watched),
        reading.records,
        reading.columns if reading.is_plain() else lambda _: None,
        of_query=fields.anchor is not None,
        in_corpus=in_corpus,
    )


@dataclass(frozen=True)
class _Anchored:
    """Reads rows, see `anchored`."""

    data: schema.Data
    fields: Fields
    asked: list[Column]
    in_corpus: bool
    given: bool
    template: Template

    def is_plain(self) -> bool:
        """Whether rows are pairs: an anchor with one positive, and nothing else."""
        fields = self.fields
        one = len(fields.positives) == 1 and fields.positives[0].part == slice(None)
        return bool(fields.anchor and one and not (fields.negatives or fields.label or fields.by_id))

    def records(self, place: Place, values: Sequence[Any]) -> list[Record]:
        """The records of one row; raises RowError if the entire row is bad."""
        row, fields = dict(zip(self.asked, values, strict=True)), self.fields
        about = len(values) - len(fields.extra)
        identity = None
        if fields.anchor_id and (fields.anchor_id.required or row[fields.anchor_id] is not None):
            identity = id_of(row[fields.anchor_id], place, fields.anchor_id.name)
        query: Query | BadRow | None = None
        if fields.anchor:
            names = self.data.extra.queries
            extra = values[about - len(names) : about]
            query = query_of(identity, _said(row[fields.anchor]), place, fields.anchor.name, extra, names)
        of_row = extra_of(values[about:], fields.extra, place)
        records: list[Record] = [] if query is None else [query]
        for positive, some in ((True, fields.positives), (False, fields.negatives)):
            judged = (positive or self.given) and not isinstance(query, BadRow)
            for one in some if positive or self.given or self.in_corpus else ():
                for value, known, grade in self._listed(one, row, positive, place):
                    document = self._passage(value, known, place._replace(field=one.column.name), of_row)
                    if not isinstance(document, str):
                        records.append(document)
                    if judged and not isinstance(document, BadRow):
                        graded = grade_of(grade, place, fields.label.name if fields.label else "") if positive else None
                        records.append(self._judgment(identity, query, document, graded, place))
        return records

    def _listed(
        self, one: Passages, row: dict[Column, Any], positive: bool, place: Place
    ) -> Iterator[tuple[Any, str | None, Any]]:
        """The passages of a column, with their ids and grades."""
        if not one.column.required and row[one.column] in (None, ""):  # no passage: CSV has no null
            return
        passages = _many(row[one.column])[one.part]
        ids: list[str | None] = [None] * len(passages)
        grades: list[Any] = [None] * len(passages)
        if one.ids and (one.ids.required or row[one.ids] is not None):
            named = _as_many(_many(row[one.ids])[one.part], len(passages), place, one.ids)
            ids[:] = [id_of(value, place, one.ids.name) for value in named]
        if positive and self.fields.label:
            known = _as_many(_many(row[self.fields.label]), len(passages), place, self.fields.label)
            grades = [float(grade) if isinstance(grade, bool) else grade for grade in known]
        yield from zip(passages, ids, grades, strict=True)

    def _passage(
        self, value: Any, known: str | None, place: Place, about: tuple[str | None, ...]
    ) -> Document | BadRow | str:
        """A document, its error, or the id of a document in another table."""
        field = place.field or ""
        identity = known
        if isinstance(value, dict) and identity is None:
            named = next((value[key] for key in _IDS if value.get(key) is not None), None)
            identity = None if named is None else id_of(named, place, field)
        if self.fields.by_id:
            return id_of(value, place, field) if identity is None else identity
        try:
            if isinstance(value, dict) and any(name in value for name in self.template.names):
                names = self.data.extra.corpus
                about = extra_of([value.get(name) for name in names], names, place)
                text = self.template.render([value.get(name) for name in self.template.names], place)
            else:
                text = text_of(_said(value), place, field)
        except RowError as error:
            return error.row._replace(id=identity, in_corpus=self.in_corpus)
        return Document(identity, text, place, self.in_corpus, about)

    def _judgment(
        self,
        identity: str | None,
        query: Query | BadRow | None,
        document: Document | str,
        grade: float | None,
        place: Place,
    ) -> Judgment:
        asked = identity or (query.text if isinstance(query, Query) else "")
        named = document if isinstance(document, str) else document.id or document.text
        by_text = isinstance(document, Document) and document.id is None
        return Judgment(asked, named, grade, self.data.split, place, identity is None, by_text)

    def columns(self, columns: ChunkColumns) -> RecordColumns | None:
        """The records of a chunk of plain pairs; None: they must be read one by one."""
        fields, values = self.fields, dict(zip(self.asked, columns.values, strict=True))
        about = len(columns.values) - len(fields.extra)
        positive, names = fields.positives[0], self.data.extra.queries
        query_ids = ids_of(values[fields.anchor_id]) if fields.anchor_id else None
        document_ids = ids_of(values[positive.ids]) if positive.ids else None
        queries = texts_of(values[fields.anchor]) if fields.anchor else None
        documents = texts_of(values[positive.column])
        about_queries = extras_of(columns.values[about - len(names) : about])
        about_documents = extras_of(columns.values[about:])
        if (
            (fields.anchor_id and query_ids is None)
            or (positive.ids and document_ids is None)
            or queries is None
            or documents is None
            or about_queries is None
            or about_documents is None
        ):
            return None
        place = columns.file, columns.rows
        positives = TextColumns(document_ids, documents, about_documents, *place)
        by_text = query_ids is None, document_ids is None
        judged = Judgments(
            queries if query_ids is None else query_ids,
            documents if document_ids is None else document_ids,
            [1.0] * len(queries),
            self.data.split,
            *place,
            *by_text,
        )
        asked = TextColumns(query_ids, queries, about_queries, *place)
        corpus, added = (positives, None) if self.in_corpus else (None, positives)
        return RecordColumns(corpus, added, asked, judged)


def _many(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _as_many(values: list[Any], count: int, place: Place, column: Column) -> list[Any]:
    if len(values) == count:
        return values
    problem = f"{count_of(count, 'positive needs', 'positives need')} a list of as many, this has {len(values)}"
    raise RowError("type", problem, place, column.name, "Write one per positive")


def _said(value: Any) -> Any:
    """The text of a chat's messages, without the system's; other values unchanged."""
    messages = value if isinstance(value, list) else [value]
    if messages and all(isinstance(one, dict) and isinstance(one.get("content"), str) for one in messages):
        return "\n".join(one["content"] for one in messages if one.get("role") != "system")
    return value
