"""Evaluates how well a model finds the positives of held-out anchors in the entire corpus: exact search, ir-measures.

A reranker orders the best documents found by an encoder. Vectors and a reranker's scores are kept in a folder
meanwhile, one file per part or per few anchors: a killed run does not recompute them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from negpipe import ann, encoders
from negpipe.config.encoder import Encoder
from negpipe.data import tables
from negpipe.data.namesakes import Namesakes
from negpipe.data.tables import documents, open_table, ragged
from negpipe.engine.budget import Budget
from negpipe.engine.manifest import Part
from negpipe.engine.stage import Context
from negpipe.review import quality
from negpipe.select.filters import Lookup, own_documents
from negpipe.store import mapped
from negpipe.store.files import publish
from negpipe.train.comparison import METRICS

Progress = Callable[[int, str], None]
Rows = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]
Values = npt.NDArray[np.float64]

BEST = ("best_positive", "best_negative")
"""Scores that show how well an encoder separates positives."""

_ANCHORS, _BLOCK = 512, 4096  # anchors and documents compared at a time
_RERANKED = 8  # anchors per file of a reranker's scores
_DEPTH = max(int(name.partition("@")[2]) for name in METRICS)


def rank(
    context: Context, encoder: Encoder, path: str, folder: Path, *, budget: Budget, progress: Progress
) -> tuple[Rows, Scores]:
    """(n, 100) best rows of each held-out anchor by an encoder, in order, see `ranking`, and their scores; without the
    document that is the anchor itself (`mining.anchor_id`).

    Args:
        context: with the output of `held_out`.
        encoder: the settings that run the model.
        path: its folder.
        folder: the folder for its vectors.
        budget: memory, threads and the device.
        progress: called with texts encoded.
    """
    read = context.manifest("held_out")
    # Loaded only when there is something to encode.
    model: list[encoders.TextEncoder] = []

    def vectors_of(part: Part) -> Path:
        file = folder / f"{part.key}.npy"
        if not file.exists():
            model.extend([] if model else [encoders.load(encoder, path, budget.threads, budget.device)])
            texts = open_table(context.path(part, "table"))["text"].to_pylist()
            kind: encoders.Kind = "query" if part.kind == "anchors" else "passage"
            blocks = [*model[0].encode(texts, kind, lambda rows, _: progress(rows, f"evaluation, {part.kind}"))]
            publish(folder, file.name, partial(ann.write_part, np.concatenate(blocks)))
        else:
            progress(part.rows, "")
        return file

    corpus = ann.open_parts([vectors_of(part) for part in documents(read)])
    files = ([context.path(part, "table") for part in parts] for parts in (documents(read), read.of_kind("namesakes")))
    lookup = Lookup(context.config, tables.Rows(next(files)), Namesakes(next(files)))
    found = []
    for part in read.of_kind("anchors"):
        anchors, table = ann.open_parts([vectors_of(part)]), open_table(context.path(part, "table"))
        for low in range(0, part.rows, _ANCHORS):
            at = np.arange(low, min(low + _ANCHORS, part.rows))
            ranked, scores = ranking(anchors.take(at), corpus, _DEPTH + 1)
            # At most one; it is moved to the end and cut off.
            order = np.argsort(own_documents(lookup, table.slice(low, len(at)), ranked), axis=1, kind="stable")
            found.append([np.take_along_axis(each, order[:, :_DEPTH], axis=1) for each in (ranked, scores)])
    rows, scores = (np.concatenate(pieces) for pieces in zip(*found, strict=True))
    return rows, scores


def rerank(
    context: Context, rows: Rows, depth: int, path: str, folder: Path, *, budget: Budget, progress: Progress
) -> Rows:
    """The rows of `rank`, with the best `depth` reordered by a reranker; equal scores keep their order.

    Args:
        context: with the output of `held_out`; its encoder settings give the maximum lengths and the batch size.
        rows: the result of `rank`.
        depth: number of rows per anchor to reorder; the others keep their places.
        path: the reranker's folder.
        folder: the folder for its scores.
        budget: memory, threads and the device.
        progress: called with anchors whose documents were scored.
    """
    from negpipe.train import reranker

    encoder, read = context.config.encoder, context.manifest("held_out")
    corpus = tables.Rows([context.path(part, "table") for part in documents(read)])
    texts = _of_anchors(context, "text")
    model: list[Any] = []

    def scored(low: int, best: Rows) -> Path:
        file = folder / f"{low:09d}.npy"
        if not file.exists():
            model.extend([] if model else [reranker.load(encoder, path, budget.threads, budget.device)])
            anchors = [texts[low + at] for at in np.nonzero(best >= 0)[0]]
            own = corpus.strings("text", best[best >= 0]).to_pylist()
            made = reranker.score(model[0], anchors, own, encoder.batch_size)
            publish(folder, file.name, lambda target: np.save(target, made))
        progress(len(best), "evaluation, pairs")
        return file

    ordered = rows.copy()
    for low in range(0, len(rows), _RERANKED):
        best = rows[low : low + _RERANKED, :depth]
        scores = np.full(best.shape, -np.inf, np.float32)
        scores[best >= 0] = mapped.npy(scored(low, best))
        order = np.argsort(-scores, axis=1, kind="stable")
        ordered[low : low + _RERANKED, :depth] = np.take_along_axis(best, order, axis=1)
    return ordered


def measure(context: Context, rows: Rows) -> dict[str, Values]:
    """(n,) values of every metric for each held-out anchor, computed from its ranking."""
    found = (
        quality.of_each(METRICS, rows[at], positives, offsets, grades)
        for at, positives, offsets, grades in _judgments(context)
    )
    return _joined(found, METRICS)


def best_scores(context: Context, rows: Rows, scores: Scores) -> dict[str, Values]:
    """(n,) for each held-out anchor, the highest score of a positive and of another document; NaN if its ranking has
    none."""

    def found() -> Iterator[dict[str, Values]]:
        for at, positives, offsets, _ in _judgments(context):
            relevant = np.stack(
                [
                    np.isin(own, positives[low:high])
                    for own, (low, high) in zip(rows[at], pairwise(offsets), strict=True)
                ]
            )
            sides = zip(BEST, (relevant, ~relevant & (rows[at] >= 0)), strict=True)
            highest = {name: np.where(mask, scores[at], -np.inf).max(axis=1) for name, mask in sides}
            yield {name: np.where(np.isfinite(each), each, np.nan) for name, each in highest.items()}

    return _joined(found(), BEST)


def _judgments(context: Context) -> Iterator[tuple[slice, Rows, Rows, npt.NDArray[Any]]]:
    """Slices of the held-out anchors: their range, positives, offsets and grades."""
    start = 0
    for part in context.manifest("held_out").of_kind("anchors"):
        table = open_table(context.path(part, "table"))
        for low in range(0, part.rows, _ANCHORS):
            own = table.slice(low, _ANCHORS)
            positives, offsets = ragged(own["positives"])
            yield slice(start, start + own.num_rows), positives, offsets, ragged(own["grades"])[0]
            start += own.num_rows


def _joined(pieces: Iterable[Mapping[str, Values]], names: Sequence[str]) -> dict[str, Values]:
    made = [*pieces]
    return {name: np.concatenate([piece[name] for piece in made]) for name in names}


def ranking(anchors: npt.NDArray[np.float32], corpus: ann.Vectors, depth: int) -> tuple[Rows, Scores]:
    """(n, depth) best rows of every anchor by (-score, row), -1 beyond the corpus, and their scores.

    Uses plain products instead of `ann.search_exact`: this process has torch, which must not meet FAISS.
    """
    scores = np.full((len(anchors), depth), -np.inf, np.float32)
    rows = np.full((len(anchors), depth), -1, np.int64)
    for start, block in corpus.blocks(_BLOCK):
        numbers = np.broadcast_to(np.arange(start, start + len(block)), (len(anchors), len(block)))
        both = np.concatenate([scores, anchors @ block.T], axis=1)
        best = np.argsort(-both, axis=1, kind="stable")[:, :depth]  # rows ascend: of equals, the lower comes first
        scores = np.take_along_axis(both, best, axis=1)
        rows = np.take_along_axis(np.concatenate([rows, numbers], axis=1), best, axis=1)
    return rows, scores


def anchor_ids(context: Context) -> list[str]:
    """Ids of the held-out anchors, in order."""
    return _of_anchors(context, "id")


def _of_anchors(context: Context, column: str) -> list[str]:
    parts: Iterator[Any] = (
        open_table(context.path(part, "table"))[column].to_pylist()
        for part in context.manifest("held_out").of_kind("anchors")
    )
    return [*chain.from_iterable(parts)]
