"""Converts rows whose passages are objects, messages or ids of external documents into plain rows of texts and ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from negpipe import sources
from negpipe.config import schema
from negpipe.data.texts import text_id
from negpipe.errors import ConfigError, InputError
from negpipe.sources import BadRow, Document, Judgment, Query

if TYPE_CHECKING:
    import duckdb

FORMATS = ("tevatron", "dpr", "ms-swift", "nemo", "pylate")
"""Values of `data.format` whose rows are not plain."""

_TABLES = {
    "passages": pa.schema({"id": pa.string(), "named": pa.bool_(), "text": pa.string()}),
    "asked": pa.schema({"id": pa.string(), "named": pa.bool_(), "text": pa.string()}),
    "listed": pa.schema(
        {"n": pa.int64(), "file": pa.string(), "row": pa.int64(), "anchor": pa.string(), "document": pa.string()}
        | {"positive": pa.bool_()}
    ),
}


def recognized(source: Path) -> schema.Data | None:
    """The source, if its rows have such a layout."""
    try:
        data = sources.recognized(schema.Data(path=str(source)))
    except (ConfigError, InputError):
        return None
    return data if data.format in FORMATS else None


def flatten(database: duckdb.DuckDBPyConnection, data: schema.Data, path: Path) -> None:
    """Write rows of anchor, anchor_id, and lists of positive, positive_id, negative and negative_id, as Parquet.

    An id that a row does not state is null; if no row states one, the column is left out. Rows keep their order.

    Raises:
        InputError: a row cannot be read, or refers to a missing document.
    """
    for name, columns in _TABLES.items():
        database.register("piece", columns.empty_table())
        database.execute(f"create table {name} as select * from piece")
    number = 0
    for piece in sources.pieces(data, given=True):
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in _TABLES}
        for name, row in _rows_of(piece):
            if name == "listed":
                row["n"] = number
                number += 1
            rows[name].append(row)
        for name, columns in _TABLES.items():
            database.register("piece", pa.Table.from_pylist(rows[name], columns))
            database.execute(f"insert into {name} select * from piece")
    database.unregister("piece")
    for side, table in (("document", "passages"), ("anchor", "asked")):
        twice = database.execute(
            f"select id from {table} group by id having count(distinct text) > 1 order by id limit 1"
        ).fetchone()
        if twice:
            problem = f"the {side} id {twice[0]!r} has several texts, so the id is ambiguous"
            remedy = "Give every text a unique id, or audit by texts: --columns positive=…,negative=…"
            raise InputError(problem, file=str(data.path), remedy=remedy)
        unknown = database.execute(
            f"select {side}, file, row from listed where {side} not in (select id from {table}) order by n limit 1"
        ).fetchone()
        if unknown:
            problem = f"the {side} {unknown[0]!r} is named here but defined nowhere"
            raise InputError(problem, file=unknown[1], row=unknown[2], remedy="Add it next to the rows")
    ids = {
        name: database.execute(f"select bool_or(named) from {name}").fetchone() == (True,)
        for name in ("passages", "asked")
    }
    lists = ", ".join(
        f"coalesce(list({value} order by n) filter ({condition}), []) as {name}"
        for side, condition in (("positive", "positive"), ("negative", "not positive"))
        for name, value in ((side, "p.text"), *([(f"{side}_id", "if(p.named, p.id, null)")] if ids["passages"] else []))
    )
    anchor_id = ", if(any_value(a.named), any_value(a.id), null) as anchor_id" if ids["asked"] else ""
    database.execute(f"""
        create table passages_once as select id, any_value(named) as named, any_value(text) as text from passages
            group by id;
        create table asked_once as select id, any_value(named) as named, any_value(text) as text from asked group by id;
        copy (select any_value(a.text) as anchor{anchor_id}, {lists}
            from listed join passages_once p on p.id = document join asked_once a on a.id = anchor
            group by file, row order by min(n)) to '{str(path).replace("'", "''")}' (format parquet, compression lz4);
        drop table passages_once; drop table asked_once;
    """)
    for name in _TABLES:
        database.execute(f"drop table {name}")


def _rows_of(piece: sources.Piece) -> Iterator[tuple[str, dict[str, Any]]]:
    for record in piece.records():
        if isinstance(record, BadRow):
            raise record.error
        if isinstance(record, Judgment):
            anchor = text_id(record.query) if record.query_by_text else record.query
            document = text_id(record.document) if record.document_by_text else record.document
            place = {"file": record.place.file, "row": record.place.row}
            positive = record.grade is not None and record.grade > 0
            yield "listed", {**place, "anchor": anchor, "document": document, "positive": positive}
        else:
            assert isinstance(record, Document | Query)
            named = record.id is not None
            row = {"id": record.id if named else text_id(record.text), "named": named, "text": record.text}
            yield "passages" if isinstance(record, Document) else "asked", row
