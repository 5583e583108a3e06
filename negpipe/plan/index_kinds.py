"""Estimates the cost of each kind of index for a job: disk, memory, time to build and to search."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from negpipe import ann
from negpipe.ann import auto, coded, exact, factory, lists, probe
from negpipe.ann.approximate import check_memory, sampled
from negpipe.ann.probe import SearchJob
from negpipe.config.schema import Config
from negpipe.data.arrays import Floats
from negpipe.engine.budget import Budget
from negpipe.engine.stage import Needs
from negpipe.errors import ConfigError

SEARCH_SHARE = 0.75  # share of the comparison speed; the rest is exact scores and merging
_WRITTEN = 5e8  # bytes per second
_UNEVEN = 4  # ratio of the longest list to the average


@dataclass(frozen=True)
class IndexEstimate:
    """The cost of one kind of index: bytes on disk and in memory, seconds to build and to search; None if refused."""

    kind: str
    disk: int | None
    memory: int | None
    build: float | None
    search: float | None
    note: str
    refusal: str = ""


@dataclass(frozen=True)
class Machine:
    """This machine: multiplications per second of all threads, workers, and the budget of each."""

    rate: float
    workers: int
    budget: Budget


def choices(
    config: Config, job: SearchJob, sample: Floats | None, largest: int, machine: Machine
) -> list[IndexEstimate]:
    """Every kind suitable for the job, and the configured one.

    Args:
        config: a resolved config; `index.kind` may be auto.
        sample: `probe.SAMPLE` vectors of the corpus; None if there are none yet.
        largest: anchors searched at a time.
    """
    made = list(_exact(job, largest, machine))
    automatic, reason = auto.choose(job.rows, job.dimension, job.anchors, job.depth)
    suited = [name for name, *_ in auto.options(job.rows, job.dimension, job.depth)]
    configured = [config.index.kind] if config.index.kind not in ("auto", "stream", "flat", *suited) else []
    for kind in [*suited, *configured]:
        try:
            made.append(_approximate(config, kind, job, sample, largest, machine))
        except ConfigError as error:
            made.append(_refused(kind, error))
    return [_chosen(one, reason) if one.kind == automatic else one for one in made]


def needs_of(config: Config, job: SearchJob, made: Sequence[IndexEstimate], machine: Machine) -> tuple[Needs, Needs]:
    """What the configured kind needs to be built and to be searched."""
    own = next(choice for choice in made if choice.kind == config.index.kind)
    building = Needs(own.build, own.disk, note=own.note)
    if config.index.approximate:
        return replace(building, refusal=own.refusal), Needs(own.search, note=own.note)
    return building, Needs(_seconds(job, machine), note="exact search", refusal=own.refusal)


def _chosen(choice: IndexEstimate, reason: str) -> IndexEstimate:
    """Mark the kind that `index.kind: auto` chooses."""
    return replace(choice, note="; ".join(filter(None, [choice.note, f"the choice of auto: {reason}"])))


def _seconds(job: SearchJob, machine: Machine) -> float:
    """Seconds of exact search."""
    return float(job.rows) * job.anchors * job.dimension / machine.rate / SEARCH_SHARE


def _refused(kind: str, error: ConfigError) -> IndexEstimate:
    return IndexEstimate(kind, None, None, None, None, "", str(error))


def _exact(job: SearchJob, largest: int, machine: Machine) -> Iterator[IndexEstimate]:
    try:
        *_, used = exact.layout(largest, job.rows, job.dimension, job.depth, machine.budget)
    except ConfigError as error:
        yield from (_refused(kind, error) for kind in ("stream", "flat"))
        return
    vectors, seconds = job.rows * job.dimension * 4, _seconds(job, machine)
    yield IndexEstimate("stream", 0, used, 0.0, seconds, "exact, no second copy")
    yield IndexEstimate("flat", vectors, used, vectors / _WRITTEN, seconds, "exact, and a file for faiss.read_index")


def _approximate(
    config: Config, kind: str, job: SearchJob, sample: Floats | None, largest: int, machine: Machine
) -> IndexEstimate:
    wanted = factory.rows_wanted(kind, job.dimension, job.rows)
    with_kind = config.model_copy(update={"index": config.index.model_copy(update={"kind": kind})})
    vectors = job.rows * job.dimension * 4
    shard = min(config.index.shard_size, vectors)
    disk, held = factory.bytes_of(kind, job.dimension, job.rows, -(-vectors // shard))
    rows_held = shard // (job.dimension * 4)
    check_memory(with_kind, job, rows_held, largest, held, machine.budget)
    index = factory.make(kind, job.dimension)
    number = factory.lists_of(index)
    share = auto.share(job.rows, job.depth, number) if number else 1.0
    threads = machine.budget.threads
    if lists.is_lists(index):
        longest, nprobe = _UNEVEN * job.rows // number, max(1, int(share * number))
        each, fixed = lists.needs(
            job.dimension, job.depth, nprobe, share, longest, sampled(job.rows), machine.budget.threads
        )
        products = auto.built(job.rows, wanted, number)
        build, search = products * job.dimension / machine.rate, _seconds(job, machine) * (share + auto.FIXED)
        note = f"recall is measured; estimated with {nprobe:,} lists probed"
    else:
        each, fixed = coded.needs(job.dimension, 2 * job.depth, threads)
        rows = _like(job.dimension) if sample is None else sample
        build, search = probe.seconds(kind, job, rows, share, machine.rate, threads * machine.workers)
        note = f"recall is measured; tried with {len(rows):,} {'random ' if sample is None else ''}vectors"
        note += ", excluding training of the rotation" if "OPQ" in kind else ""
    searching = held + min(fixed + each * largest, max(fixed + each, machine.budget.memory - held))
    tuned = _seconds(job, machine) * min(1.0, config.index.recall_anchors / job.anchors)
    return IndexEstimate(
        kind,
        disk,
        max(3 * shard, factory.training_bytes(kind, job.dimension, wanted), searching),
        build + tuned,
        search,
        note,
    )


def _like(dimension: int) -> Floats:
    draw = np.random.default_rng(0).standard_normal((probe.SAMPLE, dimension), np.float32)
    unit: Floats = draw / np.linalg.norm(draw, axis=1, keepdims=True)
    return unit


def sample_of(vectors: ann.Vectors, seed: int) -> Floats | None:
    """The sample on which `choices` tries kinds, reading no other rows; None if there are too few vectors."""
    if vectors.rows < probe.SAMPLE:
        return None
    return vectors.take(np.sort(np.random.default_rng(seed).choice(vectors.rows, probe.SAMPLE, replace=False)))
