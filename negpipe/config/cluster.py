"""A cluster described by a YAML file, the job planned on it, and the measured speed of a core."""

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
        text = f"{bits[1]}{bits[2]}B"
    try:
        return size(text.removesuffix("/s")) // (8 if bits else 1)
    except (ValueError, OverflowError):
        raise ValueError(f"'{value}' is not a bandwidth: write for example 25Gbit/s or 800MB/s") from None


Bandwidth = Annotated[int, BeforeValidator(_bandwidth), Field(gt=0, le=10**15)]
"""Bytes per second, also written as 25Gbit/s or 800MB/s."""
_Rate = Annotated[float, Field(ge=1e-6, le=1e18)]


class Rates(Section):
    """The speed of one core, and the size of a row on disk.

    The defaults were fitted by scripts/fit_plan.py to the runs in scripts/fit_plan.json, on an Intel Xeon with matrix
    units (AMX); see docs/how-to/plan-a-cluster.md for their error. Set those of other machines in the file.
    """

    ingest_rows: _Rate = Field(1.05e5, description="Documents and anchors per second that ingest numbers.")
    ingest_bytes: _Rate = Field(7.3e7, description="Bytes of text per second that ingest reads and writes.")
    brought_bytes: _Rate = Field(1.9e8, description="Bytes per second of precomputed vectors.")
    checked_bytes: _Rate = Field(1.05e8, description="Bytes per second of vectors that encode checks at its end.")
    ids_rows: _Rate = Field(6.6e5, description="Documents per second of the id map (index).")
    products: _Rate = Field(2.4e11, description="Multiplications per second of two vector components (search).")
    loaded: _Rate = Field(1.5e8, description="Vector components per second that a thread reads and converts (search).")
    pairs: _Rate = Field(4.9e6, description="Pairs per second that are scored exactly and kept (search).")
    looked_at: _Rate = Field(1.5e8, description="Candidates per second that filters and samplers check (triplets).")
    negatives: _Rate = Field(4.1e4, description="Negatives per second that are written (triplets).")
    opened: _Rate = Field(2.4e6, description="Documents per second whose tables a process opens (triplets).")
    start: float = Field(1.2, ge=0, description="Seconds to start a process.")
    torch: float = Field(0.2, ge=0, description="Seconds to import torch, used for large searches.")
    task: float = Field(0.001, ge=0, description="Seconds to plan a task and to commit its part, in one process.")
    table_bytes: float = Field(56, ge=0, description="Bytes on disk of a row of a corpus part, without its text.")
    id_bytes: float = Field(7.5, ge=0, description="Bytes on disk of a document in the id map.")
    candidate_bytes: float = Field(8.6, ge=0, description="Bytes on disk of a candidate.")
    negative_bytes: float = Field(30, ge=0, description="Bytes on disk of a negative's row, without its text.")
    compressed: float = Field(0.4, gt=0, description="Bytes on disk per byte of text in a row, compressed.")
    process_bytes: Size = Field(500 * 2**20, gt=0, description="Memory of a process beyond its budget: libraries.")


class Sizes(Section):
    """The size of the job. Missing values are known once the source has been ingested."""

    documents: int | None = Field(None, ge=1, le=10**13, description="Rows of the corpus.")
    anchors: int | None = Field(None, ge=1, le=10**13, description="Queries with a positive.")
    dimension: int | None = Field(None, ge=1, le=10**6, description="Dimensions of a vector.")
    text_bytes: float | None = Field(None, gt=0, le=1e9, description="Mean bytes of a document's text.")
    positives: float | None = Field(None, ge=1, le=1e9, description="Mean positives per anchor.")


class Cluster(Section):
    """Identical nodes that share the run directory."""

    nodes: Annotated[int, Field(ge=1, le=10**6)] = Field(
        1, description="Number of nodes; --nodes 1,8,64 compares several."
    )
    cores: int = Field(ge=1, description="Cores per node.")
    memory: Size = Field(gt=0, description="Memory per node.")
    gpus: int = Field(0, ge=0, description="GPUs per node; encode has a worker on each.")
    disk: Size | None = Field(None, gt=0, description="Disk space per node, for the run directory of a single node.")
    disk_bandwidth: Bandwidth = Field(description="Bandwidth of a node's disk.")
    network_bandwidth: Bandwidth | None = Field(None, description="Bandwidth from a node to the shared storage.")
    storage: Size | None = Field(None, gt=0, description="Bytes of the storage shared by all nodes.")
    storage_bandwidth: Bandwidth | None = Field(None, description="Bandwidth of that storage for all nodes together.")
    texts_per_second: _Rate | None = Field(
        None, description="Texts per second and worker; null: as measured on the existing parts, or on this machine."
    )
    gflops: _Rate | None = Field(
        None, description="Search speed of a node, as printed there by `negpipe plan`; null: rates.products, all cores."
    )
    job: Sizes = Sizes()
    rates: Rates = Rates()

    @model_validator(mode="after")
    def _shared(self) -> Cluster:
        if self.nodes > 1:
            self.require_shared(self.nodes)
        return self

    def require_shared(self, nodes: int) -> None:
        """Raise ValueError if several nodes share a storage of unknown speed."""
        for name in ("network_bandwidth", "storage_bandwidth"):
            if nodes > 1 and getattr(self, name) is None:
                raise ValueError(f"{name}: required, as {nodes} nodes share one run directory")
