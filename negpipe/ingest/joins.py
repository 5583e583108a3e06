"""The joins of ingest: duplicates, ids, judgments. They use DuckDB, which spills to disk; results are streamed.

Memory does not grow with the corpus beyond DuckDB's limit: groups of rows become lists while streaming. No join
multiplies rows: one side has each key at most once, so time grows with the rows however often an id or a text repeats.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from negpipe.config.schema import Config
from negpipe.data.database import number_of
from negpipe.errors import InputError, count_of
from negpipe.ingest.rejected import too_many
from negpipe.sources.fields import about_unknown

if TYPE_CHECKING:
    import duckdb

logger = logging.getLogger(__name__)

BATCH = 8192


def check(config: Config, database: duckdb.DuckDBPyConnection) -> None:
    """Reject what cannot be fixed later: an id with two texts, nothing to mine."""
    for table, what in (("documents", "document"), ("queries", "query")):
        # The first row that differs from an earlier one with its id also differs from the id's first row.
        clash = database.execute(f"""
            with clashing as (select id, min(rowid) as first from {table} group by id
                having min(d1) != max(d1) or min(d2) != max(d2))
            select b.id, b.file, b.line, a.file, a.line from clashing
            join {table} a on a.rowid = first join {table} b on b.id = clashing.id and (a.d1, a.d2) != (b.d1, b.d2)
            order by b.rowid limit 1
        """).fetchone()
        if clash:
            raise InputError(
                f"{what} id {clash[0]!r} appears again with a different text (first in {clash[3]}, row {clash[4]})",
                file=clash[1],
                row=clash[2],
                remedy="Give every text its own id, or remove the older row",
            )
    documents, queries, judgments = (
        number_of(database, f"select count(*) from {table}") for table in ("documents", "queries", "judgments")
    )
    name = _named(config) or "the source"
    for count, what in ((documents, "documents"), (queries, "queries"), (judgments, "relevance judgments")):
        if not count:
            raise InputError(f"{name} contains no {what}", remedy="Check data.path, data.format and data.columns")


def _named(config: Config) -> str | None:
    path = config.data.path
    return path if path is None or isinstance(path, str) else ", ".join(path)


def join(config: Config, database: duckdb.DuckDBPyConnection) -> None:
    """Number the rows and resolve every judgment to (query, row). Queries in `put_aside` must not become anchors."""
    database.execute("""
        create table numbered as
        select *, row_number() over (order by not corpus, first) - 1 as row from (
            select d1, d2, any_value(normalized) as normalized, bool_or(corpus) as corpus,
                coalesce(min(position) filter (corpus), min(position)) as first
            from documents group by d1, d2);
        create table ids as select id, min(row) as row from documents join numbered using (d1, d2) group by id;
        create table skipped_ids as select distinct id, of_query from skipped where id is not null;
    """)
    unknown = """
        select j.query, j.document, j.file, j.line, q.id is null as query_unknown, d.id is null as document_unknown,
            j.rowid as n from judgments j
        left join (select distinct id from queries) q on j.query = q.id
        left join ids d on j.document = d.id
        where (q.id is null and j.query not in (select id from skipped_ids where of_query))
           or (d.id is null and j.document not in (select id from skipped_ids where not of_query))
    """
    database.execute(f"create table unknown_judgments as {unknown}")
    total = number_of(database, "select count(*) from unknown_judgments")
    left = config.data.max_bad_rows - number_of(database, "select count(*) from skipped where bad")
    if total:
        _tell_unknown(config, database, total, allowed=total <= left or config.data.on_unknown_id == "skip")
    database.execute(f"""
        create table good as
        select j.query, d.row, j.split, max(j.grade) as grade, min(j.rowid) as n, bool_or(j.document = f.id) as by_id
        from judgments j join ids d on j.document = d.id join numbered n on d.row = n.row
        join documents f on f.corpus = n.corpus and f.position = n.first
        where j.grade >= {config.data.min_grade} group by j.query, d.row, j.split;
        create table askers as
        select id, any_value(text) as text, any_value(d1) as d1, any_value(d2) as d2,
            any_value(normalized) as normalized, min(source_row) as source_row, arg_min(extra, source_row) as extra
        from queries group by id;
        create table positives as select * from good where split = {_quoted(config.data.split)};
        create table put_aside (id varchar);
        create table refused as
        select j.query, d.row, if(bool_or(j.grade is null), null, max(j.grade)) as grade, min(j.rowid) as n
        from judgments j join ids d on j.document = d.id
        where j.grade is null or j.grade < {config.data.min_grade} group by j.query, d.row;
        create table contradicted as select * from refused semi join good using (query, row);
        delete from refused using contradicted c where refused.query = c.query and refused.row = c.row;
    """)
    _tell_contradictions(database)
    if not number_of(database, "select count(*) from positives semi join askers on query = id"):
        splits = [row[0] for row in database.execute("select distinct split from judgments order by 1").fetchall()]
        raise InputError(
            f"no query has a positive of grade {config.data.min_grade} or more in split '{config.data.split}'",
            file=_named(config),
            field="data.split",
            remedy=f"Available splits: {', '.join(splits)}; data.min_grade sets the minimum grade",
        )


def _tell_unknown(config: Config, database: duckdb.DuckDBPyConnection, total: int, *, allowed: bool) -> None:
    """Warn about judgments of unknown ids, or raise InputError if they are not allowed."""
    row = database.execute("select * from unknown_judgments order by n limit 1").fetchone()
    assert row is not None
    query, document, file, line, query_unknown, *_ = row
    what, which = ("query", query) if query_unknown else ("document", document)
    hint = about_unknown(which)
    counts = {
        side: number_of(database, f"select count(*) from unknown_judgments where {side}_unknown")
        for side in ("query", "document")
    }
    of_each = ", ".join(f"{count:,} of an unknown {side}" for side, count in counts.items() if count)
    if not allowed:
        remedy = f"Add the {what}, or set data.on_unknown_id: skip to reject such judgments"
        error = InputError(
            f"the relevance judgment names an unknown {what} id {which!r} (in total {of_each})",
            file=file,
            row=line,
            remedy=". ".join(filter(None, [hint, remedy])),
        )
        raise too_many(error, config.data.max_bad_rows)
    logger.warning(
        "%d of %d relevance judgments name an unknown id (%s) and are rejected, such as %s id %r in %s, row %d%s",
        *(total, number_of(database, "select count(*) from judgments"), of_each),
        *(what, which, file, line, hint and f". {hint}"),
    )


def number(database: duckdb.DuckDBPyConnection) -> None:
    """Number the anchors, and find all their known positives."""
    database.execute("""
        create table anchors as select *, row_number() over (order by source_row) - 1 as number from askers
        where id in (select query from positives) and id not in (select id from put_aside);
        create table known as
        select number, row, bool_or(by_id) as by_id from good join anchors on query = id group by number, row;
    """)


def _tell_contradictions(database: duckdb.DuckDBPyConnection) -> None:
    """Warn about documents judged relevant in one place and not relevant in another, in one split or several."""
    if count := number_of(database, "select count(*) from contradicted"):
        example = database.execute("""
            select j.query, j.document, j.file, j.line, j.grade from contradicted join judgments j on j.rowid = n
            order by n limit 1""").fetchone()
        assert example is not None
        query, document, file, line, grade = example
        said = "given as a negative" if grade is None else f"judged {grade:g}"
        logger.warning(
            "%s judged relevant in one place and not relevant in another: counted as positives."
            " Document %r is %s for query %r in %s, row %d",
            *(count_of(count, "document"), document, said, query, file, line),
        )


def documents(database: duckdb.DuckDBPyConnection, *, corpus: bool) -> Iterator[pa.Table]:
    """Rows of the corpus, or of the positives missing from it, in order.

    Yields:
        tables of first (position in the spool), normalized, cut, ids (unique, the first one first), source_rows.
    """
    heads = f"select row as number, first, normalized, d1 as cut, d2 from numbered where corpus = {corpus} order by row"
    of_texts = f"from numbered n join documents d using (d1, d2) where n.corpus = {corpus}"
    place = f"d.position + if(d.corpus, 0, {2**62})"
    ids, source_rows = (
        _Followers(_batches(database, _sorted(database, query)))
        for query in (
            f"""select number, id from (select n.row as number, d.id, min({place}) as place {of_texts} group by all)
                order by number, place""",
            f"select n.row as number, d.source_row {of_texts} order by number, {place}",
        )
    )
    for batch in _batches(database, heads):
        table = pa.Table.from_batches([batch])
        if batch.num_rows:
            first = table["number"][0].as_py()
            high = first + batch.num_rows
            lists = ids.take(first, high, {"ids": "id"}) | source_rows.take(first, high, {"source_rows": "source_row"})
            yield _with(table.drop_columns("number"), lists)


def anchors(database: duckdb.DuckDBPyConnection, rows: int) -> Iterator[pa.Table]:
    """The anchors in order, each with the rows of its positives and of all its known positives.

    Yields:
        tables of up to `rows` anchors, as their texts may have any length.
    """
    positives, known, refused = (
        _Followers(_batches(database, _sorted(database, query)))
        for query in (
            "select number, row, grade from positives join anchors on query = id order by number, n",
            "select number, row, by_id from known order by number, row",
            "select number, row, grade from refused join anchors on query = id order by number, row",
        )
    )
    heads = _batches(
        database,
        """
        select a.id, a.text, a.extra, a.normalized, coalesce(n.row, -1) as self_row, coalesce(i.row, -1) as same_id,
            [a.source_row] as source_rows, a.d1 as cut, a.d2
        from anchors a left join numbered n using (d1, d2) left join ids i on i.id = a.id order by a.number""",
        min(rows, BATCH),
    )
    low = 0
    for batch in heads:
        high = low + batch.num_rows
        lists = positives.take(low, high, {"positives": "row", "grades": "grade"}) | known.take(
            low, high, {"known": "row", "known_by_id": "by_id"}
        )
        lists |= refused.take(low, high, {"refused": "row", "refused_grades": "grade"})
        yield _with(pa.Table.from_batches([batch]), lists)
        low = high


def namesakes(database: duckdb.DuckDBPyConnection) -> Iterator[pa.Table]:
    """The known positives of several queries with the same normalized text, once per text.

    Yields:
        tables of normalized and row, ascending, for every text shared by an anchor and another query with positives;
        and cut.
    """
    query = """
        with said as (select q.normalized, q.id, g.row from good g join askers q on g.query = q.id
            where q.normalized in (select normalized from anchors))
        select distinct normalized, row from said where normalized in (
            select normalized from said group by normalized having min(id) != max(id)
        ) order by normalized, row"""
    for batch in _batches(database, query):
        table = pa.Table.from_batches([batch])
        # Of both, so that parts can also end within the rows of a text.
        cut = table["normalized"].to_numpy() ^ table["row"].to_numpy().astype(np.uint64)
        yield table.append_column("cut", pa.array(cut))


def counts(config: Config, database: duckdb.DuckDBPyConnection) -> dict[str, int]:
    """Counts of what was read, merged and rejected."""
    queries = {
        "documents_read": "select count(*) from documents",
        "source_documents": "select (select count(*) from documents where corpus)"
        " + (select count(*) from skipped where in_corpus)",
        "source_queries": "select (select count(*) from queries) + (select count(*) from skipped where of_query)",
        "duplicate_texts": "select (select count(*) from documents) - (select count(*) from numbered)",
        "queries_read": "select count(*) from askers",
        "queries_without_positive": "select count(*) from askers anti join positives on query = id",
        "judgments_read": "select count(*) from judgments",
        # By exact anchor text, counting repeated rows, like sentence-transformers.
        "max_positives": "select coalesce(max(n), 0) from (select count(*) as n from judgments j"
        " join anchors a on j.query = a.id join ids d on j.document = d.id"
        f" where j.grade >= {config.data.min_grade} and j.split = {_quoted(config.data.split)} group by a.d1, a.d2)",
        "judged_not_relevant": "select count(*) from refused where grade is not null",
        "given_negatives": "select count(*) from refused where grade is null",
        "unknown_judgments": "select count(*) from unknown_judgments",
        "skipped_empty": "select count(*) from skipped where kind = 'empty_text'",
        "rejected_rows": "select (select count(*) from skipped) + (select count(*) from unknown_judgments)",
        "positives": "select count(*) from positives join anchors on query = id",
    }
    return {name: number_of(database, query) for name, query in queries.items()}


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _sorted(database: duckdb.DuckDBPyConnection, query: str) -> str:
    """A query of the same rows that does not sort while other queries run, as sorting takes memory until it ends."""
    name = f"sorted_{number_of(database, 'select count(*) from duckdb_tables()')}"
    database.execute(f"create table {name} as {query}")
    return f"select * from {name}"


def _batches(database: duckdb.DuckDBPyConnection, query: str, rows: int = BATCH) -> pa.RecordBatchReader:
    """The result of a query, streamed; with a separate cursor, since other queries run in between."""
    return database.cursor().sql(query).to_arrow_reader(rows)


def _with(table: pa.Table, lists: dict[str, pa.ListArray]) -> pa.Table:
    for name, column in lists.items():
        table = table.append_column(name, column)
    return table


class _Followers:
    """Rows of a query ordered by `number`, gathered into lists for ascending ranges of numbers."""

    def __init__(self, batches: pa.RecordBatchReader) -> None:
        self._batches, self._rest = batches, pa.Table.from_batches([], batches.schema)

    def take(self, low: int, high: int, columns: dict[str, str]) -> dict[str, pa.ListArray]:
        """Lists for the numbers from `low` to below `high`: name of the list → values of the column."""
        pieces = []
        while True:
            cut = int(np.searchsorted(self._rest["number"].to_numpy(), high))
            pieces.append(self._rest.slice(0, cut))
            self._rest = self._rest.slice(cut)
            batch = None if self._rest.num_rows else next(self._batches, None)
            if batch is None:
                break
            self._rest = pa.Table.from_batches([batch])
        table = pa.concat_tables(pieces)
        sizes = np.bincount(table["number"].to_numpy() - low, minlength=high - low)
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        return {
            name: pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), table[column].combine_chunks())
            for name, column in columns.items()
        }
