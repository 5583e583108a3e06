"""Training rows: units → Arrow tables in the layout that `output.format` names."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from negpipe.selection import Units
from negpipe.tables import Rows

Ints = npt.NDArray[np.int64]

_TEXTS = ("anchor_id", "positive_id", "negative_id", "anchor", "positive", "negative")
_NUMBERS = {"positive_score": pa.float32(), "negative_score": pa.float32(), "negative_rank": pa.int32()}


def schema() -> pa.Schema:
    """Columns of the rows."""
    return pa.schema({name: pa.string() for name in _TEXTS} | _NUMBERS)


def table(units: Units, corpus: Rows) -> pa.Table:
    """`triplet`: a row for every (positive, negative) of a unit, the positive in the outer loop."""
    positives, negatives = np.diff(units.positive_offsets), np.diff(units.negative_offsets)
    per_pair = np.repeat(negatives, positives)
    pair = np.repeat(np.arange(len(units.positives)), per_pair)
    unit = np.repeat(np.arange(len(units.anchor)), positives * negatives)
    negative = units.negative_offsets[unit] + count_within(per_pair)
    anchor = pa.array(units.anchor[unit])
    columns = {
        "anchor_id": units.anchors["id"].take(anchor),
        "positive_id": corpus.strings("id", units.positives[pair]),
        "negative_id": corpus.strings("id", units.negatives[negative]),
        "anchor": units.anchors["text"].take(anchor),
        "positive": corpus.strings("text", units.positives[pair]),
        "negative": corpus.strings("text", units.negatives[negative]),
    }
    return pa.table(
        {name: column.cast(pa.string()) for name, column in columns.items()}
        | {
            "positive_score": units.positive_scores[pair],
            "negative_score": units.negative_scores[negative],
            "negative_rank": units.negative_ranks[negative].astype(np.int32),
        },
        schema=schema(),
    )


def count_within(lengths: Ints) -> Ints:
    """0, 1, … lengths[0] - 1, 0, 1, … lengths[1] - 1, …"""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
