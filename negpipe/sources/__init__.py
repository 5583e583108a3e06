"""Readers of every kind of source: `pieces` streams its rows, `files` and `revision` identify it.

`recognized` determines the layout of a source if the config does not; all others use it.

Reading is one streaming pass with memory bounded by one piece. A bad table raises InputError before the first
piece; a bad row is returned as BadRow, and the caller decides whether to stop.
"""

from __future__ import annotations

from negpipe.sources.guess import recognized
from negpipe.sources.identity import files, revision
from negpipe.sources.places import extension_of
from negpipe.sources.readers import Piece
from negpipe.sources.reading import pieces, read, readers, splits
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
from negpipe.sources.tables import column_names, is_whole, opened
from negpipe.sources.trec import RUNS, Run, ranked, run_of

__all__ = [
    "RUNS",
    "BadRow",
    "Document",
    "Judgment",
    "Judgments",
    "Piece",
    "Place",
    "Query",
    "Record",
    "RecordColumns",
    "Run",
    "TextColumns",
    "column_names",
    "extension_of",
    "files",
    "is_whole",
    "opened",
    "pieces",
    "ranked",
    "read",
    "readers",
    "recognized",
    "revision",
    "run_of",
    "splits",
]
