"""Reads an entire source once, from its first table to its last."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import chain

from negpipe.config import schema
from negpipe.sources.guess import recognized
from negpipe.sources.layouts import tables_of
from negpipe.sources.places import SourceTable
from negpipe.sources.readers import Piece, Reader
from negpipe.sources.records import Record

_log = logging.getLogger(__name__)


def pieces(data: schema.Data, given: bool = False) -> Iterator[Piece]:
    """A source in one pass, some rows at a time; the same pieces each time.

    Every table is opened before the first piece, so that a missing file, split or column is reported at once.

    Args:
        data: the source.
        given: its negatives become judgments without a grade.

    Raises:
        ConfigError: a bad `data.text`, or ids that judgments require are missing.
        InputError: an entire table is missing or unreadable. Single bad rows are records, see BadRow.
    """
    known = recognized(data)
    if known.format != data.format:
        _log.info("the source is read as data.format: %s", known.format)
        if known.format == "pairs" and (label := known.columns.label):
            _log.info("reading grades of positives from the column '%s' (data.columns.label)", label)
    started = []
    for _, reader in readers(known, given):
        found = reader.pieces()
        first: list[Piece] = []
        for piece in found:
            first.append(piece)
            if next(piece.records(), None):  # a row was read: the columns exist
                break
        started.append(chain(first, found))
    return chain.from_iterable(started)


def splits(data: schema.Data, other: str) -> bool:
    """Whether another split may have other rows; false for files that are read entirely whatever `data.split` is.

    Raises:
        ConfigError, InputError: as in `pieces`, for tables that are missing.
    """
    known, wanted = (recognized(one) for one in (data, data.model_copy(update={"split": other})))
    tables, others = ([table for table, _ in tables_of(one)] for one in (known, wanted))
    # Judgments of several splits are read together, each with its name.
    return tables != others or known.format in ("beir", "mteb") or tables[-1].kind in ("hub", "folder")


def readers(data: schema.Data, given: bool = False) -> Iterator[tuple[SourceTable, Reader]]:
    """The tables of a source whose layout is known, with their readers; raises the errors of `pieces`."""
    return ((table, reader) for table, role in tables_of(data, given) for reader in role(table))


def read(data: schema.Data, given: bool = False) -> Iterator[Record]:
    """The records of all pieces, one by one; raises the errors of `pieces`."""
    return chain.from_iterable(piece.records() for piece in pieces(data, given))
