"""A source of overlapping clusters with vectors of its own, for runs with approximate indexes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import small_source as small

from negpipe import graph
from negpipe.config.file import load_config

DOCUMENTS, QUERIES, DIMENSION = 3_000, 300, 16


def vectors(rows: int, seed: int) -> np.ndarray[Any, Any]:
    """Overlapping clusters: a list alone does not hold an anchor's neighbours."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(40, DIMENSION))
    return (centres[rng.integers(0, 40, rows)] + 0.8 * rng.normal(size=(rows, DIMENSION))).astype(np.float32)


def write(folder: Path, documents: int = DOCUMENTS) -> dict[str, Any]:
    small.write_rows(folder / "data/corpus.jsonl", small.documents(documents))
    small.write_rows(folder / "data/queries.jsonl", small.queries(QUERIES))
    small.write_qrels(folder / "data/qrels/train.tsv", [(f"q{i}", f"d{3 * i}", 1) for i in range(QUERIES)])
    np.save(folder / "corpus.npy", vectors(DOCUMENTS, 1)[:documents])
    np.save(folder / "anchors.npy", vectors(QUERIES, 2))
    settings = small.settings(folder)
    settings["data"]["part_rows"] = 400
    settings["search"] = {"depth": 64}
    settings["resources"] = {"cpus": 2}
    settings["mining"]["range_min"] = 2
    return settings


def mined(source: dict[str, Any], *overrides: str, only: str | None = None) -> graph.Result:
    return graph.mine(load_config(source, list(overrides)), only=only)


KINDS = (
    "IVF16,Flat",
    "IVF16,SQ8",
    "PQ8x4fs",
    "HNSW16",
    "PCA8,IVF16,Flat",
    "SQ8",
    "IVF16,PQ8x4fs",
    "OPQ8,IVF16,PQ8x4fs",
    "IVF16,RaBitQ",
)
