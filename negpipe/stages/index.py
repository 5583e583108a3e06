"""index: vectors → something to search, and the map from row to ids.

`flat` is one IndexFlatIP file whose position is the row; `stream` needs no file, search walks the
embedding parts. Both have the id map: Parquet parts of row, id, and every id of the row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from negpipe import ann
from negpipe.config import Config
from negpipe.fingerprint import key
from negpipe.manifest import Part
from negpipe.stage import Context, Made, Progress, Publisher, Stage, Task
from negpipe.tables import documents, open_table

VERSION = 1


def _settings(config: Config) -> dict[str, Any]:
    return {"index.kind": config.index.kind}


def _plan(context: Context) -> Iterator[Task]:
    first = 0
    for part in documents(context.manifest("ingest")):
        name = key("index", VERSION, "ids", first, part.identity())
        yield Task(name, "ids", part.rows, {"part": part.path, "first": first})
        first += part.rows
    if context.config.index.kind == "flat":
        parts = documents(context.manifest("encode"))
        name = key("index", VERSION, "flat", [part.identity() for part in parts])
        yield Task(name, "flat", first, {"parts": [part.path for part in parts]})


def _run(task: Task, _: None, context: Context, publish: Publisher, progress: Progress) -> Made:
    if task.kind == "ids":
        publish(".parquet", lambda file: _write_ids(file, context, task))
        return Made(task.rows)
    vectors = ann.open_parts([context.run_dir / path for path in task.payload["parts"]])
    publish(".faiss", lambda file: ann.write_flat(file, vectors), needed=4 * vectors.rows * vectors.dimension)
    return Made(task.rows, {"dimension": vectors.dimension})


def _write_ids(file: BinaryIO, context: Context, task: Task) -> None:
    table = open_table(context.run_dir / task.payload["part"])
    rows = np.arange(task.payload["first"], task.payload["first"] + table.num_rows)
    ids, others = (pa.concat_arrays(table[name].chunks) for name in ("id", "other_ids"))
    # Every row's own id comes before its others: position i of `places` says where the i-th id of all stands now.
    offsets = others.offsets.to_numpy() - others.offsets[0].as_py() + np.arange(table.num_rows + 1)
    places = np.zeros(offsets[-1], np.int64)
    places[offsets[:-1]] = 1
    own = np.cumsum(places) - 1
    places = np.where(places == 1, own, table.num_rows + np.arange(len(places)) - own - 1)
    every = pa.concat_arrays([ids, others.flatten()]).take(pa.array(places))
    lists = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), every.cast(pa.string()))
    pq.write_table(pa.table({"row": rows, "id": ids, "ids": lists}), file, compression="zstd")


def _stats(context: Context, parts: list[Part]) -> dict[str, Any]:
    rows = sum(part.rows for part in parts if part.kind == "ids")
    return {
        "rows": rows,
        "kind": context.config.index.kind,
        "bytes": sum(f.bytes for part in parts for f in part.files),
    }


STAGE = Stage(
    name="index",
    version=VERSION,
    inputs=("ingest", "encode"),
    settings=_settings,
    plan=_plan,
    run=_run,
    stats=_stats,
    light=lambda config: config.index.kind == "stream",
)
