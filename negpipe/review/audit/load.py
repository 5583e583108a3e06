"""Loads rows into DuckDB: every document once per row, every text once, with the hashes that checks compare.

entries    row, a (anchor), u (unit that should have all its negatives), n (anchor's normalised text), signature
documents  doc, row, positive, h (text), id, score, rank
texts      h, text, n, normalized
negatives  doc, row, a, u, id, document (the qrels' number for the id), h, n, score
positives  a, id, document, h, n: positives of an anchor, from the rows (id) and the qrels (document)
anchors    a, n: from the rows and the qrels

A document of the qrels may have many ids and many anchors: their combinations are never listed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from negpipe.data.database import number_of
from negpipe.data.texts import hashes, normalize
from negpipe.errors import InputError
from negpipe.review.audit.columns import RowLayout, quoted_path

if TYPE_CHECKING:
    import duckdb

_BATCH = 16384
_SHOWN = 100  # characters of a name in a message
# A missing text has no hash: it equals nothing.
_HASH = "case when {0} is null then null else hash({0}) end"


def rows(database: duckdb.DuckDBPyConnection, layout: RowLayout, source: str) -> None:
    """Read the file once.

    Raises:
        InputError: a row cannot be read, or there are none.
    """
    import duckdb

    lists = {"texts": ("positive", "varchar"), "ids": ("positive_id", "varchar"), "labels": ("label", "double")}
    lists |= {"negatives": ("negative", "varchar"), "negative_ids": ("negative_id", "varchar")}
    lists |= {f"{side}_scores": (f"{side}_score", "double") for side in ("positive", "negative")}
    lists |= {"scores": ("score", "double"), "ranks": ("rank", "bigint"), "negative_ranks": ("negative_rank", "bigint")}
    columns = [f"{layout.list_of(field, kind)} as {name}" for name, (field, kind) in lists.items()]
    columns += [f"{layout.value_of(name)} as {name}" for name in ("anchor", "anchor_id")]
    parts, first = [], 0
    for path in layout.files:
        table = f"read_parquet('{quoted_path(path)}', file_row_number=true)"
        parts.append(f"select {first} + file_row_number as row, {', '.join(columns)} from {table}")
        try:
            first += pq.ParquetFile(path).metadata.num_rows
        except (OSError, pa.ArrowInvalid, UnicodeDecodeError) as error:
            raise InputError(f"cannot be read: {error}", file=str(path)) from None
    if not first:
        raise InputError("contains no rows", file=source, remedy="Run `negpipe mine CONFIG`, or name another file")
    # A view: texts are read again when needed, which is faster than storing them.
    database.execute(f"create view source as {' union all '.join(parts)}")
    anchor = "anchor_id" if layout.has("anchor_id") else "anchor"
    unit = "hash(anchor, anchor_id)" if layout.pairs else "hash(anchor, anchor_id, texts[1])"
    if layout.labelled:
        documents = [_documents("texts", "ids", _either("positive_scores", "scores"), "ranks", "unnest(labels) > 0")]
    else:
        size = "len(texts)"
        documents = [
            _documents("texts", "ids", _either("positive_scores", f"scores[:{size}]"), f"ranks[:{size}]", "true"),
            _documents(
                "negatives",
                "negative_ids",
                _either("negative_scores", f"scores[{size} + 1:]"),
                _either("negative_ranks", f"ranks[{size} + 1:]"),
                "false",
            ),
        ]
    try:
        database.execute(
            f"create table entries as select row, anchor_id, {_HASH.format(anchor)} as a, {unit} as u,"
            f" {_HASH.format('anchor')} as h,"
            " hash(anchor, anchor_id, texts, ids, labels, negatives, negative_ids) as signature from source"
        )
        database.execute(
            "create table documents as select row_number() over (order by row, not positive, place) - 1 as doc, *"
            " from (select row, place, coalesce(positive, false) as positive, id, score, rank,"
            f" {_HASH.format('text')} as h from ({' union all '.join(documents)}))"
        )
    except duckdb.OutOfMemoryException:
        raise
    except duckdb.Error as error:
        raise InputError(f"cannot be read: {str(error).splitlines()[0]}", file=source) from None


def qrels(
    database: duckdb.DuckDBPyConnection,
    positives: Iterable[pa.Table],
    documents: Iterable[pa.Table],
    source: str,
    name: str,
    layout: RowLayout,
) -> None:
    """Add the qrels.

    Raises:
        InputError: most ids of the rows are unknown to them: they are from other data.
    """
    database.execute("create table judged (anchor_id varchar, anchor varchar, document bigint, text varchar)")
    database.execute("create table known_ids (document bigint, id varchar)")
    for table in positives:
        database.register("piece", table)
        database.execute("insert into judged select anchor_id, anchor, document, text from piece")
    for table in documents:
        database.register("piece", table)
        database.execute(
            "insert into known_ids select document, unnest(list_prepend(id, coalesce(other_ids, []))) from piece"
        )
    check_known(database, ids(layout), source, name)
    anchor = "anchor_id" if layout.has("anchor_id") else "anchor"
    database.execute(
        f"create table known as select hash({anchor}) as a, anchor_id, hash(anchor) as anchor, document,"
        " hash(text) as h from judged"
    )


def ids(layout: RowLayout) -> dict[str, tuple[str, str]]:
    """Of anchors and documents: queries of (id, row, doc) of the rows' ids, and of (id) of the known ones. A missing id
    is not an unknown one."""
    queries = {}
    if layout.has("anchor_id"):
        asked = "select anchor_id as id, row, null as doc from entries where anchor_id != ''"
        queries["anchor id"] = asked, "select anchor_id as id from judged"
    if layout.has("positive_id") or layout.has("negative_id"):
        queries["document id"] = "select id, row, doc from documents where id != ''", "select id from known_ids"
    return queries


def anchor_texts(layout: RowLayout) -> dict[str, tuple[str, str]]:
    """The same of anchors without ids: their normalised texts stand for them."""
    if layout.has("anchor_id"):
        return {}
    asked = "select normalized as id, row, null as doc from entries join normal using (h) where normalized != ''"
    return {"anchor text": (asked, "select normalized as id from known join normal on known.anchor = normal.h")}


def texts(database: duckdb.DuckDBPyConnection, *, with_qrels: bool) -> None:
    """Store every text once, normalised; then the tables that depend on it."""
    parts = ["select anchor as text from source", "select unnest(texts) from source"]
    parts.append("select unnest(negatives) from source")
    if with_qrels:
        parts.append("select unnest([anchor, text]) from judged")
    database.execute(
        "create table raw as select h, first(text) as text from (select hash(text) as h, text"
        f" from ({' union all '.join(parts)}) where text is not null) group by h"
    )
    database.execute("create table normal (h ubigint, n ubigint, normalized varchar)")
    reader = database.cursor().sql("select h, text from raw").to_arrow_reader(_BATCH)
    for batch in reader:
        normalized = [normalize(text) for text in batch["text"].to_pylist()]
        piece = pa.table({"h": batch["h"], "n": hashes(normalized), "normalized": pa.array(normalized, pa.string())})
        database.register("piece", piece)
        database.execute("insert into normal select h, n, normalized from piece")
    known = "union select a, null, document, h, n from known join normal using (h)" if with_qrels else ""
    document, ids = ("document", "left join known_ids using (id)") if with_qrels else ("null::bigint as document", "")
    asked = "union select a, n from known join normal on known.anchor = normal.h" if with_qrels else ""
    database.execute(f"""
        create table anchors as select distinct a, n from entries join normal using (h) where a is not null {asked};
        create table negatives as select doc, row, a, u, id, {document}, d.h, n, score
            from documents d join entries using (row) left join normal on d.h = normal.h {ids} where not positive;
        create table positives as select distinct a, id, null::bigint as document, d.h, n
            from documents d join entries using (row) join normal on d.h = normal.h
            where positive and a is not null {known};
    """)


def counts(database: duckdb.DuckDBPyConnection) -> dict[str, int]:
    """Rows, their anchors, positives and negatives."""
    queries = {
        "rows": "select count(*) from entries",
        "anchors": "select count(distinct a) from entries",
        "positives": "select count(*) from documents where positive",
        "negatives": "select count(*) from negatives",
    }
    return {name: number_of(database, query) for name, query in queries.items()}


def _documents(texts: str, ids: str, scores: str, ranks: str, positive: str) -> str:
    return (
        f"select row, unnest({texts}) as text, unnest({ids}[:len({texts})]) as id,"
        f" unnest({scores}[:len({texts})]) as score, unnest({ranks}[:len({texts})]) as rank,"
        f" generate_subscripts({texts}, 1) as place, {positive} as positive"
        f" from source where len({texts}) > 0"
    )


def _either(first: str, second: str) -> str:
    return f"coalesce({first}, {second})"


def check_known(
    database: duckdb.DuckDBPyConnection, queries: dict[str, tuple[str, str]], source: str, name: str
) -> None:
    """Refuse rows that mostly are not about the data: no comparison to its qrels would mean anything.

    Args:
        database: with the rows and the qrels.
        queries: those of `ids` or `anchor_texts`.
        source: the rows, for the message.
        name: the data.

    Raises:
        InputError: most are unknown; a check counts fewer.
    """
    for what, (asked, there) in queries.items():
        unknown = f"select id, min(row) as row from ({asked}) group by id having id not in ({there})"
        first = database.execute(f"select id, row from ({unknown}) order by row, id limit 1").fetchone()
        total = number_of(database, f"select count(*) from ({unknown})")
        asked_for = number_of(database, f"select count(distinct id) from ({asked})")
        if first is None or 2 * total <= asked_for:
            continue
        where = "documents" if what == "document id" else "anchors of data.split"
        raise InputError(
            f"{total:,} of {asked_for:,} {what}s are not among the {where} of {name}, such as {first[0][:_SHOWN]!r}",
            file=source,
            row=first[1],
            remedy="If the source has changed, run `negpipe ingest CONFIG` first; otherwise name the config the rows"
            " came from, map the id columns with --columns, or audit without a config",
        )
