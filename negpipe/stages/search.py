"""search: anchor vectors → the nearest documents of each anchor, deep and unfiltered.

One task is one part of anchors. All stored scores come from one per-pair function, and candidates are ordered by
(-score, row): the bytes do not depend on threads, memory or the kind of exact index. The score of each positive is
exact and stored with the candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from negpipe import ann
from negpipe.ann import approximate
from negpipe.ann.approximate import Approximate
from negpipe.data import candidates
from negpipe.data.candidates import Candidates, Rows
from negpipe.data.tables import documents, open_table, ragged, searchable
from negpipe.engine import devices
from negpipe.engine.fingerprint import Beginning
from negpipe.engine.manifest import Part
from negpipe.engine.stage import Context, Made, Needs, Progress, Publisher, Stage, Task, Workload
from negpipe.stages import headers, slices
from negpipe.stages.index import open_approximate

VERSION = 2


def _check(context: Context) -> None:
    """Check that the largest part fits into memory (for an approximate index, index has), and results onto the disk."""
    if "encode" not in context.manifests:
        return
    encode = context.manifest("encode")
    rows = sum(part.rows for part in documents(encode))
    if "index" in context.manifests:  # else it is unknown which candidates exist
        books = context.own
        left = sum(task.rows for task in _plan(context) if books.part(task.key) is None)
        needed = candidates.BYTES * left * min(context.config.depth, rows)
        context.store.check_room({"search": needed}, "search writes about", "lower search.depth")
    if context.config.index.approximate:
        return
    if context.config.search.slice_documents:
        return
    largest = max((part.rows for part in encode.of_kind("anchors")), default=0)
    depth = min(context.config.depth, rows)
    ann.exact.layout(largest, rows, encode.stats["dimension"], depth, context.budget)


def _needs(context: Context, work: Workload) -> Needs:
    disk = work.anchors * min(context.config.depth, work.documents) * candidates.BYTES
    if context.config.search.slice_documents:
        return Needs(disk=disk, note="merges the results of the slices")
    return slices.left_of_search(work, int(work.share * disk))


def _keyed(context: Context) -> Iterator[tuple[str, Part, Part]]:
    """For each part of anchors: the key of its candidates, its texts and its vectors."""
    ingest, encode, index = (context.manifest(name) for name in ("ingest", "encode", "index"))
    of_all = Beginning(
        "search",
        VERSION,
        slices.settings(context.config),
        index.settings,
        [part.identity() for part in index.parts if part.kind in ("shard", "tuned")],
        [part.identity() for part in documents(encode)],
    )
    for texts, anchors in zip(ingest.of_kind("anchors"), encode.of_kind("anchors"), strict=True):
        yield of_all.key(anchors.identity(), texts.identity()), texts, anchors


def _plan(context: Context) -> Iterator[Task]:
    rows = sum(part.rows for part in searchable(context.manifest("encode"), context.config))
    found = slices.found(context) if _is_sliced(context) else None
    for name, texts, anchors in _keyed(context):
        payload = {
            "texts": texts.file("table").path,
            "anchors": anchors.file("vectors").path,
            "depth": min(context.config.depth, rows),
            "candidates": rows,
            "slices": found(texts, anchors) if found else [],
        }
        yield Task(name, "candidates", anchors.rows, payload)


def _is_sliced(context: Context) -> bool:
    return context.config.search.slice_documents is not None and "slices" in context.manifests


def _plan_slices(context: Context) -> Iterator[Task]:
    """Anchors with existing candidates need no slices."""
    keyed = [*_keyed(context)]
    there = context.books("search").found([name for name, _, _ in keyed])
    yield from slices.tasks(context, [(texts, own) for name, texts, own in keyed if name not in there])


def _shared(context: Context) -> list[Part]:
    if _is_sliced(context):
        return []
    index, vectors = context.manifest("index"), documents(context.manifest("encode"))
    return index.of_kind("flat") or [*vectors, *index.of_kind("shard"), *index.of_kind("tuned")]


@dataclass(frozen=True)
class _OpenCorpus:
    """The corpus that is searched: its vectors and, if search is approximate, their index."""

    vectors: ann.Vectors
    index: Approximate | None


@contextmanager
def _open(context: Context) -> Iterator[_OpenCorpus | None]:
    yield None if _is_sliced(context) else _whole(context)


def _whole(context: Context) -> _OpenCorpus:
    parts = [context.path(part, "vectors") for part in documents(context.manifest("encode"))]
    flat = context.manifest("index").of_kind("flat")
    index = open_approximate(context) if context.config.index.approximate else None
    return _OpenCorpus(ann.open_flat(context.path(flat[0], "index")) if flat else ann.open_parts(parts), index)


def _run(task: Task, opened: _OpenCorpus | None, context: Context, publish: Publisher, progress: Progress) -> Made:
    texts = open_table(context.store.path(task.payload["texts"]))
    positives, offsets = ragged(texts["positives"])
    depth = task.payload["depth"]
    if task.payload["slices"]:
        found = slices.merged(context, task.payload["slices"], depth)
    else:  # also for lost candidates that were made without slices: no slices were planned for them
        found = _found(task, opened or _whole(context), positives, offsets, context, publish, progress)
    made = Candidates(found.rows, found.scores, positives, offsets, found.positive_scores, np.arange(len(found.rows)))
    kind = context.config.index.kind if context.config.index.approximate else None
    publish("candidates", ".parquet", lambda file: candidates.write(file, texts["id"], made, approximate=kind))
    publish.drop_checkpoints()
    return Made(len(found.rows), {"depth": depth} | ({"approximate": kind} if kind else {}))


def _found(
    task: Task,
    opened: _OpenCorpus,
    positives: Rows,
    offsets: Rows,
    context: Context,
    publish: Publisher,
    progress: Progress,
) -> ann.Found:
    """The result of a search of the entire corpus."""
    anchors = ann.open_parts([context.store.path(task.payload["anchors"])]).all()
    pairs = np.repeat(np.arange(len(anchors)), np.diff(offsets)), positives
    depth, last = task.payload["depth"], task.payload["candidates"]
    searched = reported = 0

    def on_block(rows: int) -> None:
        # The progress bar counts anchors; each block of the corpus advances all of them by its share.
        nonlocal searched, reported
        searched += rows
        due = len(anchors) * searched // opened.vectors.rows
        progress(due - reported, "")
        reported = due

    checkpoint = ann.Checkpoint(publish.checkpoint())
    budget = context.budget.without(opened.index.held if opened.index else 0)
    about: dict[str, Any] = {"budget": budget, "progress": on_block}
    if opened.index is None:
        return ann.search_exact(
            anchors, opened.vectors, depth, candidates=last, positives=pairs, checkpoint=checkpoint, **about
        )
    rows, scores = opened.index.before(last).search(anchors, depth, **about)
    return ann.Found(rows, scores, ann.score_pairs(anchors, opened.vectors, pairs))


def _stats(context: Context, parts: list[Part]) -> dict[str, Any]:
    index = context.manifest("index").stats
    recall = {name: index[name] for name in ("kind", "recall", "recall_interval") if "recall" in index}
    return recall | {
        "anchors": sum(part.rows for part in parts),
        "depth": max((part.meta["depth"] for part in parts), default=0),
    }


STAGE = Stage(
    name="search",
    version=VERSION,
    inputs=("ingest", "encode", "index"),
    check=_check,
    needs=_needs,
    settings=slices.settings,
    serving=slices.serving,
    plan=_plan,
    shared=_shared,
    open=_open,
    run=_run,
    remarks=approximate.remarks,
    misfit=headers.misfit,
    libraries=lambda _: ("faiss-cpu", "numpy", "pyarrow"),
    stats=_stats,
    devices=devices.of_search,
    unit="anchors",
)

SLICES = slices.stage(_plan_slices)
"""The stage before it if `search.slice_documents` is set."""
