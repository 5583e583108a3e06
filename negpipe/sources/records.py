"""Records of a source: documents, queries, judgments and bad rows.

They are named tuples, because a corpus has millions of them. Every text is stripped and not empty, every id is a
non-empty string, every grade is finite.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import pyarrow as pa

from negpipe.data.arrays import Ints
from negpipe.errors import InputError


class Place(NamedTuple):
    """A location: `row` is the 1-based line of a text file, else the 0-based row or element of a list."""

    file: str
    row: int
    field: str | None = None


class Document(NamedTuple):
    """A document. `id` None: identified by its text. `in_corpus` False: known only as a positive.

    `extra`: values of the columns in `data.extra.corpus`, in order; () if its source has none of them.
    """

    id: str | None
    text: str
    place: Place
    in_corpus: bool
    extra: tuple[str | None, ...] = ()


class Query(NamedTuple):
    """A query. `id` None: identified by its text. `extra`: values of the columns in `data.extra.queries`."""

    id: str | None
    text: str
    place: Place
    extra: tuple[str | None, ...] = ()


class Judgment(NamedTuple):
    """A graded (query, document) pair of one split; `*_by_text`: that side has the text instead of the id.

    `grade` None: the document is a negative in the source.
    """

    query: str
    document: str
    grade: float | None
    split: str
    place: Place
    query_by_text: bool
    document_by_text: bool


class TextColumns(NamedTuple):
    """Documents or queries of one file as columns, (n,) each; see `Document`. `places`: their rows in the file."""

    ids: pa.Array | None
    texts: pa.Array
    extra: list[pa.Array]
    file: str
    places: Ints


class Judgments(NamedTuple):
    """Judgments as columns, (n,) each; see `Judgment`."""

    queries: pa.Array
    documents: pa.Array
    grades: Sequence[float | None]
    split: str
    file: str
    places: Ints
    query_by_text: bool
    document_by_text: bool


class BadRow(NamedTuple):
    """A row, or one entry of a row, that cannot be used. `kind`: empty_text, broken, type or missing.

    It takes the position of a document of the corpus (`in_corpus`) or a query (`of_query`), or both; `id` is that of
    the query, else of the document, if known. `raw` is the start of the original row.
    """

    error: InputError
    kind: str
    id: str | None = None
    of_query: bool = False
    in_corpus: bool = False
    raw: str = ""


Record: TypeAlias = Document | Query | Judgment | BadRow


class RecordColumns(NamedTuple):
    """Records of consecutive valid rows, as columns; `added` are not in the corpus."""

    corpus: TextColumns | None = None
    added: TextColumns | None = None
    queries: TextColumns | None = None
    judgments: Judgments | None = None


RAW_CHARACTERS = 300
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = RAW_CHARACTERS


def raw_of(row: str | Sequence[Any]) -> str:
    """The start of a line, or of the cells of a row."""
    shown = row if isinstance(row, str) else ", ".join(map(_SHOWN.repr, row))
    return shown[:RAW_CHARACTERS].rstrip("\r\n")


class RowError(Exception):
    """An error in one row, which becomes the `BadRow` in `row` instead of stopping the reader."""

    def __init__(self, kind: str, problem: str, place: Place, field: str | None = None, remedy: str | None = None):
        error = InputError(problem, file=place.file, row=place.row, field=field or place.field, remedy=remedy)
        super().__init__(str(error))
        self.row = BadRow(error, kind)
