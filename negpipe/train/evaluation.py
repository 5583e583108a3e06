"""How well a model finds the positives of held-out anchors in the whole corpus: exact search, figures of ir-measures.

Vectors stay in a folder while the work goes on, a file a part: a run that was killed encodes no part again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from negpipe import ann, encoders
from negpipe.config.schema import Encoder
from negpipe.data.tables import documents, open_table, ragged
from negpipe.engine.budget import Budget
from negpipe.engine.manifest import Part
from negpipe.engine.stage import Context
from negpipe.review import quality
from negpipe.store.files import publish
from negpipe.train.comparison import METRICS

Progress = Callable[[int, str], None]

_ANCHORS, _BLOCK = 512, 4096  # anchors and documents that are compared at a time
_DEPTH = max(int(name.partition("@")[2]) for name in METRICS)


def evaluate(
    context: Context, encoder: Encoder, path: str, folder: Path, *, budget: Budget, progress: Progress
) -> dict[str, npt.NDArray[np.float64]]:
    """(n,) values of every metric for each held-out anchor, in order.

    Args:
        context: with what `held_out` read.
        encoder: the settings that run the model.
        path: its folder.
        folder: for its vectors.
        budget: memory and threads.
        progress: told of texts encoded.
    """
    read = context.manifest("held_out")
    # Loaded once there is something to encode.
    model: list[encoders.Encoder] = []

    def vectors_of(part: Part) -> Path:
        file = folder / f"{part.key}.npy"
        if not file.exists():
            model.extend([] if model else [encoders.load(encoder, path, budget.threads)])
            texts = open_table(context.path(part, "table"))["text"].to_pylist()
            kind: encoders.Kind = "query" if part.kind == "anchors" else "passage"
            blocks = [*model[0].encode(texts, kind, lambda rows, _: progress(rows, part.kind))]
            publish(folder, file.name, partial(ann.write_part, np.concatenate(blocks)))
        else:
            progress(part.rows, "")
        return file

    corpus = ann.open_parts([vectors_of(part) for part in documents(read)])
    values: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in METRICS}
    for part in read.of_kind("anchors"):
        anchors, table = ann.open_parts([vectors_of(part)]), open_table(context.path(part, "table"))
        for low in range(0, part.rows, _ANCHORS):
            own = table.slice(low, _ANCHORS)
            rows = ranking(anchors.take(np.arange(low, low + own.num_rows)), corpus, _DEPTH)
            positives, offsets = ragged(own["positives"])
            grades, _ = ragged(own["grades"])
            for name, of_each in quality.of_each(METRICS, rows, positives, offsets, grades).items():
                values[name].append(of_each)
    return {name: np.concatenate(pieces) for name, pieces in values.items()}


def ranking(anchors: npt.NDArray[np.float32], corpus: ann.Vectors, depth: int) -> npt.NDArray[np.int64]:
    """(n, depth) best rows of every anchor by (-score, row), -1 beyond the corpus.

    Plain products, and not `ann.search_exact`: this process has torch, which must not meet FAISS.
    """
    scores = np.full((len(anchors), depth), -np.inf, np.float32)
    rows = np.full((len(anchors), depth), -1, np.int64)
    for start, block in corpus.blocks(_BLOCK):
        numbers = np.broadcast_to(np.arange(start, start + len(block)), (len(anchors), len(block)))
        both = np.concatenate([scores, anchors @ block.T], axis=1)
        best = np.argsort(-both, axis=1, kind="stable")[:, :depth]  # rows ascend, so the lower one is first of equals
        scores = np.take_along_axis(both, best, axis=1)
        rows = np.take_along_axis(np.concatenate([rows, numbers], axis=1), best, axis=1)
    return rows


def anchor_ids(context: Context) -> list[str]:
    """Ids of the held-out anchors, in order."""
    parts: Iterator[Any] = (
        open_table(context.path(part, "table"))["id"].to_pylist()
        for part in context.manifest("held_out").of_kind("anchors")
    )
    return [*chain.from_iterable(parts)]
