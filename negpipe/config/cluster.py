"""A cluster as a YAML file describes it, the job that is planned on it, and what was measured of one core's speed."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from negpipe.config.section import Section
from negpipe.config.values import Size, size


def _bandwidth(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = value.strip()
    if bits := re.fullmatch(r"([\d.]+)\s*([GM])bit/s", text):
        return int(float(bits[1]) * {"G": 10**9, "M": 10**6}[bits[2]] / 8)
    try:
        return size(text.removesuffix("/s"))
    except ValueError:
        raise ValueError(f"'{value}' is not a bandwidth: write for example 25Gbit/s or 800MB/s") from None


Bandwidth = Annotated[int, BeforeValidator(_bandwidth), Field(gt=0)]
"""Bytes a second, also written as 25Gbit/s or 800MB/s."""
_Rate = Annotated[float, Field(gt=0)]


class Rates(Section):
    """What one core does in a second, and what a row takes on disk.

    The defaults were fitted by scripts/fit_plan.py to the runs in scripts/fit_plan.json, on an Intel Xeon with matrix
    units (AMX): see docs/how-to/plan-a-cluster.md for how far they are off. Another machine's are given in the file.
    """

    ingest_rows: _Rate = Field(1.05e5, description="Documents and anchors a second that ingest numbers.")
    ingest_bytes: _Rate = Field(7.3e7, description="Bytes of text a second that ingest reads and writes.")
    brought_bytes: _Rate = Field(1.9e8, description="Bytes a second of vectors that are brought, not encoded.")
    checked_bytes: _Rate = Field(1.05e8, description="Bytes a second of vectors that encode looks through at its end.")
    ids_rows: _Rate = Field(6.6e5, description="Documents a second of the map from rows to ids (index).")
    products: _Rate = Field(2.4e11, description="Multiplications a second of two numbers of vectors (search).")
    loaded: _Rate = Field(1.5e8, description="Numbers of vectors a second that one thread reads and converts (search).")
    pairs: _Rate = Field(4.9e6, description="Pairs a second that are scored exactly, and kept (search).")
    looked_at: _Rate = Field(1.5e8, description="Candidates a second that filters and samplers look at (triplets).")
    negatives: _Rate = Field(4.1e4, description="Negatives a second that are written (triplets).")
    opened: _Rate = Field(2.4e6, description="Documents a second whose tables a process opens (triplets).")
    start: float = Field(1.2, ge=0, description="Seconds for a process to begin.")
    torch: float = Field(0.2, ge=0, description="Seconds to import torch, which multiplies for a large search.")
    task: float = Field(0.001, ge=0, description="Seconds to plan a task and to commit its part, in one process.")
    table_bytes: float = Field(56, ge=0, description="Bytes on disk of a row of a corpus part beside its text.")
    id_bytes: float = Field(7.5, ge=0, description="Bytes on disk of a document in the map from rows to ids.")
    candidate_bytes: float = Field(8.6, ge=0, description="Bytes on disk of a candidate.")
    negative_bytes: float = Field(30, ge=0, description="Bytes on disk of a negative's row beside its text.")
    compressed: float = Field(0.4, gt=0, description="Bytes on disk of a byte of text in a row, compressed.")
    process_bytes: Size = Field(500 * 2**20, gt=0, description="Memory of a process beside its budget: libraries.")


class Sizes(Section):
    """How large the job is. What is left out is known once the source has been ingested."""

    documents: int | None = Field(None, ge=1, description="Rows of the corpus.")
    anchors: int | None = Field(None, ge=1, description="Queries with a positive.")
    dimension: int | None = Field(None, ge=1, description="Numbers of a vector.")
    text_bytes: float | None = Field(None, gt=0, description="Mean bytes of a document's text.")
    positives: float | None = Field(None, ge=1, description="Positives an anchor, on average.")


class Cluster(Section):
    """Nodes, all alike, that share the run directory."""

    nodes: Annotated[int, Field(ge=1)] = Field(1, description="How many; --nodes 1,8,64 compares numbers of them.")
    cores: int = Field(ge=1, description="Of a node.")
    memory: Size = Field(gt=0, description="Of a node.")
    gpus: int = Field(0, ge=0, description="Of a node; encode has a worker on each.")
    disk: Size | None = Field(None, gt=0, description="Of a node: where a single one has its run directory.")
    disk_bandwidth: Bandwidth = Field(description="Of a node's disk.")
    network_bandwidth: Bandwidth | None = Field(None, description="Between a node and the storage that all share.")
    storage: Size | None = Field(None, gt=0, description="Bytes of the storage that all nodes share.")
    storage_bandwidth: Bandwidth | None = Field(None, description="Of that storage, all nodes together.")
    texts_per_second: _Rate | None = Field(
        None, description="Texts a worker encodes in a second; null: as the parts that are there took, or this machine."
    )
    gflops: _Rate | None = Field(
        None, description="Of a node's search, as `negpipe plan` prints it there; null: rates.products, every core."
    )
    job: Sizes = Sizes()
    rates: Rates = Rates()

    @model_validator(mode="after")
    def _shared(self) -> Cluster:
        if self.nodes > 1:
            self.require_shared(self.nodes)
        return self

    def require_shared(self, nodes: int) -> None:
        """Raise ValueError where nodes are to share a storage of which nothing is known."""
        for name in ("network_bandwidth", "storage_bandwidth"):
            if nodes > 1 and getattr(self, name) is None:
                raise ValueError(f"{name}: {nodes} nodes share one run directory, say how fast they reach it")
