"""ingest: any source → corpus and anchor tables, in one pass over the source.

Guarantees: identical texts share one row; rows are numbered corpus first (in source order), then the
positives missing from the corpus; every problem of the input is found before anything is encoded. Texts
go through a spool on disk, and joins through DuckDB, which spills to disk: memory holds one part, whatever
the size of the corpus.

Parts are Arrow IPC files of four kinds. `corpus` and `added` (positives from elsewhere): id, text, hashes of id and
normalised text, the other ids of the row, its rows in the source. `anchors`: id, text, hashes, rows and grades of its
positives, rows of all its known positives, rows and grades of refused documents: judged below `data.min_grade` in any
split, or given as a negative (grade null), the row that equals its own text and the row that has its own id (-1:
none), its row in the source. `namesakes`: hash of a normalised text that several queries share, and rows of all their
known positives, one pair per row, ascending; an anchor finds its own by its hash, so its part does not depend on
other queries with the same text. Columns kept by `data.extra` are in the first three as `extra:NAME`, with the values
of the first row that has the text or id.
Rejected rows are listed in `rejected.jsonl`. With `train.split` the anchors are those of its training side,
and `split/` lists the judgments of both.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import shutil
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from negpipe import __version__, encoders, sources
from negpipe.config.schema import Config
from negpipe.config.training import Split
from negpipe.data import database
from negpipe.data.arrays import Hashes
from negpipe.data.tables import Rows, texts, to_bytes
from negpipe.data.texts import hashes
from negpipe.encoders import cuts
from negpipe.engine import versions
from negpipe.engine.fingerprint import digest, key
from negpipe.engine.manifest import Manifest, Part
from negpipe.engine.stage import Context, Made, Needs, Progress, Publisher, Shown, Stage, Task
from negpipe.errors import ConfigError, DamagedError, count_of
from negpipe.ingest import joins, rejected, split
from negpipe.ingest.spool import Spool, SpooledTexts, ahead, extra_columns, load, read
from negpipe.sources.places import locate, paths_of
from negpipe.stages import headers
from negpipe.store import unfinished
from negpipe.store.files import BOOKS, explained, file_digest, write_all
from negpipe.store.store import Store

if TYPE_CHECKING:
    import duckdb

logger = logging.getLogger(__name__)

VERSION = 5
_PARTS = 3  # their keys cover their content: identical parts of other versions are kept
_SAMPLE, _BYTES = 1000, 4_000_000  # sampled texts, and their total bytes, whose tokens are counted: about a second
_MANY = 0.1  # share of unread tokens that causes a warning
_COPIES = 5  # copies of a part in memory: its rows, joined, as written, and those of the two parts before


def _settings(config: Config) -> dict[str, Any]:
    data = config.data
    if data.format != "auto" or (data.path and locate(paths_of(data.path)[0]) in ("file", "folder")):
        data = sources.recognized(data)
    # The data's location is a circumstance; its content is in the sources' digests.
    tables = {name: {"path"} for name in ("corpus", "queries", "qrels") if getattr(data, name)}
    kept = data.model_dump(mode="json", exclude={"path": True, "revision": True, "streaming": True, **tables})
    # Whether given negatives are distinguished from other documents; triplets decides how to use them.
    given = {} if config.mining.given_negatives == "ignore" else {"mining.given_negatives": "kept"}
    asked = _split(config)
    divided = {"train.split": asked.model_dump(mode="json")} if asked else {}
    return {f"data.{name}": value for name, value in kept.items()} | given | divided


def _split(config: Config) -> Split | None:
    return config.train.split if config.train else None


def _sources(context: Context) -> dict[str, str]:
    data = sources.recognized(context.config.data)
    # Per table: which file has which role, and their order, is part of the input.
    local = [[[Path(name).name, context.digest_file(Path(name))] for name in files] for files in sources.files(data)]
    return {"data.path": digest(local, sources.revision(data))}


def _check(context: Context) -> None:
    if _split(context.config) and importlib.util.find_spec("scipy") is None:
        raise ConfigError("train.split: scipy is not installed: run `pip install 'negpipe[train]'`")


def plan(context: Context, side: split.Side = "train") -> Iterator[Task]:
    """Read the source, then make each part while the previous one is written.

    Args:
        context: the context of the run.
        side: the side of `train.split`, if set, whose anchors are wanted.
    """
    with closing(_parts(context, side)) as parts:
        yield next(parts)  # long work can be interrupted in this thread
        yield from ahead(parts)
    # This process outlives the stage, and Arrow would keep unused memory.
    pa.default_memory_pool().release_unused()


def _parts(context: Context, side: split.Side) -> Generator[Task]:
    config, folder = context.config, context.store.scratch / BOOKS / "ingest"
    folder.mkdir(parents=True, exist_ok=True)
    begun = context.own.begun(_spool_key(context))
    spool = Spool(begun)
    with (
        explained(folder),
        # Files that cannot be deleted yet (on NFS, while being read) are deleted when the next run starts.
        tempfile.TemporaryDirectory(
            prefix=f"spool-{unfinished.owner()}-", dir=folder, ignore_cleanup_errors=True
        ) as scratch,
        database.opened(Path(scratch), context.budget.share(0.5), "reading this source") as connection,
    ):
        read(config, spool, context.budget.threads)
        load(spool, connection)
        joins.check(config, connection)
        joins.join(config, connection)
        if _split(config):
            split.divide(config, side, connection, spool, context.budget.share(0.5))
        joins.number(connection)
        for kind in ("corpus", "added"):
            texts = spool.texts(kind, config.data.extra.corpus)
            of_kind = joins.documents(connection, corpus=kind == "corpus")
            tables = (table for rows in of_kind for table in _documents(rows, texts))
            yield from _tasks(kind, tables, context)
        extra = extra_columns(config.data.extra.queries)
        anchors = (_anchors(rows, extra) for rows in joins.anchors(connection, config.data.part_rows))
        yield from _tasks("anchors", anchors, context)
        yield from _tasks("namesakes", joins.namesakes(connection), context)
        # Its files are published after the database is closed.
        yield _facts(context, side, connection, begun)


def _spool_key(context: Context) -> str:
    """Reading resumes if the same files are cut and read in the same way."""
    read = [context.config.data.model_dump(mode="json"), context.config.mining.given_negatives != "ignore"]
    return key(context.key, read, versions.installed(("pyarrow", "datasets")), __version__)


def _facts(context: Context, side: split.Side, connection: duckdb.DuckDBPyConnection, folder: Path) -> Task:
    """The task of the counts, a separate part so that they are content like the rest, and of the lists for
    users."""
    config, listed = context.config, dict[str, Path]()
    counts: dict[str, float] = {**joins.counts(config, connection)}
    if asked := _split(config):
        counts |= split.counts(asked, connection)
        if side == "train":
            listed |= {f"split-{name}": path for name, path in split.write(config, connection, folder).items()}
    task = _task("counts", pa.table({name: [n] for name, n in counts.items()}))
    if count := rejected.write(connection, folder / rejected.NAME):
        listed["rejected"] = folder / rejected.NAME
        logger.warning("%s rejected: %s", count_of(count, "source row"), context.run.place(rejected.NAME))
    if not listed:
        return task
    return replace(
        task, key=key(task.key, *map(file_digest, listed.values())), payload={**task.payload, "listed": listed}
    )


def _documents(rows: pa.Table, texts: SpooledTexts) -> Iterator[pa.Table]:
    """Rows of the table of a corpus part, with the columns that decide where it is cut."""
    for here, spooled in texts.take(rows["first"].to_numpy()):
        own = rows.slice(here.start, here.stop - here.start)
        every = own["ids"].combine_chunks()
        starts = every.offsets.to_numpy() - every.offsets[0].as_py()
        first = np.zeros(starts[-1], np.bool_)
        first[starts[:-1]] = True
        names = every.flatten().cast(pa.large_string())
        ids, others = names.filter(pa.array(first)), names.filter(pa.array(~first))
        yield pa.table(
            {
                "id": ids,
                "text": spooled["text"],
                "id_hash": hashes(ids),
                "normalized": own["normalized"],
                "other_ids": pa.ListArray.from_arrays(pa.array(starts - np.arange(len(starts)), pa.int32()), others),
                "source_rows": own["source_rows"],
                **{name: spooled[name] for name in spooled.column_names[1:]},
                "cut": own["cut"],
                "d2": own["d2"],
            }
        )


def _anchors(rows: pa.Table, extra: list[str]) -> pa.Table:
    """The table of a part of anchors, with the columns that decide where it is cut."""
    values = rows["extra"]
    table = rows.drop_columns("extra").add_column(2, "id_hash", [hashes(rows["id"].to_pylist())])
    for at, name in enumerate(extra):
        table = table.append_column(name, pc.list_element(values, at))
    return table


def cut_points(cuts: Hashes, since: int, part_rows: int) -> Iterator[int]:
    """Where parts end, decided by content, so that an edit only moves its own border.

    A part ends after a row whose digest says so (one in part_rows / 2), once it has at least
    part_rows / 2 rows, and at the latest at 2 * part_rows.

    Args:
        cuts: (n,) digests of the rows that follow.
        since: rows that the open part already has.
        part_rows: the target size.

    Yields:
        positions in `cuts` before which parts end.
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


def _tasks(kind: str, tables: Iterator[pa.Table], context: Context) -> Iterator[Task]:
    """Cut a stream of tables into parts.

    Raises:
        ConfigError: a part does not fit into memory.
    """
    pending: list[pa.Table] = []
    beside, size = context.budget.share(0.5), context.config.data.part_rows
    for table in tables:
        start = 0
        for end in cut_points(table["cut"].to_numpy(), sum(part.num_rows for part in pending), size):
            yield _task(kind, pa.concat_tables([*pending, table.slice(start, end - start)]))
            pending, start = [], end
        if start < table.num_rows:
            pending.append(table.slice(start))
        rows = sum(part.num_rows for part in pending)
        beside.require(
            _COPIES * sum(part.nbytes for part in pending),
            f"a part of {kind}, {rows:,} rows so far, next to the database",
            "lower data.part_rows",
        )
    if pending:
        yield _task(kind, pa.concat_tables(pending))


def _task(kind: str, table: pa.Table) -> Task:
    meta: dict[str, Any] = {}
    if kind == "counts":
        meta = table.to_pylist()[0]
    elif kind != "namesakes":
        digests = np.stack([table[name].to_numpy() for name in ("cut", "d2")], axis=1)
        meta = {
            # Used in encode's keys: the texts in order and, for precomputed vectors, their source rows.
            "texts": hashlib.sha256(digests.astype("<u8").tobytes()).hexdigest(),
            "source_rows": _source_rows(table["id"], table["source_rows"]),
            "characters": pc.sum(pc.utf8_length(table["text"])).as_py(),
        }
    content = to_bytes(table.drop_columns([name for name in ("cut", "d2") if name in table.column_names]))
    name = key("ingest", _PARTS, kind, hashlib.sha256(content).hexdigest())
    return Task(name, kind, table.num_rows, {"content": content, "meta": meta})


def _source_rows(ids: pa.ChunkedArray, rows: pa.ChunkedArray) -> str:
    """`digest` of the ids and of the lists of rows, without creating Python lists."""
    lists = [pc.binary_join(chunk.cast(pa.list_(pa.string())), ",") for chunk in rows.chunks]
    names = json.dumps(ids.to_numpy(zero_copy_only=False).tolist(), separators=(",", ":"))
    numbers = f"[{_joined(pa.concat_arrays(lists), '],[')}]" if len(rows) else ""
    return hashlib.sha256(f"[{names},[{numbers}]]".encode()).hexdigest()


def _joined(texts: pa.Array, between: str) -> str:
    whole = pa.ListArray.from_arrays(pa.array([0, len(texts)], pa.int32()), texts)
    joined: str = pc.binary_join(whole, between)[0].as_py()
    return joined


def _run(task: Task, _: None, __: Context, publish: Publisher, progress: Progress) -> Made:
    content: pa.Buffer = task.payload["content"]
    publish("table", ".arrow", lambda file: write_all(file, memoryview(content)), needed=content.size)
    for role, path in task.payload.get("listed", {}).items():
        # Stored with the counts but not parts themselves: they hold source rows, or the judgments of the other
        # side's anchors, which no other stage depends on.
        with path.open("rb") as source:
            publish(role, path.suffix, partial(shutil.copyfileobj, source), aside=True)
    progress(task.rows, "")
    return Made(task.rows, task.payload["meta"])


# --- facts --------------------------------------------------------------------------------------------


def _stats(context: Context, parts: list[Part]) -> dict[str, Any]:
    rows = {kind: sum(part.rows for part in parts if part.kind == kind) for kind in ("corpus", "added", "anchors")}
    counts = next(part.meta for part in parts if part.kind == "counts")
    return {
        "rows": rows["corpus"] + rows["added"],
        "added_positives": rows["added"],
        "anchors": rows["anchors"],
    } | counts


def _counts(stats: Mapping[str, Any]) -> dict[str, int]:
    """What there is, and what was left out of it."""
    shown = {"documents": stats["rows"], "anchors": stats["anchors"], "positives": stats["positives"]}
    left_out = {
        "duplicate documents merged": stats["duplicate_texts"],
        "queries without a positive in data.split": stats["queries_without_positive"],
        "source rows rejected": stats["rejected_rows"],
    }
    return shown | {name: count for name, count in left_out.items() if count}


def _settle(config: Config, manifest: Manifest) -> tuple[Config, str]:
    most = manifest.stats.get("max_positives")
    if not isinstance(most, int):
        raise DamagedError(
            "the manifest of ingest is damaged, it lacks max_positives: run `negpipe mine CONFIG --repair`"
        )
    return config.resolved(most), ""


def _outlook(context: Context) -> Iterator[tuple[int, str]]:
    """How much of the texts the model will not read, from a sample, if the model is on this disk."""
    try:
        yield from _cuts(context)
    except Exception as error:  # ingest is done; encode reports problems with the model before it starts
        logger.info("ingest: cannot tell how much of the texts the model reads: %s", error)


def _cuts(context: Context) -> Iterator[tuple[int, str]]:
    encoder = context.config.encoder
    folder = encoders.folder_here(encoder) if encoder.runs_here else None
    if folder is None:
        return
    kinds: tuple[encoders.Kind, ...] = ("passage", "query")
    for kind in kinds:
        parts = [part for part in texts(context.manifest("ingest")) if (part.kind == "anchors") is (kind == "query")]
        rows = Rows([context.path(part, "table") for part in parts])
        at = np.unique(np.linspace(0, len(rows) - 1, min(_SAMPLE, len(rows))).astype(np.int64))
        # If these are too many, still take some from all over the corpus; the last text may be a book.
        at = np.random.default_rng(0).permutation(at)
        sizes = rows.sizes("text", at)
        at = at[np.cumsum(sizes) - sizes < _BYTES]
        sample = [text[:_BYTES] for text in rows.strings("text", at).to_pylist()]
        seen = cuts.expected(encoder, folder, kind, sample) if sample else None
        if seen and seen.cut:
            lost, setting = seen.lost / seen.tokens, f"{kind}_max_length"
            limit = getattr(encoder, setting)
            side = "anchors" if kind == "query" else "documents"
            yield (
                logging.WARNING if lost >= _MANY else logging.INFO,
                f"{cuts.percent(seen.cut / seen.texts)} of {seen.texts:,} {side} have more than {limit} tokens"
                f" (encoder.{setting}): {cuts.percent(lost)} of all their tokens will not be read",
            )


def _views(parts: Sequence[Part]) -> dict[str, Shown]:
    listed = [file for part in parts for file in part.all("rejected")]
    sides = {f"{file.role.removeprefix('split-')}.parquet": file for part in parts for file in part.all("split")}
    return {rejected.NAME: listed[0] if listed else None, split.NAME: sides or None}


def _misfit(store: Store, part: Part) -> str | None:
    return None if part.kind == "counts" else headers.misfit(store, part)


STAGE = Stage(
    name="ingest",
    version=VERSION,
    inputs=(),
    settings=_settings,
    sources=_sources,
    check=_check,
    needs=lambda *_: Needs(note="reads the source; the other stages can be planned after it"),
    plan=plan,
    run=_run,
    settle=_settle,
    remarks=split.remarks,
    outlook=_outlook,
    misfit=_misfit,
    views=_views,
    libraries=lambda _: ("duckdb", "pyarrow"),
    stats=_stats,
    resources=lambda context: context.whole,
    place=lambda _: "caller",
    unit="texts",
    counts=_counts,
)
