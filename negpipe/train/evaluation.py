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

_ANCHORS = 1024  # that are searched at a time
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
            found = ann.search_exact(
                anchors.take(np.arange(low, low + own.num_rows)),
                corpus,
                min(_DEPTH, corpus.rows),
                positives=(np.empty(0, np.int64), np.empty(0, np.int64)),
                budget=budget,
            )
            positives, offsets = ragged(own["positives"])
            grades, _ = ragged(own["grades"])
            for name, of_each in quality.of_each(METRICS, found.rows, positives, offsets, grades).items():
                values[name].append(of_each)
    return {name: np.concatenate(pieces) for name, pieces in values.items()}


def anchor_ids(context: Context) -> list[str]:
    """Ids of the held-out anchors, in order."""
    parts: Iterator[Any] = (
        open_table(context.path(part, "table"))["id"].to_pylist()
        for part in context.manifest("held_out").of_kind("anchors")
    )
    return [*chain.from_iterable(parts)]
