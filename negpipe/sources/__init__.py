"""Readers of every kind of source: `read` streams its records, `files` and `revision` say what it is.

Reading is one streaming pass whose memory is bounded by one batch. A wrong table raises InputError before the
first record; a wrong row comes out as BadRow, and the caller decides whether to stop.
"""

from __future__ import annotations

from negpipe.sources.identity import files, revision
from negpipe.sources.layouts import read
from negpipe.sources.records import BadRow, Document, Judgment, Place, Query, Record

__all__ = ["BadRow", "Document", "Judgment", "Place", "Query", "Record", "files", "read", "revision"]
