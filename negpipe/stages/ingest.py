"""ingest: any source → corpus and anchor tables, in one pass over the source.

Guarantees: identical texts share one row; rows are numbered corpus first (in source order), then the
positives the corpus lacked; every problem of the input is found before anything is encoded. Texts go
through a spool on disk and everything that must be joined through DuckDB, which spills: memory holds
one part, whatever the corpus.

Parts are Arrow IPC files of three kinds. `corpus` and `added` (positives from elsewhere): id, text,
hashes of id and normalised text, the other ids of the row, its rows in the source. `anchors`: id, text,
hashes, rows and grades of its positives, rows of all its known positives, rows shared from anchors with
the same normalised text, the row that equals its own text (-1: none), its row in the source. Columns that
`data.extra` keeps stand in all of them as `extra:NAME`, with the values of the first row that has the text or id.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from negpipe import sources
from negpipe.config import Config
from negpipe.errors import ConfigError, InputError
from negpipe.fingerprint import digest, key
from negpipe.manifest import BOOKS, Part
from negpipe.stage import Context, Made, Progress, Publisher, Stage, Task
from negpipe.storage import explained
from negpipe.texts import digests, hashes, normalize, text_id

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

logger = logging.getLogger(__name__)

BATCH = 8192
VERSION = 1


def _settings(config: Config) -> dict[str, Any]:
    data = config.data
    # Where the data lies is circumstance; what it holds is in the sources' digests.
    tables = {name: {"path"} for name in ("corpus", "queries", "qrels") if getattr(data, name)}
    kept = data.model_dump(mode="json", exclude={"path": True, "revision": True, **tables})
    return {f"data.{name}": value for name, value in kept.items()}


def _sources(context: Context) -> dict[str, str]:
    data = context.config.data
    local = [[Path(name).name, context.digest_file(Path(name))] for name in sources.files(data) or []]
    return {"data.path": digest(local, sources.revision(data))}


def _plan(context: Context) -> Iterator[Task]:
    folder = context.run_dir / BOOKS / "ingest"
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob("spool-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    with (
        explained(folder),
        _within(context.config.resources.memory_budget),
        tempfile.TemporaryDirectory(prefix="spool-", dir=folder) as spool,
    ):
        database = _load(context, Path(spool))
        try:
            _check(context.config, database)
            _join(context.config, database)
            yield from _documents(context.config, database, Path(spool))
            yield from _anchors(context.config, database)
            yield _counts(context.config, database)
        finally:
            database.close()


@contextmanager
def _within(budget: int) -> Iterator[None]:
    import duckdb

    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise ConfigError(
            f"resources.memory_budget: {budget // 2**20} MiB are too few to read this source"
            f" ({str(error).splitlines()[0]}): set it higher"
        ) from error


# --- one pass over the source -------------------------------------------------------------------------


def _load(context: Context, spool: Path) -> duckdb.DuckDBPyConnection:
    """Read the source once: texts to the spool, everything else to the database."""
    import duckdb

    budget = context.config.resources.memory_budget
    database = duckdb.connect(
        str(spool / "ingest.duckdb"),
        config={
            "memory_limit": f"{budget // 2**20 // 2}MiB",
            "threads": max(1, context.threads),
            "temp_directory": str(spool / "spill"),
        },
    )
    database.execute("""
        create table documents (corpus boolean, position bigint, source_row bigint, id varchar,
            d1 ubigint, d2 ubigint, normalized ubigint, file varchar, line bigint);
        create table queries (source_row bigint, id varchar, text varchar, extra varchar[],
            d1 ubigint, d2 ubigint, normalized ubigint, file varchar, line bigint);
        create table judgments (query varchar, document varchar, grade double, split varchar,
            file varchar, line bigint);
        create table skipped (id varchar, kind varchar, of_query boolean);
    """)
    writer = _Writer(context.config, database, spool)
    with writer:
        records = sources.read(context.config.data)
        while batch := tuple(islice(records, BATCH)):
            writer.add(batch)
    return database


class _Writer:
    """Sorts records into the spool and the tables, a batch at a time."""

    def __init__(self, config: Config, database: duckdb.DuckDBPyConnection, spool: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._config, self._database = config, database
        names = ["text", *_extra(config.data.extra.corpus)]
        schema = pa.schema([(name, pa.large_string()) for name in names])
        self._spools = {c: pq.ParquetWriter(spool / _spool_name(c), schema, compression="lz4") for c in (True, False)}
        self._positions = {True: 0, False: 0}
        self._rows = {"document": 0, "query": 0}

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        for spool in self._spools.values():
            spool.close()

    def add(self, records: tuple[sources.Record, ...]) -> None:
        documents: dict[bool, list[tuple[int, sources.Document]]] = {True: [], False: []}
        queries: list[tuple[int, sources.Query]] = []
        judgments: list[sources.Judgment] = []
        for record in records:
            if isinstance(record, sources.Document):
                # Only the corpus has a row in the source that vectors can be matched to.
                row = self._next("document") if record.in_corpus else -1
                documents[record.in_corpus].append((row, record))
            elif isinstance(record, sources.Query):
                queries.append((self._next("query"), record))
            elif isinstance(record, sources.Judgment):
                judgments.append(record)
            else:
                self._skip(record)
        for corpus, rows in documents.items():
            if rows:
                self._add_documents(corpus, rows)
        if queries:
            self._add_queries(queries)
        if judgments:
            self._add_judgments(judgments)

    def _next(self, kind: str) -> int:
        self._rows[kind] += 1
        return self._rows[kind] - 1

    def _skip(self, bad: sources.BadRow) -> None:
        if bad.kind != "empty_text" or self._config.data.on_empty == "error":
            raise bad.error
        logger.debug("skipped: %s", bad.error)
        self._next("query" if bad.of_query else "document")
        self._insert("skipped", {"id": [bad.id], "kind": [bad.kind], "of_query": [bad.of_query]})

    def _add_documents(self, corpus: bool, rows: list[tuple[int, sources.Document]]) -> None:
        import pyarrow as pa

        texts = [document.text for _, document in rows]
        start = self._positions[corpus]
        self._positions[corpus] += len(rows)
        spool = self._spools[corpus]
        nothing = (None,) * len(self._config.data.extra.corpus)
        values = [texts, *zip(*(document.extra or nothing for _, document in rows), strict=True)]
        spool.write_table(pa.table([pa.array(column, pa.large_string()) for column in values], schema=spool.schema))
        self._insert(
            "documents",
            {
                "corpus": [corpus] * len(rows),
                "position": np.arange(start, start + len(rows)),
                "source_row": [row for row, _ in rows],
                "id": [document.id if document.id is not None else text_id(document.text) for _, document in rows],
                **_hash_columns(texts),
                "file": [document.place.file for _, document in rows],
                "line": [document.place.row for _, document in rows],
            },
        )

    def _add_queries(self, rows: list[tuple[int, sources.Query]]) -> None:
        import pyarrow as pa

        texts = [query.text for _, query in rows]
        self._insert(
            "queries",
            {
                "source_row": [row for row, _ in rows],
                "id": [query.id if query.id is not None else text_id(query.text) for _, query in rows],
                "text": texts,
                "extra": pa.array([query.extra for _, query in rows], pa.list_(pa.string())),
                **_hash_columns(texts),
                "file": [query.place.file for _, query in rows],
                "line": [query.place.row for _, query in rows],
            },
        )

    def _add_judgments(self, rows: list[sources.Judgment]) -> None:
        self._insert(
            "judgments",
            {
                "query": [text_id(row.query) if row.query_by_text else row.query for row in rows],
                "document": [text_id(row.document) if row.document_by_text else row.document for row in rows],
                "grade": [float(row.grade) for row in rows],
                "split": [row.split for row in rows],
                "file": [row.place.file for row in rows],
                "line": [row.place.row for row in rows],
            },
        )

    def _insert(self, table: str, columns: dict[str, Any]) -> None:
        import pyarrow as pa

        self._database.register("incoming", pa.table(columns))
        self._database.execute(f"insert into {table} by name select * from incoming")
        self._database.unregister("incoming")


def _hash_columns(texts: list[str]) -> dict[str, npt.NDArray[np.uint64]]:
    both = digests(texts)
    return {"d1": both[:, 0], "d2": both[:, 1], "normalized": hashes(map(normalize, texts))}


def _extra(names: tuple[str, ...]) -> list[str]:
    """What columns of `data.extra` are called in the parts."""
    from negpipe.tables import EXTRA

    return [EXTRA + name for name in names]


def _spool_name(corpus: bool) -> str:
    return "corpus.parquet" if corpus else "positives.parquet"


# --- checks and joins ---------------------------------------------------------------------------------


def _check(config: Config, database: duckdb.DuckDBPyConnection) -> None:
    """Refuse what cannot be mended later: an id with two texts, nothing to mine."""
    for table, what in (("documents", "document"), ("queries", "query")):
        clash = database.execute(f"""
            select b.id, b.file, b.line, a.file, a.line from {table} a join {table} b
            on a.id = b.id and (a.d1, a.d2) != (b.d1, b.d2) and a.rowid < b.rowid order by b.rowid, a.rowid limit 1
        """).fetchone()
        if clash:
            raise InputError(
                f"{what} id {clash[0]!r} appears again with another text (first in {clash[3]}, row {clash[4]})",
                file=clash[1],
                row=clash[2],
                remedy="Give every text its own id, or remove the older row",
            )
    documents, queries, judgments = (
        _count(database, f"select count(*) from {table}") for table in ("documents", "queries", "judgments")
    )
    name = config.data.path or "the source"
    for count, what in ((documents, "document"), (queries, "query"), (judgments, "relevance judgment")):
        if not count:
            raise InputError(f"{name} holds no {what}", remedy="Check data.path, data.format and data.columns")


def _join(config: Config, database: duckdb.DuckDBPyConnection) -> None:
    """Number the rows and resolve every judgment to (anchor, row)."""
    database.execute("""
        create table numbered as
        select *, row_number() over (order by not corpus, first) - 1 as row from (
            select d1, d2, any_value(normalized) as normalized, bool_or(corpus) as corpus,
                coalesce(min(position) filter (corpus), min(position)) as first
            from documents group by d1, d2);
        create table ids as
        select id, min(n.row) as row, arg_min(d.id, (not d.corpus, d.position)) as any_id,
            min(not d.corpus) as outside, min(d.position) as position
        from documents d join numbered n using (d1, d2) group by id;
        create table firsts as select row, arg_min(id, (outside, position)) as id from ids group by row;
        create table skipped_ids as select distinct id, of_query from skipped where id is not null;
    """)
    unknown = """
        select j.query, j.document, j.file, j.line, q.id is null as query_unknown from judgments j
        left join (select distinct id from queries) q on j.query = q.id
        left join ids d on j.document = d.id
        where (q.id is null and j.query not in (select id from skipped_ids where of_query))
           or (d.id is null and j.document not in (select id from skipped_ids where not of_query))
    """
    row = database.execute(f"{unknown} order by j.rowid limit 1").fetchone()
    if row and config.data.on_unknown_id == "error":
        what, which = ("query", row[0]) if row[4] else ("document", row[1])
        total = _count(database, f"select count(*) from ({unknown})")
        raise InputError(
            f"the relevance judgment names an unknown {what} id {which!r} ({total} such judgments in all)",
            file=row[2],
            row=row[3],
            remedy=f"Add the {what}, or set data.on_unknown_id: skip to leave such judgments out",
        )
    database.execute(f"create table unknown_judgments as {unknown}")
    database.execute(
        """
        create table good as
        select j.query, d.row, j.split, max(j.grade) as grade, min(j.rowid) as n,
            bool_or(j.document = f.id) as by_id
        from judgments j join ids d on j.document = d.id join firsts f on d.row = f.row
        where j.grade >= ? group by j.query, d.row, j.split""",
        [config.data.min_grade],
    )
    database.execute(
        """
        create table askers as
        select id, any_value(text) as text, any_value(d1) as d1, any_value(d2) as d2,
            any_value(normalized) as normalized, min(source_row) as source_row, arg_min(extra, source_row) as extra
        from queries group by id;
        create table positives as
        select query, list(row order by n) as rows, list(grade order by n) as grades
        from good where split = $split group by query;
        create table known as
        select query, list(row order by row) as rows, list(by_id order by row) as by_id
        from (select query, row, bool_or(by_id) as by_id from good group by query, row) group by query;
        create table shared as
        select normalized, list(distinct row order by row) as rows
        from good join askers on good.query = askers.id group by normalized having count(distinct askers.id) > 1;
    """.replace("$split", _quoted(config.data.split))
    )
    if not _count(database, "select count(*) from positives join askers on query = id"):
        splits = [row[0] for row in database.execute("select distinct split from judgments order by 1").fetchall()]
        raise InputError(
            f"no query has a positive of grade {config.data.min_grade} or more in split '{config.data.split}'",
            file=config.data.path,
            field="data.split",
            remedy=f"Splits there are: {', '.join(splits)}; data.min_grade sets the least grade",
        )


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _count(database: duckdb.DuckDBPyConnection, query: str) -> int:
    row = database.execute(query).fetchone()
    assert row is not None
    return int(row[0])


# --- parts --------------------------------------------------------------------------------------------


def _documents(config: Config, database: duckdb.DuckDBPyConnection, spool: Path) -> Iterator[Task]:
    for corpus in (True, False):
        batches = _batches(
            database,
            f"""
            select first, n.d1, n.normalized, list(d.id order by not d.corpus, d.position) as ids,
                list(d.source_row order by not d.corpus, d.position) as source_rows
            from numbered n join documents d using (d1, d2) where n.corpus = {corpus} group by n.row, first, n.d1, n.d2,
                n.normalized order by n.row""",
        )
        spooled = _Spool(spool / _spool_name(corpus))
        tables = (_document_table(batch, spooled) for batch in batches)
        yield from _tasks("corpus" if corpus else "added", tables, config.data.part_rows)


def _batches(database: duckdb.DuckDBPyConnection, query: str) -> Iterator[pa.RecordBatch]:
    """The result of a query, streamed; its own cursor, since other queries run in between."""
    cursor = database.cursor()
    reader: Any = cursor.sql(query).to_arrow_reader(BATCH)
    yield from reader


class _Spool:
    """Rows of a spool at ascending positions, one batch in memory."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self._file = pq.ParquetFile(path)
        self._batches = self._file.iter_batches(BATCH)
        self._start = 0
        self._rows: pa.RecordBatch | None = None

    def take(self, positions: npt.NDArray[np.int64]) -> pa.Table:
        import pyarrow as pa

        pieces: list[pa.RecordBatch] = []
        low = 0
        while low < len(positions):
            end = self._start + (self._rows.num_rows if self._rows is not None else 0)
            high = int(np.searchsorted(positions, end))
            if high > low and self._rows is not None:
                pieces.append(self._rows.take(pa.array(positions[low:high] - self._start)))
                low = high
            if low < len(positions):
                self._start = end
                self._rows = next(self._batches)
        return pa.Table.from_batches(pieces)


def _document_table(batch: pa.RecordBatch, spool: _Spool) -> pa.Table:
    import pyarrow as pa

    spooled = spool.take(batch["first"].to_numpy())
    all_ids = [list(dict.fromkeys(ids)) for ids in batch["ids"].to_pylist()]
    ids = [own[0] for own in all_ids]
    source_rows = batch["source_rows"].to_pylist()
    return pa.table(
        {
            "id": pa.array(ids, pa.large_string()),
            "text": spooled["text"],
            "id_hash": hashes(ids),
            "normalized": batch["normalized"],
            "other_ids": pa.array([own[1:] for own in all_ids], pa.list_(pa.large_string())),
            "source_rows": pa.array(source_rows, pa.list_(pa.int64())),
            **{name: spooled[name] for name in spooled.column_names[1:]},
            "cut": batch["d1"],
        }
    )


def _anchors(config: Config, database: duckdb.DuckDBPyConnection) -> Iterator[Task]:
    import pyarrow as pa
    import pyarrow.compute as pc

    batches = _batches(
        database,
        """
        select a.id, a.text, a.extra, a.normalized, p.rows as positives, p.grades, k.rows as known,
            k.by_id as known_by_id,
            coalesce(list_filter(s.rows, lambda row: not list_contains(k.rows, row)), []) as shared,
            coalesce(n.row, -1) as self_row, [a.source_row] as source_rows, a.d1 as cut
        from askers a join positives p on a.id = p.query join known k on a.id = k.query
        left join shared s on a.normalized = s.normalized
        left join numbered n on a.d1 = n.d1 and a.d2 = n.d2
        order by a.source_row""",
    )

    def tables() -> Iterator[pa.Table]:
        for batch in batches:
            table = pa.Table.from_batches([batch])
            extra = table["extra"]
            table = table.drop_columns("extra").add_column(2, "id_hash", [hashes(table["id"].to_pylist())])
            for at, name in enumerate(_extra(config.data.extra.queries)):
                table = table.append_column(name, pc.list_element(extra, at))
            yield table

    yield from _tasks("anchors", tables(), config.data.part_rows)


def cut_points(cuts: npt.NDArray[np.uint64], since: int, part_rows: int) -> Iterator[int]:
    """Where parts end, decided by content, so that an edit moves no border but its own.

    A part ends after a row whose digest says so (one in part_rows / 2), once it has at least
    part_rows / 2 rows, and at the latest at 2 * part_rows.

    Args:
        cuts: (n,) digests of the rows that follow.
        since: rows the open part already has.
        part_rows: the size aimed at.

    Yields:
        positions in `cuts` before which a part ends.
    """
    least, most = max(1, part_rows // 2), 2 * part_rows
    ends = np.flatnonzero(cuts % np.uint64(least) == 0) + 1
    start = -since
    while start + least <= len(cuts):
        later = ends[np.searchsorted(ends, start + least) :]
        end = min(int(later[0]) if len(later) else start + most, start + most)
        if end > len(cuts):
            return
        yield end
        start = end


def _tasks(kind: str, tables: Iterator[pa.Table], part_rows: int) -> Iterator[Task]:
    """Cut a stream of tables into parts."""
    import pyarrow as pa

    pending: list[pa.Table] = []
    for table in tables:
        start = 0
        for end in cut_points(table["cut"].to_numpy(), sum(part.num_rows for part in pending), part_rows):
            yield _task(kind, pa.concat_tables([*pending, table.slice(start, end - start)]).drop_columns("cut"))
            pending, start = [], end
        if start < table.num_rows:
            pending.append(table.slice(start))
    if pending:
        yield _task(kind, pa.concat_tables(pending).drop_columns("cut"))


def _task(kind: str, table: pa.Table) -> Task:
    from negpipe.tables import to_bytes

    content = to_bytes(table)
    meta: dict[str, Any]
    if kind == "counts":
        meta = table.to_pylist()[0]
    else:
        texts = table["text"].to_pylist()
        meta = {
            # What encode keys on: the texts in order, and for precomputed vectors where they stood.
            "texts": hashlib.sha256(digests(texts).tobytes()).hexdigest(),
            "source_rows": digest(table["id"].to_pylist(), table["source_rows"].to_pylist()),
            "characters": sum(map(len, texts)),
        }
    name = key("ingest", VERSION, kind, hashlib.sha256(content).hexdigest())
    return Task(name, kind, table.num_rows, {"content": content, "meta": meta})


def _run(task: Task, _: None, __: Context, publish: Publisher, progress: Progress) -> Made:
    content: bytes = task.payload["content"]
    publish(".arrow", lambda file: _write(file, content))
    progress(task.rows, "")
    return Made(task.rows, task.payload["meta"])


def _write(file: BinaryIO, content: bytes) -> None:
    file.write(content)


# --- facts --------------------------------------------------------------------------------------------


def _counts(config: Config, database: duckdb.DuckDBPyConnection) -> Task:
    """What was read, merged, left out: a part of its own, so that the counts are content like the rest."""
    import pyarrow as pa

    counts = {
        "documents_read": "select count(*) from documents",
        "source_documents": "select (select count(*) from documents where corpus)"
        " + (select count(*) from skipped where not of_query)",
        "source_queries": "select (select count(*) from queries) + (select count(*) from skipped where of_query)",
        "duplicate_texts": "select (select count(*) from documents) - (select count(*) from numbered)",
        "queries_read": "select count(*) from askers",
        "queries_without_positive": "select count(*) from askers where id not in (select query from positives)",
        "judgments_read": "select count(*) from judgments",
        # By exact anchor text, repeated rows counted, as sentence-transformers does.
        "max_positives": "select coalesce(max(n), 0) from (select count(*) as n from judgments j"
        " join askers a on j.query = a.id join ids d on j.document = d.id"
        f" where j.grade >= {config.data.min_grade} and j.split = {_quoted(config.data.split)} group by a.d1, a.d2)",
        "unknown_judgments": "select count(*) from unknown_judgments",
        "skipped_empty": "select count(*) from skipped",
        "positives": "select coalesce(sum(len(rows)), 0) from positives join askers on query = id",
    }
    table = pa.table({name: [_count(database, query)] for name, query in counts.items()})
    return _task("counts", table)


def _stats(context: Context, parts: list[Part]) -> dict[str, Any]:
    rows = {kind: sum(part.rows for part in parts if part.kind == kind) for kind in ("corpus", "added", "anchors")}
    counts = next(part.meta for part in parts if part.kind == "counts")
    return {
        "rows": rows["corpus"] + rows["added"],
        "added_positives": rows["added"],
        "anchors": rows["anchors"],
    } | counts


STAGE = Stage(
    name="ingest",
    version=VERSION,
    inputs=(),
    settings=_settings,
    sources=_sources,
    plan=_plan,
    run=_run,
    stats=_stats,
    here=True,
)
