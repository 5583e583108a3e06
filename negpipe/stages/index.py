"""index: vectors → a searchable index, and the map from row to ids.

`stream` needs no file: search reads the embedding parts; `flat` is a single IndexFlatIP file whose positions are the
rows; a FAISS factory string is trained once, filled shard by shard, and tuned on sampled anchors until it finds what
`index.min_recall` asks for. All have the id map: Parquet parts of row, id, and every id of the row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from negpipe import ann
from negpipe.ann import approximate
from negpipe.ann.probe import SearchJob
from negpipe.config.schema import Config
from negpipe.data.tables import documents, open_table, searchable
from negpipe.engine import devices
from negpipe.engine.fingerprint import key
from negpipe.engine.manifest import Part
from negpipe.engine.stage import Context, Made, Needs, Progress, Publisher, Stage, Task, counted
from negpipe.stages import headers
from negpipe.store.store import Store

VERSION = 3


def _settings(config: Config) -> dict[str, Any]:
    if not config.index.approximate:
        return {"index.kind": config.index.kind}
    values = config.index.model_dump(mode="json", exclude={"trained"})
    return {f"index.{name}": value for name, value in values.items()} | {
        "search.depth": config.depth,
        "data.add_positives": config.data.add_positives,
        "seed": config.seed,
    }


def _sources(context: Context) -> dict[str, str]:
    return context.digest_of("index.trained", context.config.index.trained)


def _check(context: Context) -> None:
    """Check before hours are spent: FAISS accepts the kind, and its parts fit disk and memory."""
    given, kind = _sources(context), context.config.index.kind
    if "encode" not in context.manifests:
        if context.config.index.approximate and kind != "auto":
            usual = ann.factory.fitting_dimension(kind)
            if "ingest" in context.manifests and not given:
                rows = sum(part.rows for part in documents(context.manifest("ingest")))
                ann.factory.rows_wanted(kind, usual, rows)
        return
    encode = context.manifest("encode")
    rows = sum(part.rows for part in documents(encode))
    dimension = encode.stats["dimension"]
    size, held = 0, 0
    filled = groups(documents(encode), dimension, context.config.index.shard_size)
    if context.config.index.approximate:
        size, held = ann.factory.bytes_of(kind, dimension, rows, len(filled))
    elif kind == "flat":
        size = rows * dimension * 4
    books = context.own
    made = (books.part(task.key) for task in _plan(context) if task.kind in ("shard", "flat"))
    there = sum(file.bytes for part in made if part for file in part.files)
    remedy = "set index.kind: stream, which needs no file"
    context.store.check_room({"index": size - there}, f"index.kind {kind} writes", remedy)
    if context.config.index.approximate:
        anchors = sum(part.rows for part in encode.of_kind("anchors"))
        job = SearchJob(rows, dimension, anchors, min(context.config.depth, rows))
        largest = max(sum(part.rows for part in group) for group in filled)
        part = max((part.rows for part in encode.of_kind("anchors")), default=0)
        approximate.check_memory(context.config, job, largest, part, held, context.budget)


def _plan(context: Context) -> Iterator[Task]:
    first = 0
    for part in documents(context.manifest("ingest")):
        name = key("index", VERSION, "ids", first, part.identity())
        yield Task(name, "ids", part.rows, {"part": part.file("table").path, "first": first})
        first += part.rows
    if context.config.index.kind == "flat":
        parts = documents(context.manifest("encode"))
        name = key("index", VERSION, "flat", [part.identity() for part in parts])
        yield Task(name, "flat", first, {"parts": [part.file("vectors").path for part in parts]})
    elif context.config.index.approximate:
        yield from _approximate(context)


def _approximate(context: Context) -> Iterator[Task]:
    """Train, then build shards, then tune: each is planned once its inputs exist."""
    config, encode = context.config, context.manifest("encode")
    books = context.own
    parts = documents(encode)
    paths, rows = [part.file("vectors").path for part in parts], sum(part.rows for part in parts)
    given = _sources(context).get("index.trained")
    basis = given or [config.seed, [part.identity() for part in parts]]
    train = Task(key("index", VERSION, "trained", config.index.kind, basis), "trained", rows, {"parts": paths})
    yield train
    trained = books.part(train.key)
    if trained is None:
        return
    shards: list[Part | None] = []
    first = 0
    for group in groups(parts, encode.stats["dimension"], config.index.shard_size):
        count = sum(part.rows for part in group)
        name = key("index", VERSION, "shard by role", trained.file("index").digest, [part.identity() for part in group])
        payload = {"trained": trained.file("index").path, "parts": [part.file("vectors").path for part in group]}
        yield Task(name, "shard", count, payload)
        shards.append(books.part(name))
        first += count
    made = [shard for shard in shards if shard]
    if len(made) < len(shards):
        return
    anchors = encode.of_kind("anchors")
    name = key(
        "index",
        VERSION,
        "tuned by role",
        _settings(config),
        [part.identity() for part in (*made, *anchors)],
        [part.identity() for part in parts],
    )
    shown = {
        "parts": paths,
        "anchors": [part.file("vectors").path for part in anchors],
        "shards": places(made),
        "candidates": sum(part.rows for part in searchable(encode, config)),
    }
    yield Task(name, "tuned", min(config.index.recall_anchors, sum(part.rows for part in anchors)), shown)


def groups(parts: list[Part], dimension: int, size: int) -> list[list[Part]]:
    """Consecutive parts of one kind, up to a shard's size; an append changes the last group alone."""
    found: list[list[Part]] = []
    for part in parts:
        rows = sum(one.rows for one in found[-1]) + part.rows if found else 0
        if not found or found[-1][0].kind != part.kind or rows * dimension * 4 > size:
            found.append([])
        found[-1].append(part)
    return found


def places(shards: Sequence[Part]) -> list[dict[str, Any]]:
    """What is needed to open a shard: its files and its first row."""
    first, opening = 0, []
    for shard in shards:
        opening.append({"index": shard.file("index").path, "sample": shard.file("sample").path, "first": first})
        first += shard.rows
    return opening


def open_approximate(context: Context) -> approximate.Approximate:
    """The tuned approximate index of a complete stage."""
    vectors = ann.open_parts([context.path(part, "vectors") for part in documents(context.manifest("encode"))])
    return opened_index(context, places(context.manifest("index").of_kind("shard")), vectors)


def opened_index(
    context: Context, shards: Sequence[Mapping[str, Any]], vectors: ann.Vectors
) -> approximate.Approximate:
    """The same for some shards and the vectors that they hold."""
    return approximate.open_index(context.config.index.kind, _shards(context, shards), vectors).tuned(effort(context))


def effort(context: Context) -> approximate.Effort:
    """The effort to which the index of a complete stage was tuned."""
    return approximate.read_tuning(context.path(context.manifest("index").of_kind("tuned")[0], "tuning")).effort


def _shards(context: Context, opening: Sequence[Mapping[str, Any]]) -> list[approximate.IndexShard]:
    path = context.store.path
    return [approximate.IndexShard(path(each["index"]), path(each["sample"]), each["first"]) for each in opening]


def recall_window(context: Context) -> dict[str, float] | None:
    """Recall of an approximate index in the configured window; None if search is exact.

    Raises:
        RecallError: see `approximate.window`.
    """
    tuned = context.manifest("index").of_kind("tuned")
    if not tuned:
        return None
    return approximate.window(ann.Recall.read(context.path(tuned[0], "recall")), context.config)


def _run(task: Task, _: None, context: Context, publish: Publisher, progress: Progress) -> Made:
    if task.kind == "ids":
        publish("ids", ".parquet", lambda file: _write_ids(file, context, task))
        return Made(task.rows)
    vectors = ann.open_parts([context.store.path(name) for name in task.payload["parts"]])
    if task.kind == "flat":
        publish(
            "index", ".faiss", lambda file: ann.write_flat(file, vectors), needed=vectors.rows * vectors.dimension * 4
        )
        return Made(task.rows, {"dimension": vectors.dimension})
    config = context.config
    if task.kind == "trained":
        index = approximate.train(config, vectors, threads=context.budget.threads)
        publish("index", ".faiss", lambda file: ann.factory.write(index, file))
        return Made(task.rows, {"dimension": vectors.dimension})
    if task.kind == "shard":
        index = ann.factory.read(context.store.path(task.payload["trained"]), vectors.dimension, to_fill=True)
        planned = sum(part.rows for part in documents(context.manifest("encode")))
        ann.factory.fill(index, vectors, threads=context.budget.threads, progress=progress, planned=planned)
        publish("index", ".faiss", lambda file: ann.factory.write(index, file))
        sample = approximate.sample_of(vectors, config.seed)
        publish("sample", ".npy", partial(ann.write_part, sample))
        return Made(task.rows)
    opened = approximate.open_index(config.index.kind, _shards(context, task.payload["shards"]), vectors)
    anchors = ann.open_parts([context.store.path(name) for name in task.payload["anchors"]])
    budget = context.budget.without(opened.held)
    tuning, measured = approximate.tune(opened, anchors, config, candidates=task.payload["candidates"], budget=budget)
    approximate.window(measured, config)
    publish("tuning", ".json", tuning.write)
    publish("recall", ".npy", measured.write)
    return Made(task.rows, tuning.summary)


def _write_ids(file: BinaryIO, context: Context, task: Task) -> None:
    table = open_table(context.store.path(task.payload["part"]))
    rows = np.arange(task.payload["first"], task.payload["first"] + table.num_rows)
    ids, others = (pa.concat_arrays(table[name].chunks) for name in ("id", "other_ids"))
    # Every row's main id comes before its others: `places[i]` is the current position of the i-th id.
    offsets = others.offsets.to_numpy() - others.offsets[0].as_py() + np.arange(table.num_rows + 1)
    places = np.zeros(offsets[-1], np.int64)
    places[offsets[:-1]] = 1
    own = np.cumsum(places) - 1
    places = np.where(places == 1, own, table.num_rows + np.arange(len(places)) - own - 1)
    every = pa.concat_arrays([ids, others.flatten()]).take(pa.array(places))
    lists = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), every.cast(pa.string()))
    pq.write_table(pa.table({"row": rows, "id": ids, "ids": lists}), file, compression="zstd")


def _stats(context: Context, parts: list[Part]) -> dict[str, Any]:
    stats = {
        "rows": sum(part.rows for part in parts if part.kind == "ids"),
        "kind": context.config.index.kind,
        "bytes": sum(f.bytes for part in parts for f in part.files),
    }
    return stats | {name: value for part in parts if part.kind == "tuned" for name, value in part.meta.items()}


def _misfit(store: Store, part: Part) -> str | None:
    """Files of an approximate index are checked when it is opened."""
    return headers.misfit(store, part) if part.kind in ("ids", "flat") else None


STAGE = Stage(
    name="index",
    version=VERSION,
    inputs=("ingest", "encode"),
    settings=_settings,
    sources=_sources,
    check=_check,
    needs=lambda _, work: work.building if work.missing != [] else Needs(),
    plan=_plan,
    run=_run,
    remarks=approximate.remarks,
    misfit=_misfit,
    libraries=lambda _: ("faiss-cpu", "numpy", "pyarrow"),
    stats=_stats,
    devices=devices.of_search,
    place=lambda config: "light" if config.index.kind == "stream" else "worker",
    rounds=True,
    unit="entries",
    counts=partial(counted, rows="documents"),
)
