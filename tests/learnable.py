"""A small source to train on and to be judged by, and training in this process."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from beir_data import write_folder
from real_runs import encoding_here

from negpipe.train import stage

DOCUMENTS, TRAINED, HELD_OUT = 90, 40, 30
BOTH_ANCHORS, BOTH_POSITIVES = 3, 5
"""What the held-out split shares with the trained one: anchors, of which each has the very positive, and two positives
more whose anchors are others."""
_WORDS = [
    "river",
    "stone",
    "house",
    "wind",
    "green",
    "paper",
    "valley",
    "copper",
    "bridge",
    "garden",
    "winter",
    "glass",
]


def build(folder: Path) -> Path:
    """A BEIR folder: a query has most of the words of its document, so that even a model of random weights finds it."""
    draw = random.Random(5)
    documents = [draw.choices(_WORDS, k=8) for _ in range(DOCUMENTS)]
    texts = [(f"d{i}", "", f"{' '.join(words)} {i}") for i, words in enumerate(documents)]
    queries = [(f"q{i}", f"{' '.join(documents[i][:7])} {i}") for i in range(DOCUMENTS)]
    # An anchor of the test split with the same text but for case, and another query for the same document.
    queries += [(f"c{i}", queries[i][1].upper()) for i in range(BOTH_ANCHORS)]
    queries += [(f"o{i}", f"what is {i}") for i in range(BOTH_ANCHORS, BOTH_POSITIVES)]
    own = range(TRAINED, TRAINED + HELD_OUT - BOTH_POSITIVES)
    test = [(f"q{i}", f"d{i}", 1) for i in own]
    test += [(f"c{i}", f"d{i}", 1) for i in range(BOTH_ANCHORS)]
    test += [(f"o{i}", f"d{i}", 1) for i in range(BOTH_ANCHORS, BOTH_POSITIVES)]
    train = [(f"q{i}", f"d{i}", 1) for i in range(TRAINED)]
    return write_folder(folder, texts, queries, {"train": train, "test": test, "single": [("q80", "d80", 1)]})


def settings(run_dir: Path, data: Path, model: Path) -> dict[str, Any]:
    return {
        "run_dir": str(run_dir),
        "data": {"path": str(data), "part_rows": 32},
        "encoder": {
            "backend": "sentence-transformers",
            "model": str(model),
            "query_max_length": 48,
            "passage_max_length": 64,
        },
        "mining": {"range_max": 60, "num_negatives": 2, "relative_margin": None},
        "output": {"report": False},
        "train": {"steps": 2, "batch_size": 8, "learning_rate": 0.003, "warmup": 0},
        "executor": {"kind": "inline"},
        "resources": {"cpus": 1},
    }


@contextmanager
def training_here() -> Iterator[None]:
    """The real stages in this process, see `encoding_here`."""
    with encoding_here(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "STAGE", replace(stage.STAGE, place=lambda config: "worker"))
        yield
