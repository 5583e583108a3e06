"""Readers of every kind of source: `pieces` streams its rows, `files` and `revision` say what it is.

Reading is one streaming pass whose memory is bounded by one piece. A wrong table raises InputError before the first
piece; a wrong row comes out as BadRow, and the caller decides whether to stop.
"""

from __future__ import annotations

from negpipe.sources.identity import files, revision
from negpipe.sources.layouts import Piece, pieces, read
from negpipe.sources.records import (
    BadRow,
    Document,
    Documents,
    Judgment,
    Judgments,
    Place,
    Queries,
    Query,
    Record,
    RecordColumns,
)

__all__ = [
    "BadRow",
    "Document",
    "Documents",
    "Judgment",
    "Judgments",
    "Piece",
    "Place",
    "Queries",
    "Query",
    "Record",
    "RecordColumns",
    "files",
    "pieces",
    "read",
    "revision",
]
