"""The four layouts of `data.format`: which tables they have and how rows become records.

Records come in the order corpus, queries, judgments; pair rows give all three at once, after an extra corpus.
Judgments come for all splits there are, because what is positive anywhere is nobody's negative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

from negpipe.config import schema
from negpipe.errors import ConfigError, InputError
from negpipe.sources.chunks import Chunk, Column, Columns
from negpipe.sources.fields import Template, extra_of, extras_of, grade_of, grades_of, id_of, ids_of, text_of, texts_of
from negpipe.sources.places import PACKED, Table, locate, near
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
from negpipe.sources.tables import Chunks, all_splits, chunks, judgments

_Build: TypeAlias = Callable[[Place, Sequence[Any]], Sequence[Record]]
_BuildAll: TypeAlias = Callable[[Columns], RecordColumns | None]


@dataclass(frozen=True)
class _Reader:
    """How the rows of a table become records.

    Attributes:
        chunks: the rows.
        build: of one row; raises RowError where it is bad as a whole.
        build_all: of all rows of a chunk; None where they have to be looked at one by one.
        of_query, in_corpus: a row that is bad stands where a query or a document of the corpus would have.
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


_FIRST_SPLIT = schema.Table.model_fields["split"].default
_DEFAULT_ID = schema.Columns.model_fields["corpus_id"].default


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a source."""

    _reader: _Reader
    _chunk: Chunk

    def block(self) -> RecordColumns | None:
        """Their records in columns; None: they have to be looked at one by one."""
        columns = self._chunk.columns()
        return None if columns is None else self._reader.build_all(columns)

    def records(self) -> Iterator[Record]:
        """Their records one by one, bad rows among them."""
        return self._reader.records_of(self._chunk)

    def skip(self) -> None:
        """Nothing is wanted of them, but of those that follow."""
        self._chunk.skip()


def tables(data: schema.Data) -> list[Table]:
    """Every table of the config in reading order; a BEIR folder's qrels carry their split.

    Raises:
        InputError: a local path that does not exist, or a folder that is neither layout.
    """
    if data.format == "beir":
        return _beir(data)
    named = [table for table in (data.corpus, data.queries, data.qrels) if table is not None]
    if data.format == "columns":
        return [_table(data, table) for table in named]
    extra = [_table(data, data.corpus)] if data.corpus else []
    return [*extra, Table(str(data.path), data.subset, data.split, data.revision)]


def pieces(data: schema.Data) -> Iterator[Piece]:
    """A source, some rows at a time, in one pass; the same pieces each time.

    Every table is opened before the first piece comes, so that a missing file, split or column is known at once.

    Raises:
        ConfigError: a bad `data.text`, or no ids where judgments need them.
        InputError: a table is missing or unreadable as a whole. Single bad rows are records, see BadRow.
    """
    started = []
    for reader in _readers(data):
        found = reader.pieces()
        first: list[Piece] = []
        for piece in found:
            first.append(piece)
            if next(piece.records(), None):  # a row was looked at: the columns are there
                break
        started.append(chain(first, found))
    return chain.from_iterable(started)


def read(data: schema.Data) -> Iterator[Record]:
    """The records of all pieces, one by one; raises what `pieces` does."""
    return chain.from_iterable(piece.records() for piece in pieces(data))


def _readers(data: schema.Data) -> list[_Reader]:
    template = Template.compile(data.text)
    if data.format in ("beir", "columns"):
        return _judged(data, template)
    *extra, main = tables(data)
    readers = [_documents(table, data, template, pool=True) for table in extra]
    return [*readers, (_pairs if data.format == "pairs" else _flagembedding)(main, data, not extra)]


def _beir(data: schema.Data) -> list[Table]:
    path = str(data.path)
    kind = locate(path)
    folder = Path(path)
    if kind in ("file", "url"):
        remedy = "Give its folder or a hub dataset, or set data.format: columns and name three files"
        raise InputError("a BEIR source is a folder or a hub dataset", file=path, remedy=remedy)
    found = {name: _either(folder / f"{name}.jsonl") for name in ("corpus", "queries")}
    qrels = sorted(file for packed in ("", *PACKED) for file in folder.glob(f"qrels/*.tsv{packed}"))
    is_repository = kind == "hub" or (folder / "README.md").is_file()
    if not is_repository or (found["corpus"] and (folder / "qrels").is_dir()):
        for name, file in found.items():
            if file is None:
                remedy = "A BEIR folder has corpus.jsonl, queries.jsonl and qrels/; a dataset repository has README.md"
                raise InputError("there is no such file", file=str(folder / f"{name}.jsonl"), remedy=remedy)
        splits = [file.name.rpartition(".tsv")[0] for file in qrels]
        if data.split not in splits:
            raise _no_split(str(folder / "qrels" / f"{data.split}.tsv"), data.split, splits)
        return [
            *(Table(str(file)) for file in found.values()),
            *(Table(str(file), split=split) for file, split in zip(qrels, splits, strict=True)),
        ]
    judged = path.rstrip("/") + "-qrels"
    if kind == "folder" and not Path(judged).is_dir():
        remedy = f"{near(judged)}. Put the relevance judgments there, or set data.format: columns".lstrip(". ")
        raise InputError("there is no such folder", file=judged, remedy=remedy)
    return [*(Table(path, name, revision=data.revision) for name in ("corpus", "queries")), Table(judged)]


def _either(file: Path) -> Path | None:
    return next((path for packed in ("", *PACKED) if (path := Path(f"{file}{packed}")).is_file()), None)


def _no_split(file: str, split: str, there: Sequence[str]) -> InputError:
    remedy = f"Splits here: {', '.join(there) or 'none'}. Name one in data.split"
    return InputError(f"there are no judgments for the split '{split}'", file=file, field="split", remedy=remedy)


def _table(data: schema.Data, table: schema.Table) -> Table:
    # A revision belongs to one repository: data.path, or the corpus's where there is no data.path.
    home = data.path or (data.corpus.path if data.corpus else None)
    split = None if table.split == _FIRST_SPLIT else table.split
    return Table(table.path, table.subset, split, data.revision if table.path == home else None)


def _judged(data: schema.Data, template: Template) -> list[_Reader]:
    corpus, queries, *judged = tables(data)
    if data.columns.corpus_id is None:
        raise ConfigError("data.columns.corpus_id: null works with pairs only: qrels name documents by their id")
    names = data.columns
    wanted = (
        Column(names.qrels_query_id, "data.columns.qrels_query_id"),
        Column(names.qrels_corpus_id, "data.columns.qrels_corpus_id"),
        Column(names.grade, "data.columns.grade", required=False),
    )
    by_split: dict[str, Chunks] = {}
    for table in judged:
        if table.split is None and locate(table.path) in ("hub", "folder"):
            by_split |= all_splits(table, wanted)
        else:
            by_split[table.split if data.format == "beir" and table.split else data.split] = judgments(table, wanted)
    if data.split not in by_split:
        raise _no_split(judged[0].path, data.split, list(by_split))
    return [
        _documents(corpus, data, template, pool=False),
        _queries(queries, data),
        *(_judgments(rows_of, split, names) for split, rows_of in by_split.items()),
    ]


def _documents(table: Table, data: schema.Data, template: Template, *, pool: bool) -> _Reader:
    name = data.columns.corpus_id
    # The default id column may be absent from an extra corpus: FlagEmbedding's pools have only `text`.
    needed = not (pool and name == _DEFAULT_ID)
    ids = [] if name is None else [Column(name, "data.columns.corpus_id", required=needed)]
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

    def build_all(columns: Columns) -> RecordColumns | None:
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

    wanted = [*ids, *template.columns(), *_extra(extra, "data.extra.corpus")]
    return _Reader(chunks(table, wanted), build, build_all, in_corpus=True)


def _extra(names: Sequence[str], key: str, *, required: bool = True) -> list[Column]:
    return [Column(name, key, required) for name in names]


def _queries(table: Table, data: schema.Data) -> _Reader:
    names, extra = data.columns, data.extra.queries

    def build(place: Place, values: Sequence[Any]) -> Sequence[Record]:
        identity = id_of(values[0], place, names.query_id)
        return (_query(identity, values[1], place, names.query_text, values[2:], extra),)

    def build_all(columns: Columns) -> RecordColumns | None:
        ids, texts = ids_of(columns.values[0]), texts_of(columns.values[1])
        more = extras_of(columns.values[2:])
        if ids is None or texts is None or more is None:
            return None
        return RecordColumns(queries=TextColumns(ids, texts, more, columns.file, columns.rows))

    wanted = [Column(names.query_id, "data.columns.query_id"), Column(names.query_text, "data.columns.query_text")]
    return _Reader(chunks(table, [*wanted, *_extra(extra, "data.extra.queries")]), build, build_all, of_query=True)


def _judgments(judged: Chunks, split: str, names: schema.Columns) -> _Reader:
    def build(place: Place, values: Sequence[Any]) -> Sequence[Record]:
        query = id_of(values[0], place, names.qrels_query_id)
        document = id_of(values[1], place, names.qrels_corpus_id)
        return (Judgment(query, document, grade_of(values[2], place, names.grade), split, place, False, False),)

    def build_all(columns: Columns) -> RecordColumns | None:
        queries, documents = (ids_of(one) for one in columns.values[:2])
        grades = grades_of(columns.values[2])
        if queries is None or documents is None or grades is None:
            return None
        return RecordColumns(
            judgments=Judgments(queries, documents, grades, split, columns.file, columns.rows, False, False)
        )

    return _Reader(judged, build, build_all)


def _pairs(table: Table, data: schema.Data, in_corpus: bool) -> _Reader:
    names, extra = data.columns, data.extra
    wanted = [Column(names.anchor, "data.columns.anchor"), Column(names.positive, "data.columns.positive")]
    if names.anchor_id:
        wanted.append(Column(names.anchor_id, "data.columns.anchor_id"))
    if names.positive_id:
        wanted.append(Column(names.positive_id, "data.columns.positive_id"))
    of_query = len(wanted)
    of_document = of_query + len(extra.queries)
    wanted += _extra(extra.queries, "data.extra.queries")
    # Beside an extra corpus, the pair rows need not have the corpus's columns.
    wanted += _extra(extra.corpus, "data.extra.corpus", required=in_corpus)

    def build(place: Place, values: Sequence[Any]) -> Sequence[Record]:
        query_id = id_of(values[2], place, names.anchor_id) if names.anchor_id else None
        about_document = extra_of(values[of_document:], extra.corpus, place)
        query = _query(query_id, values[0], place, names.anchor, values[of_query:of_document], extra.queries)
        texts = values[1] if isinstance(values[1], list) else [values[1]]
        ids: list[Any] = [None] * len(texts)
        if names.positive_id:
            ids = values[of_query - 1] if isinstance(values[1], list) else [values[of_query - 1]]
            if not isinstance(ids, list) or len(ids) != len(texts):
                problem = f"{len(texts)} positives need a list of as many ids"
                raise RowError("type", problem, place, names.positive_id, "Write one id a positive")
            ids = [id_of(identity, place, names.positive_id) for identity in ids]
        documents = [
            _document(identity, text, place, names.positive, in_corpus, about_document)
            for identity, text in zip(ids, texts, strict=True)
        ]
        judged = [_judged_pair(query, document, data.split) for document in documents]
        return (*documents, query, *chain.from_iterable(judged))

    def build_all(columns: Columns) -> RecordColumns | None:
        values = columns.values
        query_ids = ids_of(values[2]) if names.anchor_id else None
        document_ids = ids_of(values[of_query - 1]) if names.positive_id else None
        queries, documents = texts_of(values[0]), texts_of(values[1])
        about_queries, about_documents = extras_of(values[of_query:of_document]), extras_of(values[of_document:])
        if (
            (names.anchor_id and query_ids is None)
            or (names.positive_id and document_ids is None)
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
            data.split,
            *place,
            *by_text,
        )
        asked = TextColumns(query_ids, queries, about_queries, *place)
        return RecordColumns(positives if in_corpus else None, None if in_corpus else positives, asked, judged)

    return _Reader(chunks(table, wanted), build, build_all, of_query=True, in_corpus=in_corpus)


def _flagembedding(table: Table, data: schema.Data, in_corpus: bool) -> _Reader:
    extra = data.extra.queries

    def build(place: Place, values: Sequence[Any]) -> Sequence[Record]:
        query = _query(None, values[0], place, "query", values[3:], extra)
        records: list[Record] = [query]
        for value in _listed(values[1], place, "pos"):
            document = _document(None, value, place, "pos", in_corpus)
            records += [document, *_judged_pair(query, document, data.split)]
        # With a pool the candidates are the pool's, as in FlagEmbedding itself.
        if in_corpus and values[2] is not None:
            records += [_document(None, value, place, "neg", True) for value in _listed(values[2], place, "neg")]
        return records

    key = "data.path (FlagEmbedding rows have query, pos and neg)"
    wanted = [Column("query", key), Column("pos", key), Column("neg", key, required=False)]
    return _Reader(chunks(table, [*wanted, *_extra(extra, "data.extra.queries")]), build, of_query=True)


def _query(
    identity: str | None, value: Any, place: Place, field: str, extra: Sequence[Any], names: Sequence[str]
) -> Query | BadRow:
    try:
        return Query(identity, text_of(value, place, field), place, extra_of(extra, names, place))
    except RowError as error:
        return error.row._replace(id=identity, of_query=True)


def _document(
    identity: str | None, value: Any, place: Place, field: str, in_corpus: bool, extra: tuple[str | None, ...] = ()
) -> Document | BadRow:
    try:
        return Document(identity, text_of(value, place, field), place._replace(field=field), in_corpus, extra)
    except RowError as error:
        return error.row._replace(id=identity, in_corpus=in_corpus)


def _judged_pair(query: Query | BadRow, document: Document | BadRow, split: str) -> Sequence[Judgment]:
    """The judgment of a pair, unless one of the two has no text."""
    if isinstance(query, BadRow) or isinstance(document, BadRow):
        return ()
    one, other = query.id or query.text, document.id or document.text
    return (Judgment(one, other, 1.0, split, document.place, query.id is None, document.id is None),)


def _listed(values: Any, place: Place, field: str) -> list[Any]:
    if isinstance(values, list):
        return values
    if isinstance(values, str):  # one text, as many write it
        return [values]
    problem = f"expected a list of texts, got {'null' if values is None else f'a {type(values).__name__}'}"
    raise RowError("type", problem, place, field, f'Write "{field}": ["..."], a list even for one text')
