"""slices: the nearest documents in each slice of the corpus, if the config asks for slices; `search` merges them.

One task is one slice for one part of anchors, and reads nothing from other slices: machines with room for one slice
search a corpus that none of them could hold. Rows are counted from the slice's first row, so documents appended to the
corpus leave the results of earlier slices valid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from negpipe import ann
from negpipe.ann.approximate import Approximate
from negpipe.ann.pairs import Keys
from negpipe.config.schema import Config
from negpipe.data import candidates
from negpipe.data.tables import documents, open_table, ragged, searchable
from negpipe.engine import devices
from negpipe.engine.fingerprint import Beginning
from negpipe.engine.manifest import Part
from negpipe.engine.stage import Context, Made, Needs, Progress, Publisher, Stage, Task, Workload, counted
from negpipe.stages.index import effort, groups, opened_index, places
from negpipe.store import mapped

VERSION = 1
_KEY = 8  # bytes per document found
_NO_PAIRS = np.empty(0, np.int64), np.empty(0, np.int64)


@dataclass(frozen=True)
class Slice:
    """Consecutive parts of the corpus and, for an approximate index, the shards that hold them."""

    first: int
    parts: list[Part]
    shards: list[Part]

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)


def of(context: Context) -> list[Slice]:
    """The slices of the corpus, in order: up to the configured number of documents, in complete parts or shards."""
    encode, index, most = context.manifest("encode"), context.manifest("index"), context.config.search.slice_documents
    parts = documents(encode)
    units: list[tuple[list[Part], list[Part]]] = [([part], []) for part in parts]
    if context.config.index.approximate:
        filled = groups(parts, encode.stats["dimension"], context.config.index.shard_size)
        units = [(own, [shard]) for own, shard in zip(filled, index.of_kind("shard"), strict=True)]
    slices: list[Slice] = []
    first = 0
    for own, shards in units:
        rows = sum(part.rows for part in own)
        if not slices or slices[-1].rows + rows > (most or rows):
            slices.append(Slice(first, [], []))
        slices[-1].parts.extend(own)
        slices[-1].shards.extend(shards)
        first += rows
    return slices


def _last(piece: Slice, context: Context) -> int:
    """The number of its first documents that can be candidates."""
    last = sum(part.rows for part in searchable(context.manifest("encode"), context.config))
    return max(0, min(last - piece.first, piece.rows))


def settings(config: Config) -> dict[str, Any]:
    """The settings of a search that can change its bytes, for the search in slices and that of the entire corpus."""
    known = {"search.depth": config.depth, "data.add_positives": config.data.add_positives}
    return known | ({"index.kind": config.index.kind} if config.index.approximate else {})


def serving(made: Mapping[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Readers use the first `depth` candidates: deeper output serves too, so a narrower window needs no search.

    Not for an approximate index: its effort is tuned for a depth, so other candidates may be found.
    """
    if "index.kind" in wanted:
        return wanted
    return wanted | {"search.depth": max(made.get("search.depth", 0), wanted["search.depth"])}


def _keys(piece: Slice, context: Context) -> Beginning:
    """The common beginning of the keys of a slice's results; the anchors' vectors and texts complete them."""
    config, last = context.config, _last(piece, context)
    return Beginning(
        "slices",
        VERSION,
        min(config.depth, last),
        last,
        [config.index.kind, *(part.identity() for part in context.manifest("index").of_kind("tuned"))]
        if config.index.approximate
        else [],
        [part.identity() for part in piece.shards],
        [part.identity() for part in piece.parts],
        piece.first,
    )


def _check(context: Context) -> None:
    """Check that the largest slice and part of anchors fit into memory; for an approximate index, index has."""
    if "index" not in context.manifests or context.config.index.approximate:
        return
    encode = context.manifest("encode")
    largest = max((part.rows for part in encode.of_kind("anchors")), default=0)
    for piece in of(context):
        ann.exact.layout(
            largest, piece.rows, encode.stats["dimension"], min(context.config.depth, piece.rows), context.budget
        )


def _needs(context: Context, work: Workload) -> Needs:
    cells = (work.anchors if work.missing is None else work.left) * min(context.config.depth, work.documents)
    return left_of_search(work, cells * (candidates.BYTES if work.missing is None else _KEY))


def left_of_search(work: Workload, disk: int) -> Needs:
    """What the missing tasks of a search need, which write `disk` bytes; empty while the dimension is unknown."""
    if not work.dimension:
        return Needs()
    seconds = work.searching.seconds
    return replace(work.searching, seconds=seconds and work.share * seconds, disk=disk)


def tasks(context: Context, anchors: Sequence[tuple[Part, Part]]) -> Iterator[Task]:
    """One task per slice and part of anchors, slice by slice, so that a worker reads one slice at a time.

    Args:
        context: the context of the stage.
        anchors: those to search, texts and vectors.
    """
    for piece in of(context):
        payload = {
            "parts": [part.file("vectors").path for part in piece.parts],
            "shards": places(piece.shards),
            "first": piece.first,
            "candidates": _last(piece, context),
        }
        keys = _keys(piece, context)
        for texts, vectors in anchors:
            files = {"texts": texts.file("table").path, "anchors": vectors.file("vectors").path}
            yield Task(keys.key(vectors.identity(), texts.identity()), "slice", vectors.rows, payload | files)


def found(context: Context) -> Callable[[Part, Part], list[dict[str, Any]]]:
    """Returns what was found in the slices for a part of anchors (texts, vectors), for `merged`; nothing if any of it
    is missing."""
    made = {part.key: part for part in context.manifest("slices").parts}
    slices = [(piece, _keys(piece, context)) for piece in of(context)]

    def of_anchors(texts: Part, anchors: Part) -> list[dict[str, Any]]:
        pieces = [(piece, made.get(keys.key(anchors.identity(), texts.identity()))) for piece, keys in slices]
        return [
            {
                "found": [file.path for file in part.all("found")],
                "positives": part.all("positives")[0].path,
                "first": piece.first,
            }
            for piece, part in pieces
            if part and all(each for _, each in pieces)
        ]

    return of_anchors


@dataclass
class _OpenSlice:
    """The last slice read."""

    names: list[str] = field(default_factory=list)
    vectors: ann.Vectors | None = None
    index: Approximate | None = None


@contextmanager
def _open(_: Context) -> Iterator[_OpenSlice]:
    yield _OpenSlice()


def _run(task: Task, opened: _OpenSlice, context: Context, publish: Publisher, progress: Progress) -> Made:
    payload = task.payload
    if opened.vectors is None or opened.names != payload["parts"]:
        opened.vectors = ann.open_parts([context.store.path(name) for name in payload["parts"]])
        opened.index = opened_index(context, payload["shards"], opened.vectors) if payload["shards"] else None
        opened.names = payload["parts"]
    vectors, last, budget = opened.vectors, payload["candidates"], context.budget
    anchors = ann.open_parts([context.store.path(payload["anchors"])]).all()
    positives, offsets = ragged(open_table(context.store.path(payload["texts"]))["positives"])
    anchor_of, row_of = np.repeat(np.arange(len(anchors)), np.diff(offsets)), positives - payload["first"]
    here = np.flatnonzero((row_of >= 0) & (row_of < vectors.rows))
    pairs = anchor_of[here], row_of[here]
    scores = np.full(len(positives), -np.inf, np.float32)
    scores[here] = ann.score_pairs(anchors, vectors, pairs)
    if last:
        depth, checkpoint = min(context.config.depth, last), ann.Checkpoint(publish.checkpoint())
        if opened.index is None:
            nearest = ann.search_exact(
                anchors, vectors, depth, candidates=last, positives=_NO_PAIRS, budget=budget, checkpoint=checkpoint
            )
            keys: Iterable[Keys] = [ann.slices.layered(nearest.rows, nearest.scores)]
            shape = len(anchors), 1, depth
        else:
            index = opened.index.before(last)
            keys, shape = index.search_slice(anchors, depth, budget=budget.without(index.held))
        publish("found", ".npy", lambda file: ann.slices.write(file, keys, shape))
    publish("positives", ".npy", lambda file: np.save(file, scores, allow_pickle=False))
    publish.drop_checkpoints()
    progress(len(anchors), "")
    return Made(len(anchors))


def merged(context: Context, files: Sequence[Mapping[str, Any]], depth: int) -> ann.Found:
    """The result of a search of the entire corpus, from the results of its slices.

    Args:
        context: the context of the stage.
        files: see `found`; slices without candidates only have the positives' scores.
        depth: candidates per anchor.
    """
    paths = [(context.store.path(name), each["first"]) for each in files for name in each["found"]]
    proposed = max(depth, effort(context).proposed or depth) if context.config.index.approximate else depth
    rows, scores = ann.slices.merge(paths, depth, proposed, budget=context.budget)
    positives = np.max([mapped.npy(context.store.path(each["positives"])) for each in files], axis=0)
    return ann.Found(rows, scores, positives)


def stage(plan: Callable[[Context], Iterable[Task]]) -> Stage:
    """The stage with its plan function: `search` knows which anchors it has searched."""
    return Stage(
        name="slices",
        version=VERSION,
        inputs=("ingest", "encode", "index"),
        check=_check,
        needs=_needs,
        settings=lambda config: settings(config) | {"search.slice_documents": config.search.slice_documents},
        serving=serving,
        plan=plan,
        open=_open,
        run=_run,
        libraries=lambda _: ("faiss-cpu", "numpy", "pyarrow"),
        devices=devices.of_search,
        unit="anchors",
        counts=partial(counted, rows="anchors"),
    )
