"""Overlap of a held-out split with the training split."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from negpipe.data.arrays import Hashes
from negpipe.data.tables import Rows, documents, open_table, ragged
from negpipe.engine.manifest import Manifest
from negpipe.engine.stage import Context


@dataclass(frozen=True)
class Overlap:
    """Held-out anchors, distinct texts of their positives, and how many of each (normalised) are also trained on."""

    anchors: int
    anchors_trained_on: int
    positives: int
    positives_trained_on: int


def measure(context: Context) -> Overlap:
    """Compare the texts of both splits."""
    trained, held_out = (_texts(context, context.manifest(name)) for name in ("ingest", "held_out"))
    return Overlap(
        len(held_out[0]),
        int(np.isin(held_out[0], trained[0]).sum()),
        len(held_out[1]),
        int(np.isin(held_out[1], trained[1]).sum()),
    )


def _texts(context: Context, read: Manifest) -> tuple[Hashes, Hashes]:
    """Hashes of the normalised texts of the anchors, one per anchor, and of their positives, each once."""
    corpus = Rows([context.path(part, "table") for part in documents(read)])
    tables = [open_table(context.path(part, "table")) for part in read.of_kind("anchors")]
    anchors = np.concatenate([np.empty(0, np.uint64), *(table["normalized"].to_numpy() for table in tables)])
    rows = np.concatenate([np.empty(0, np.int64), *(ragged(table["positives"])[0] for table in tables)])
    return anchors, np.unique(corpus.numbers("normalized", np.unique(rows)))
