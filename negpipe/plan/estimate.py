"""Estimates a run before it starts: tasks done and to do, time, disk and memory. Does not run any stage.

Times are extrapolated from a probe of this machine and, if parts exist, from their times: estimates.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from negpipe import ann, encoders, graph
from negpipe.ann import auto
from negpipe.ann.probe import SearchJob
from negpipe.config.schema import Config
from negpipe.data.tables import documents
from negpipe.engine.shards import shard_of
from negpipe.engine.stage import Context, Needs, Stage, Task, Workload
from negpipe.engine.state import digests_of, look
from negpipe.errors import NegpipeError
from negpipe.plan.index_kinds import IndexEstimate, Machine, choices, needs_of, sample_of
from negpipe.plan.sample import Judge, draw
from negpipe.plan.variants import Variant, measured
from negpipe.stages import defects, encode

_SAMPLE = 512  # maximum texts to time the encoder on
_DIMENSION = 384  # if still unknown
_SHARD_SECONDS = 3600  # target duration of a shard
_NDCG, _NEAREST = 0.002, 0.95  # loss of nDCG@10 that is noise; share of the nearest, where it is unknown


@dataclass(frozen=True)
class _Parts:
    """A stage, its state, and its existing and missing parts (None: still unknown)."""

    stage: str
    state: str
    done: int | None = None
    todo: int | None = None


@dataclass(frozen=True)
class Step(Needs, _Parts):
    """A stage, what its remaining work needs, and its shards (None: it does not run in shards, or its time is unknown):
    those that Slurm would be sent, else of about an hour on machines like this one."""

    shards: int | None = None


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    Attributes:
        gflops: this machine's speed of comparing vectors.
        steps: the stages.
        choices: kinds of index; empty while the dimension of the vectors is unknown.
        encoding: ways to run the encoder; empty once vectors exist, and for precomputed vectors.
        recommended: the fastest of them, if it saves a tenth of the time and ranks as well.
        free: free bytes on the disk.
    """

    gflops: float
    steps: tuple[Step, ...]
    choices: tuple[IndexEstimate, ...]
    encoding: tuple[Encoding, ...]
    recommended: Encoding | None
    free: int


@dataclass(frozen=True)
class Encoding:
    """A way to run the encoder, and the seconds it takes for all texts."""

    variant: Variant
    seconds: float


def recommended(ways: Sequence[Encoding]) -> Encoding | None:
    """The fastest way, if it saves a tenth of the configured one's time, and ranks as well on the sample."""
    usual = next((way for way in ways if way.variant.configured), None)
    if usual is None:
        return None
    good = [way for way in ways if way.seconds <= 0.9 * usual.seconds and _as_good(way.variant, usual.variant)]
    return min(good, key=lambda way: way.seconds, default=None)


def _as_good(one: Variant, usual: Variant) -> bool:
    if one.ndcg is None or usual.ndcg is None:
        return one.agreement is not None and one.agreement >= _NEAREST
    return one.ndcg >= usual.ndcg - _NDCG


def plan(config: Config, *, probe_encoder: bool = True) -> Plan:
    """Check what is on disk, probe this machine, and estimate the rest.

    Args:
        config: the config of the run.
        probe_encoder: load the model to time it, if no part records its speed.
    """
    with digests_of(config) as digests:
        context, steps, ahead = _walked(Context(config, config.run_dir, digests))
        work = _sizes(context)
        variants: tuple[Variant, ...] = ()
        choices: tuple[IndexEstimate, ...] = ()
        if work.documents and not work.dimension:
            work, variants = _timed(work, context, probe_encoder)
        gflops = 2e-9 * ann.rate(float(work.documents) * work.anchors * work.dimension, work.dimension or _DIMENSION)
        gflops *= context.budget.threads * context.workers
        if work.dimension:
            config, _ = auto.decided(context.config, work.documents, work.dimension, work.anchors)
            context = replace(context, config=config)
            work, choices = _with_index(work, context, gflops)
        steps += [_step(stage, state, context, work) for stage, state in ahead]
        texts = work.documents + work.anchors
        ways = tuple(Encoding(one, texts / one.speed / context.workers) for one in variants)
    free = shutil.disk_usage(_existing(config.store or config.run_dir)).free
    return Plan(gflops, tuple(steps), choices, ways, recommended(ways), free)


def known(config: Config, *, probe_encoder: bool = True) -> tuple[Config, Workload]:
    """The config with settings resolved by complete stages, and the sizes, which ingest counts."""
    with digests_of(config) as digests:
        context, *_ = _walked(Context(config, config.run_dir, digests))
        work = _sizes(context)
        return context.config, _timed(work, context, probe_encoder)[0] if work.documents else work


def _walked(context: Context) -> tuple[Context, list[Step], list[tuple[Stage, str]]]:
    """The context after the complete stages, their steps, and the other stages with their states."""
    steps: list[Step] = []
    ahead: list[tuple[Stage, str]] = []
    for stage in graph.stages(context.config).values():
        state = look(stage, context)
        if state.state == "current" and state.manifest:
            steps.append(Step(stage.name, "current", len(state.manifest.parts), 0, 0.0))
            context = context.after(stage, state.manifest)
        else:
            ahead.append((stage, state.state))
    return context, steps, ahead


def _existing(folder: Path) -> Path:
    """The folder, or its closest existing parent."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def _step(stage: Stage, state: str, context: Context, work: Workload) -> Step:
    """A stage that is not complete, with the error that would keep it from running, as far as it can be detected."""
    own, done, todo, shards = stage.within(context), None, None, None
    absent = [name for name in stage.inputs if name not in context.manifests]
    if stage.inputs and not absent:  # without inputs, planning would read a source
        tasks, books = [*stage.plan(own)], context.books(stage.name)
        missing = [task for task in tasks if books.part(task.key) is None]
        done, todo, shards = len(tasks) - len(missing), len(missing), _sent(stage, context.config, missing)
        work = replace(work, missing=missing)
        work = replace(work, share=work.left / max(1, sum(task.rows for task in tasks)))
    waiting = absent and not work.documents
    needs = Needs(note=f"waiting for {absent[0]}") if waiting else stage.needs(own, work)
    try:
        if not (absent and stage.fetches):
            stage.examine(context)
    except NegpipeError as error:
        needs = replace(needs, refusal=str(error))
    return _divided(Step(stage.name, state, done, todo, **vars(needs), shards=shards), stage, context.config)


def _divided(step: Step, stage: Stage, config: Config) -> Step:
    """The step with its suggested number of shards, at most the number of tasks."""
    if not step.seconds or step.todo == 0 or stage.place(config) == "caller":
        return step
    if config.executor.kind == "slurm":
        return replace(step, shards=step.shards or config.executor.slurm.shards)
    shards = math.ceil(step.seconds / _SHARD_SECONDS)
    return replace(step, shards=min(shards, step.todo or shards))


def _sent(stage: Stage, config: Config, missing: list[Task]) -> int | None:
    """The number of array tasks that `executor.kind: slurm` starts with."""
    if config.executor.kind != "slurm" or stage.name not in graph.sharded(config):
        return None
    if len(missing) == 1 and stage.place(config) == "light":
        return None
    return len({shard_of(task.key, config.executor.slurm.shards) for task in missing}) or None


def _sizes(context: Context) -> Workload:
    """What ingest and encode tell."""
    if "ingest" not in context.manifests:
        return Workload()
    ingest, encoded = context.manifest("ingest"), context.manifests.get("encode")
    rows, anchors = (sum(part.rows for part in parts) for parts in (documents(ingest), ingest.of_kind("anchors")))
    characters = sum(int(part.meta.get("characters", 0)) for part in documents(ingest))
    each, positives = characters / max(1, rows), ingest.stats["positives"] / max(1, anchors)
    return Workload(rows, anchors, encoded.stats["dimension"] if encoded else 0, each, positives)


def _timed(work: Workload, context: Context, probe: bool) -> tuple[Workload, tuple[Variant, ...]]:
    """The workload with the speed of the encoder and the dimension, if they can be known; and its other timings."""
    context = encode.STAGE.within(context)
    encoder = context.config.encoder
    made = [part for part in encode.made_of(context) if defects.encoded(part) == part.rows]
    if seconds := sum(float(part.provenance.get("seconds", 0)) for part in made):
        speed, dimension = sum(part.rows for part in made) / seconds, int(made[0].meta["dimension"])
        return replace(work, speed=speed, source="measured on existing parts", dimension=dimension), ()
    if encoder.backend == "precomputed":
        return replace(work, dimension=encode.brought_dimension(context)), ()
    if encoder.backend == "http":  # timing it would mean sending texts
        return replace(work, dimension=work.dimension or encoder.truncate_dim or 0), ()
    if not probe:
        return work, ()
    count = (work.documents + work.anchors) / context.workers
    sample = draw(context, _SAMPLE)
    asked = [*zip(sample.anchors["text"].to_pylist(), sample.complete.tolist(), strict=True)]
    model = encoders.resolve_model(encoder, context.digest_file)
    budget, outcome = context.on(context.devices()[0]).budget, None
    with suppress(NegpipeError):  # reported for the stage that it would stop
        outcome = Judge(context, sample).outcome
    variants = measured(encoder, model.path, sample.texts, budget, asked, outcome, count)
    own = variants[0]
    source = f"measured on {own.texts} of them"
    return replace(work, speed=own.speed, source=source, dimension=own.dimension), tuple(variants)


def _with_index(work: Workload, context: Context, gflops: float) -> tuple[Workload, tuple[IndexEstimate, ...]]:
    """The workload with what the configured kind of index needs, and the choices."""
    config, sample = context.config, None
    largest = max(part.rows for part in context.manifest("ingest").of_kind("anchors"))
    if "encode" in context.manifests:
        parts = documents(context.manifest("encode"))
        sample = sample_of(ann.open_parts([context.path(part, "vectors") for part in parts]), config.seed)
    job = SearchJob(work.documents, work.dimension, work.anchors, min(config.depth, work.documents))
    machine = Machine(gflops * 5e8, context.workers, context.budget)
    found = tuple(choices(config, job, sample, largest, machine))
    building, searching = needs_of(config, job, found, machine)
    return replace(work, building=building, searching=searching), found
