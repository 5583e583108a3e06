"""Rejected rows of the source: their limit, and `rejected.jsonl`, which lists each with the reason.

A row is bad if it would stop the run: it cannot be read, or has an unknown id. Rows rejected due to
`data.on_empty: skip` or `data.on_unknown_id: skip` are listed too, but are not bad.
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
    """The error of a bad row that exceeds `data.max_bad_rows`."""
    if not allowed:
        return error
    remedy = f"Or allow more with --max-bad-rows: {NAME} then lists them"
    return InputError(
        f"{error.problem}; the source has more bad rows than data.max_bad_rows ({allowed:,}) allows",
        file=error.file,
        row=error.row,
        field=error.field,
        remedy=f"{error.remedy}. {remedy}" if error.remedy else remedy,
    )


def write(database: duckdb.DuckDBPyConnection, path: Path) -> int:
    """Write the rejected rows, one JSON object per line in the order of the source; return their number.

    Non-ASCII and control characters are escaped. Memory holds one batch.
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
