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
    Judgment,
    Judgments,
    Place,
    Query,
    Record,
    RecordColumns,
    TextColumns,
)

__all__ = [
    "BadRow",
    "Document",
    "Judgment",
    "Judgments",
    "Piece",
    "Place",
    "Query",
    "Record",
    "RecordColumns",
    "TextColumns",
    "files",
    "pieces",
    "read",
    "revision",
]
