"""Converts runs into plain rows: every line is a negative of its anchor, with the texts of the run's ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from negpipe import sources
from negpipe.errors import InputError

if TYPE_CHECKING:
    import duckdb

_LINES = 65536  # at a time
_LISTED = pa.schema({"anchor_id": pa.string(), "negative_id": pa.string(), "negative_score": pa.float64()})
COLUMNS = ("anchor", "anchor_id", "negative", "negative_id", "negative_score")
"""Columns of the rows; named like the fields."""


@dataclass(frozen=True)
class TextTables:
    """Tables with the texts of ids.

    Attributes:
        anchors: tables of anchor_id, anchor; one row per anchor.
        documents: tables of id, other_ids (list), text; one row per document.
    """

    anchors: Iterable[pa.Table]
    documents: Iterable[pa.Table]


def flatten(
    database: duckdb.DuckDBPyConnection, run: tuple[sources.Run, list[str]], texts: TextTables | None, path: Path
) -> None:
    """Write the lines of a run as Parquet, in their order; an unknown id has no text.

    Raises:
        InputError: a line has other fields, or there are no texts for the ids.
    """
    kind, files = run
    if texts is None:
        problem = f"this is {sources.RUNS[kind]}, whose ids mean nothing by themselves"
        remedy = "Also name the config of the data it was made on, as in negpipe audit my.yaml --file run.trec"
        raise InputError(problem, file=files[0], remedy=remedy)
    database.execute("create table ranked (line bigint, anchor_id varchar, negative_id varchar, negative_score double)")
    number = 0
    for piece in _pieces(files, kind):
        database.register("piece", piece.append_column("line", pa.array(range(number, number + len(piece)))))
        database.execute("insert into ranked by name select * from piece")
        number += len(piece)
    for table, pieces, columns, used in (
        ("asked", texts.anchors, "anchor_id as id, anchor as text", "anchor_id"),
        ("named", texts.documents, "unnest(list_prepend(id, coalesce(other_ids, []))) as id, text", "negative_id"),
    ):
        database.register("piece", _as_one(pieces))
        database.execute(
            f"create table {table} as select id, text from (select {columns} from piece)"
            f" where id in (select {used} from ranked)"
        )
    database.unregister("piece")
    quoted = str(path).replace("'", "''")
    database.execute(f"""
        copy (select a.text as anchor, anchor_id, d.text as negative, negative_id, negative_score from ranked
            left join asked a on a.id = anchor_id left join named d on d.id = negative_id order by line)
            to '{quoted}' (format parquet, compression lz4);
        drop table ranked; drop table asked; drop table named;
    """)


def _pieces(files: list[str], kind: sources.Run) -> Iterator[pa.Table]:
    for file in files:
        lines = sources.ranked(file, kind)
        while some := list(islice(lines, _LINES)):
            yield pa.table(list(zip(*some, strict=True)), schema=_LISTED)


def _as_one(pieces: Iterable[pa.Table]) -> pa.RecordBatchReader:
    """Tables of the same columns, one after the other, read once."""
    every = iter(pieces)
    first = next(every)
    batches = (batch for piece in chain([first], every) for batch in piece.to_batches())
    return pa.RecordBatchReader.from_batches(first.schema, batches)
