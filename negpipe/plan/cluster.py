"""Estimates each stage on a described cluster: time, disk, memory and bytes moved, and its bottleneck.

Nothing is run. A stage consists of tasks of one size, distributed over nodes as by `negpipe work --shard I/NODES`, and
of work that one process does alone before and after. A node's time is the longer of computing and moving bytes: at
best, these overlap. Speeds are those of `Rates`, linear in cores. A node keeps data in its page cache if all of it fits
into the memory beyond the budget, else every task reads it again.

Not covered: approximate indexes, deeper searches for some anchors, duplicates, and waiting for a scheduler.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from negpipe.ann import auto, exact
from negpipe.config.cluster import Cluster, Rates, Sizes
from negpipe.config.schema import Config
from negpipe.engine.budget import Budget
from negpipe.engine.stage import Workload
from negpipe.errors import ConfigError, count_of
from negpipe.plan import estimate

_PAGE = 4096  # minimum bytes read for a row at a random place in a file
_TABLE = 28  # bytes of a document's offsets, read by a process that opens all tables
_NORMALIZED = 8
_KEY = 8  # bytes per candidate of a slice


@dataclass(frozen=True)
class Work:
    """A stage, independent of the nodes.

    Attributes:
        tasks: number of independent tasks.
        computing: seconds per task on one core, divided among a worker's threads.
        alone: seconds per task in a single thread of a worker.
        read: bytes that a task reads; `again`: the part of them that all tasks (or one in `slices`) read.
        written: bytes that a task writes.
        starting: seconds before any work is done.
        opening: seconds of one thread, and `opened` bytes, before a process starts its first task.
        serial: seconds of one process before and after the tasks, which moves `checked` bytes.
        disk: bytes kept on disk.
        shared: whether idle nodes take over tasks of others; else a task belongs to its shard.
        known: whether its time is known.
    """

    stage: str
    tasks: int = 0
    computing: float = 0.0
    alone: float = 0.0
    read: float = 0.0
    again: float = 0.0
    slices: int = 1
    written: float = 0.0
    starting: float = 0.0
    opening: float = 0.0
    opened: float = 0.0
    serial: float = 0.0
    checked: float = 0.0
    disk: float = 0.0
    shared: bool = False
    known: bool = True
    note: str = ""


@dataclass(frozen=True)
class Forecast:
    """A stage on so many nodes: seconds (None: unknown), bytes kept, peak memory per node, bytes moved between nodes
    and storage; its bottleneck, a note, and the error that would stop it."""

    stage: str
    tasks: int
    seconds: float | None
    disk: int
    memory: int
    moved: int
    bound: str
    note: str = ""
    refusal: str = ""


@dataclass(frozen=True)
class Outlook:
    """All stages on so many nodes; `seconds` is the sum of known times."""

    nodes: int
    seconds: float
    stages: tuple[Forecast, ...]


@dataclass(frozen=True)
class ClusterPlan:
    """The job, the index chosen for it (empty: as configured), and a run on each number of nodes."""

    job: Workload
    index: str
    outlooks: tuple[Outlook, ...]


def job_of(cluster: Cluster, known: Workload) -> Workload:
    """Sizes and speed from the cluster file, else those that are known.

    Raises:
        ConfigError: a size is in neither.
    """
    job = replace(known, **{name: value for name, value in cluster.job if value is not None})
    job = replace(job, positives=job.positives or 1.0)
    if missing := [f"job.{name}" for name in Sizes.model_fields if not getattr(job, name)]:
        raise ConfigError(
            f"{', '.join(missing)}: not counted by this run: set {'it' if len(missing) == 1 else 'them'} in the cluster"
            " file"
        )
    if cluster.texts_per_second:
        return replace(job, speed=cluster.texts_per_second, source="from the cluster file")
    return job


def outlooks(config: Config, cluster: Cluster, nodes: Sequence[int], *, probe_encoder: bool = True) -> ClusterPlan:
    """Estimate a run on each given number of nodes.

    Raises:
        ConfigError: sizes of the job, or speeds of shared network and storage, are missing.
    """
    config, known = estimate.known(config, probe_encoder=probe_encoder and not cluster.texts_per_second)
    job = job_of(cluster, known)
    for count in nodes:
        try:
            cluster.require_shared(count)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    config = config.resolved(math.ceil(job.positives))
    config, said = auto.decided(config, job.documents, job.dimension, job.anchors)
    return ClusterPlan(job, said, tuple(forecast(config, cluster, job, count) for count in nodes))


def forecast(config: Config, cluster: Cluster, job: Workload, nodes: int) -> Outlook:
    """Estimate a run on `nodes` nodes.

    Args:
        config: a resolved config with a decided `index.kind`.
        cluster: description of the nodes; its number of nodes is ignored.
        job: the job.
        nodes: number of nodes.
    """
    stages = tuple(_on(work, config, cluster, job, nodes) for work in works(config, cluster, job))
    return Outlook(nodes, sum(stage.seconds or 0.0 for stage in stages), stages)


# --- the stages -----------------------------------------------------------------------------------------


def works(config: Config, cluster: Cluster, job: Workload) -> Iterator[Work]:
    """The stages of a job, in order."""
    rates, part = cluster.rates, config.data.part_rows
    rows, anchors = job.documents, job.anchors
    texts = rows * job.text_bytes
    vectors = job.dimension * np.dtype(config.encoder.storage).itemsize
    parts, asked = math.ceil(rows / part), math.ceil(anchors / part)
    yield Work(
        "ingest",
        starting=rates.start,
        serial=(rows + anchors) / rates.ingest_rows + texts / rates.ingest_bytes,
        checked=3 * texts,  # the source, and texts spooled to disk until all are read
        disk=(rows + anchors) * rates.table_bytes + texts,
        note="one process, regardless of the nodes",
    )
    yield _encode(config, rates, job, parts + asked, vectors)
    yield _index(config, rates, job, parts, vectors)
    yield from _search(config, cluster, job, asked, vectors)
    depth, made = min(config.depth, rows), anchors * config.mining.wanted * job.positives
    taken = made / asked
    yield Work(
        "triplets",
        tasks=asked,
        starting=rates.start * (2 if config.executor.workers else 1),
        alone=anchors / asked * depth / rates.looked_at + taken / rates.negatives,
        read=anchors / asked * depth * (rates.candidate_bytes + _NORMALIZED) + taken * max(_PAGE, job.text_bytes),
        written=taken * (rates.negative_bytes + rates.compressed * job.text_bytes),
        opening=rows / rates.opened,
        opened=rows * _TABLE,
        disk=made * (rates.negative_bytes + rates.compressed * job.text_bytes),
        note="" if config.executor.workers else "one core per node, more with executor.workers",
    )


def _encode(config: Config, rates: Rates, job: Workload, tasks: int, vectors: int) -> Work:
    texts = job.documents + job.anchors
    brought = config.encoder.backend == "precomputed"
    speed = rates.brought_bytes / vectors if brought else job.speed
    note = "precomputed vectors" if brought else f"{job.speed:,.0f} texts per second per worker, {job.source}"
    return Work(
        "encode",
        tasks=tasks,
        starting=2 * rates.start,  # start of the command and its worker
        alone=texts / tasks / speed if speed else 0.0,
        read=texts / tasks * (vectors if brought else job.text_bytes),
        written=texts / tasks * vectors,
        serial=job.documents * vectors / rates.checked_bytes,
        checked=job.documents * vectors,
        disk=texts * vectors,
        known=speed > 0,
        note=note if speed else "set texts_per_second in the cluster file",
    )


def _index(config: Config, rates: Rates, job: Workload, parts: int, vectors: int) -> Work:
    ids = job.documents * rates.id_bytes
    work = Work(
        "index",
        tasks=parts,
        starting=rates.start,
        alone=job.documents / parts / rates.ids_rows,
        read=job.documents * _TABLE / parts,
        written=ids / parts,
        disk=ids,
        shared=True,
    )
    if config.index.kind == "flat":
        file = job.documents * job.dimension * 4
        note = "its single file is written by one process; index.kind stream needs no file"
        moved = file + job.documents * vectors
        serial = job.documents * job.dimension / rates.loaded
        return replace(work, serial=serial, checked=moved, disk=ids + file, note=note)
    known = not config.index.approximate
    return replace(work, known=known, note="" if known else f"{config.index.kind} is not modelled")


def _search(config: Config, cluster: Cluster, job: Workload, parts: int, vectors: int) -> Iterator[Work]:
    """One task per part of anchors (and slice, if any), then tasks that merge slices."""
    rates, depth = cluster.rates, min(config.depth, job.documents)
    slices = math.ceil(job.documents / (config.search.slice_documents or job.documents))
    anchors, rows = job.anchors / parts, job.documents / slices
    stored = rates.candidate_bytes if slices == 1 else _KEY
    products = cluster.gflops * 5e8 / cluster.cores if cluster.gflops else rates.products
    read = rows * (job.dimension * 4 if config.index.kind == "flat" and slices == 1 else vectors)
    pairs = kept(anchors, rows, min(depth, rows))
    searching = Work(
        "search" if slices == 1 else "slices",
        tasks=parts * slices,
        computing=rows * job.dimension * anchors / products + pairs / rates.pairs,
        alone=rows * job.dimension / rates.loaded,
        read=read + anchors * vectors,
        again=read,
        slices=slices,
        written=anchors * depth * stored,
        starting=2 * rates.start + rates.torch,
        disk=job.anchors * depth * stored * slices,
        known=not config.index.approximate,
        note=f"{config.index.kind} is not modelled" if config.index.approximate else "exact search",
    )
    yield searching
    if slices > 1:
        yield Work(
            "search",
            tasks=parts,
            alone=anchors * depth * slices / rates.looked_at,
            read=anchors * depth * slices * _KEY,
            written=anchors * depth * rates.candidate_bytes,
            starting=2 * rates.start,
            disk=job.anchors * depth * rates.candidate_bytes,
            note="merges the results of the slices, as fast as triplets reads candidates: not measured",
        )


def kept(anchors: float, documents: float, depth: float) -> float:
    """Pairs that a search scores exactly: for rows in random order, the r-th is among the best with probability
    depth / r."""
    return anchors * depth * (1 + math.log(documents / depth))


# --- the nodes ------------------------------------------------------------------------------------------


def _on(work: Work, config: Config, cluster: Cluster, job: Workload, nodes: int) -> Forecast:
    rates, cores = cluster.rates, min(config.resources.cpus or cluster.cores, cluster.cores)
    on_gpus = work.stage == "encode" and config.encoder.runs_here and cluster.gpus
    workers = min(config.executor.workers or (cluster.gpus if on_gpus else 1), cores) if work.tasks else 1
    threads = cores // workers
    memory = config.resources.memory_budget + workers * rates.process_bytes
    # Read once by a node whose page cache holds it, else by every task.
    kept_in_cache = work.again <= cluster.memory - memory
    each = work.read + work.written - (work.again if kept_in_cache else 0.0)
    fullest = fullest_shard(work.tasks, nodes, shared=work.shared)
    once = workers * work.opened + (work.again * min(work.slices, fullest) if kept_in_cache else 0.0)
    rounds = math.ceil(fullest / workers)
    moved = work.tasks * each + min(nodes, work.tasks) * once
    moving = _moving(cluster, nodes, fullest * each + once, moved)
    working = {
        "processors": rounds * work.computing / threads,
        "one thread per worker": rounds * work.alone + work.opening,
    }
    times = {max(working, key=working.__getitem__): sum(working.values()), **moving}
    longest = max(times, key=times.__getitem__)
    checking = max(_moving(cluster, nodes, work.checked, work.checked).values())
    alone = max(work.serial, checking) + work.tasks * rates.task
    starting = work.starting + (rates.start if nodes > 1 and work.tasks else 0.0)  # `work`, then `commit`
    parts = {longest: times[longest], "one process": alone, "starting": starting}
    bound = max(parts, key=parts.__getitem__)
    if bound == longest and bound not in moving and rounds > 1.5 * work.tasks / nodes / workers:
        bound = f"{count_of(work.tasks, 'task')}, {fullest:,} of them on one node"
    return Forecast(
        work.stage,
        work.tasks,
        starting + times[longest] + alone if work.known else None,
        round(work.disk),
        memory,
        round(moved + work.checked) if nodes > 1 else 0,
        bound if work.known else "",
        work.note,
        _refusal(work, config, cluster, job, workers, threads, memory),
    )


def _moving(cluster: Cluster, nodes: int, own: float, every: float) -> dict[str, float]:
    """Seconds to move bytes, by bottleneck: bytes of the busiest node, and of all nodes."""
    if nodes == 1:
        return {"disk": own / cluster.disk_bandwidth}
    assert cluster.network_bandwidth and cluster.storage_bandwidth, "see require_shared"
    return {"network": own / cluster.network_bandwidth, "shared storage": every / cluster.storage_bandwidth}


def fullest_shard(tasks: int, nodes: int, *, shared: bool = False) -> int:
    """Tasks of the largest shard: keys fall to shards at random, see `negpipe.engine.shards`."""
    if nodes == 1 or not tasks or shared:
        return math.ceil(tasks / nodes)
    from scipy.stats import binom

    return int(binom.ppf(nodes / (nodes + 1), tasks, 1 / nodes))


def _refusal(
    work: Work, config: Config, cluster: Cluster, job: Workload, workers: int, threads: int, memory: int
) -> str:
    """The error that would keep a stage from running on such nodes."""
    if memory > cluster.memory:
        return f"memory: {memory:,} bytes are needed, a node has {cluster.memory:,}: lower resources.memory_budget"
    if work.computing and work.known:
        budget = Budget(config.resources.memory_budget // workers, threads)
        anchors, rows = min(job.anchors, 2 * config.data.part_rows), job.documents // work.slices  # maximum per part
        try:
            exact.layout(anchors, rows, job.dimension, min(config.depth, rows), budget)
        except ConfigError as error:
            return str(error)
    return ""
