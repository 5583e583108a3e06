"""Rows of the source that were left out: how many may be, and `rejected.jsonl`, which lists every one with the reason.

A row is bad where it would end the run by itself: it cannot be read, or it names what is not there. Rows that
`data.on_empty: skip` or `data.on_unknown_id: skip` leave out are listed too, but are not bad.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from negpipe.errors import InputError

if TYPE_CHECKING:
    import duckdb

NAME = "rejected.jsonl"
_BATCH = 8192
_ROWS = """
    select file, line, field, kind, reason, raw, 0 as later, rowid as n from skipped
    union all
    select file, line, null, 'unknown_id', 'the relevance judgment names an unknown '
        || case when query_unknown then 'query' else 'document' end || ' id',
        concat_ws(chr(9), left(query, 100), left(document, 100)), 1, n from unknown_judgments
    order by later, n"""


def too_many(error: InputError, allowed: int) -> InputError:
    """The error of a bad row for which `data.max_bad_rows` leaves no room."""
    if not allowed:
        return error
    remedy = f"Or allow more of them with --max-bad-rows: {NAME} then lists each"
    return InputError(
        f"{error.problem}; there are more bad rows than data.max_bad_rows ({allowed:,}) allows",
        file=error.file,
        row=error.row,
        field=error.field,
        remedy=f"{error.remedy}. {remedy}" if error.remedy else remedy,
    )


def write(database: duckdb.DuckDBPyConnection, path: Path) -> int:
    """Write what was left out, a JSON object a line in the order of the source; returns how many.

    Not ASCII, and what would steer a terminal, is escaped. Memory holds one batch.
    """
    count = 0
    found = database.cursor().execute(_ROWS)
    with path.open("w", encoding="ascii") as file:
        while rows := found.fetchmany(_BATCH):
            for name, row, field, kind, reason, raw, *_ in rows:
                entry = {"file": name, "row": row, "field": field, "kind": kind, "reason": reason, "raw": raw}
                file.write(json.dumps(entry) + "\n")
            count += len(rows)
    return count
