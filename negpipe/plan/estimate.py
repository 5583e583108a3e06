"""Estimates a run before it starts: tasks done and to do, time, disk and memory. Does not run any stage.

Times are extrapolated from a probe of this machine and, if parts exist, from their times: estimates.
"""

from __future__ import annotations

import math
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from negpipe import ann, encoders, graph
from negpipe.ann import auto
from negpipe.ann.probe import Job
from negpipe.config.schema import Config
from negpipe.data import candidates
from negpipe.data.tables import documents
from negpipe.engine.shards import shard_of
from negpipe.engine.stage import Context, Stage, Task
from negpipe.engine.state import digests_of, look
from negpipe.errors import NegpipeError
from negpipe.plan.index_kinds import SEARCH_SHARE, Choice, Machine, choices, sample_of
from negpipe.plan.sample import Judge, draw
from negpipe.plan.variants import Variant, measured
from negpipe.select import deeper
from negpipe.stages import encode

_SAMPLE = 512  # maximum texts to time the encoder on
_DIMENSION = 384  # if still unknown
_SHARD_SECONDS = 3600  # target duration of a shard
_ROWS_SECOND = 150_000  # rows that the last stage writes per core and second; it rarely takes long


@dataclass(frozen=True)
class Step:
    """One stage: existing and missing parts (None: still unknown), remaining seconds, tokens to send to a server and
    their cost, a note, the error that would stop it, and its shards (None: it does not run in shards, or its time is
    unknown): those that Slurm would be sent, else of about an hour on machines like this one."""

    stage: str
    state: str
    done: int | None = None
    todo: int | None = None
    seconds: float | None = None
    disk: int | None = None
    tokens: int | None = None
    cost: float | None = None
    note: str = ""
    refusal: str = ""
    shards: int | None = None


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    Attributes:
        gflops: this machine's speed of comparing vectors.
        steps: the stages.
        choices: kinds of index; empty while the dimension of the vectors is unknown.
        encoding: ways to run the encoder; empty once vectors exist, and for precomputed vectors.
        free: free bytes on the disk.
    """

    gflops: float
    steps: tuple[Step, ...]
    choices: tuple[Choice, ...]
    encoding: tuple[Encoding, ...]
    free: int


@dataclass(frozen=True)
class Encoding:
    """A way to run the encoder, and the seconds it takes for all texts."""

    variant: Variant
    seconds: float


def plan(config: Config, *, probe_encoder: bool = True) -> Plan:
    """Check what is on disk, probe this machine, and estimate the rest.

    Args:
        config: the config of the run.
        probe_encoder: load the model to time it, if no part records its speed.
    """
    steps: list[Step] = []
    with digests_of(config) as digests:
        context = Context(config, config.run_dir, digests)
        waiting = []
        for stage in graph.stages(config).values():
            state = look(stage, context)
            if state.state == "current" and state.manifest:
                steps.append(Step(stage.name, "current", len(state.manifest.parts), 0, 0.0))
                context = context.after(stage, state.manifest)
            else:
                waiting.append((stage, state.state, context))
        read = "ingest" in context.manifests
        encoding = _encoding(context, probe_encoder) if read and "encode" not in context.manifests else _Speed()
        job = _job(context, encoding.dimension) if read else Job(0, 0, 0, 0)
        if job.dimension:
            config, _ = auto.decided(context.config, job.rows, job.dimension, job.anchors)
            context = replace(context, config=config)
        gflops = 2e-9 * ann.rate(float(job.rows) * job.anchors * job.dimension, job.dimension or _DIMENSION)
        gflops *= context.budget.threads * context.workers
        choices = _choices(context, job, gflops)
        chosen = next((choice for choice in choices if choice.kind == context.config.index.kind), None)
        for ahead, stands, then in waiting:
            step = _of_index(_step(ahead, stands, then, job, gflops, encoding), context.config, chosen)
            # Before ingest, encode's check would download the model, or read entire vector files.
            step = _checked(step, ahead, context, job) if read or ahead.name != "encode" else step
            steps.append(_divided(step, ahead, context.config))
        ways = tuple(Encoding(one, (job.rows + job.anchors) / one.speed / context.workers) for one in encoding.variants)
    return Plan(gflops, tuple(steps), choices, ways, shutil.disk_usage(_existing(config.store or config.run_dir)).free)


@dataclass(frozen=True)
class Known:
    """Facts from ingest and encode: sizes of the job (dimension 0: unknown), mean characters per text, positives per
    anchor; texts that a worker encodes per second (0: unknown), and the source of that speed."""

    documents: int
    anchors: int
    dimension: int
    text_bytes: float
    positives: float
    speed: float
    source: str


def known(config: Config, *, probe_encoder: bool = True) -> tuple[Config, Known | None]:
    """The config with settings resolved by complete stages, and the sizes; None before ingest."""
    with digests_of(config) as digests:
        context = Context(config, config.run_dir, digests)
        for stage in graph.stages(config).values():
            state = look(stage, context)
            if state.state != "current" or not state.manifest:
                break
            context = context.after(stage, state.manifest)
        if "ingest" not in context.manifests:
            return config, None
        ingest = context.manifest("ingest")
        encoding = _encoding(context, probe_encoder)
        job = _job(context, encoding.dimension)
        characters = sum(int(part.meta.get("characters", 0)) for part in documents(ingest))
        positives = ingest.stats["positives"] / max(1, job.anchors)
        per_worker = encoding.speed / encode.STAGE.within(context).workers
    return context.config, Known(
        job.rows, job.anchors, job.dimension, characters / max(1, job.rows), positives, per_worker, encoding.source
    )


def _existing(folder: Path) -> Path:
    """The folder, or its closest existing parent."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def _checked(step: Step, stage: Stage, context: Context, job: Job) -> Step:
    """The step with the error that would keep it from running, as far as it can be detected."""
    try:
        stage.examine(context)
        if stage.name == "encode" and job.dimension:
            encode.check_fits(stage.within(context), job.dimension)
    except NegpipeError as error:
        return replace(step, refusal=str(error))
    return step


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
    return len({shard_of(task.key, config.executor.slurm.shards) for task in missing})


def _of_index(step: Step, config: Config, chosen: Choice | None) -> Step:
    """The step with the cost of the configured kind of index, if it can be estimated."""
    approximate = config.index.approximate
    searching = "slices" if config.search.slice_documents else "search"
    if step.stage == "index" and step.todo != 0 and chosen:
        refusal = chosen.refusal if approximate else ""
        return replace(step, seconds=chosen.build, disk=chosen.disk, note=chosen.note, refusal=refusal)
    if step.stage == searching and chosen and not approximate:
        return replace(step, refusal=chosen.refusal)
    if step.stage == searching and approximate:
        note = step.note if step.seconds is None else f"no estimate for {config.index.kind}"
        return replace(step, seconds=chosen.search if chosen else None, note=chosen.note if chosen else note)
    return step


def _step(stage: Stage, state: str, context: Context, job: Job, gflops: float, encoding: _Speed) -> Step:
    if stage.name == "ingest":
        return Step(stage.name, state, note="reads the source; the other stages can be planned after it")
    if stage.kind == "ingest":
        return Step(stage.name, state, note="reads the source again, for the held-out split")
    if "ingest" not in context.manifests:
        return Step(stage.name, state, note="waiting for ingest")
    rows, anchors, dimension = job.rows, job.anchors, job.dimension
    if any(name not in context.manifests for name in stage.inputs):
        done, todo, left = None, None, rows + anchors
    else:
        tasks = list(stage.plan(stage.within(context)))
        books = context.books(stage.name)
        missing = [task for task in tasks if books.part(task.key) is None]
        done, todo, left = len(tasks) - len(missing), len(missing), sum(task.rows for task in missing)
    step = Step(stage.name, state, done, todo, shards=_sent(stage, context.config, missing) if todo else None)
    if stage.name == "encode":
        speed = encoding.speed
        seconds = left / speed if speed else None
        note = f"{left:,} texts at {speed:,.0f} per second, {encoding.source}" if speed else f"{left:,} texts"
        note += ", minus cached texts" if context.config.encoder.cache else ""
        step = replace(step, seconds=seconds, disk=_bytes(left, dimension, context.config), note=note)
        return _priced(step, stage.within(context), missing) if todo else step
    if stage.name == "search" and context.config.search.slice_documents:
        return replace(step, disk=anchors * job.depth * candidates.BYTES, note="merges the results of the slices")
    if stage.name in ("slices", "search") and dimension:
        flops = 2.0 * rows * anchors * dimension
        share = 1.0 if todo is None else left / max(1, anchors)
        seconds, disk = flops / gflops / 1e9 / SEARCH_SHARE, anchors * job.depth * candidates.BYTES
        if stage.name == "slices" and done is not None and todo is not None:
            share, disk = todo / max(1, done + todo), 8 * job.depth * left  # one key per nearest document
            return replace(step, seconds=share * seconds, disk=disk, note="exact search")
        return replace(step, seconds=share * seconds, disk=int(share * disk), note="exact search")
    if stage.name == "triplets":
        made = anchors * context.config.mining.wanted
        deepest = deeper.limit(context.config, rows)
        more = f"; anchors short of negatives are searched again, to depth {deepest:,} (not counted)" if deepest else ""
        return replace(step, seconds=made / _ROWS_SECOND, note=f"{made:,} negatives at most{more}")
    if stage.name == "train":
        return replace(step, note="its first steps show how long it takes")
    return step


def _priced(step: Step, context: Context, missing: list[Task]) -> Step:
    """The step with the tokens to send to a server, if there is one."""
    encoder = context.config.encoder
    if encoder.backend != "http" or not encoder.http:
        return step
    tokens, price = encode.estimated_tokens(context, missing), encoder.http.price
    note = f"{step.note}; about {tokens:,} tokens (a quarter of the bytes)"
    if price is None:
        return replace(step, tokens=tokens, note=note)
    return replace(step, tokens=tokens, cost=tokens * price / 1e6, note=f"{note}, {encode.cost_of(tokens, price)}")


def _job(context: Context, dimension: int) -> Job:
    """Sizes of the search; the dimension is 0 if still unknown."""
    ingest = context.manifest("ingest")
    rows = sum(part.rows for part in documents(ingest))
    anchors = sum(part.rows for part in ingest.of_kind("anchors"))
    if "encode" in context.manifests:
        dimension = context.manifest("encode").stats["dimension"]
    return Job(rows, dimension, anchors, min(context.config.depth, rows))


def _bytes(rows: int, dimension: int, config: Config) -> int | None:
    return rows * dimension * np.dtype(config.encoder.storage).itemsize if dimension else None


@dataclass(frozen=True)
class _Speed:
    """Texts per second, the source of that, the dimension of their vectors (0: unknown), and other timings."""

    speed: float = 0.0
    source: str = ""
    dimension: int = 0
    variants: tuple[Variant, ...] = ()


def _encoding(context: Context, probe: bool) -> _Speed:
    context = encode.STAGE.within(context)
    config = context.config
    made = [part for part in encode.made_of(context) if encode.encoded(part) == part.rows]
    seconds = sum(float(part.provenance.get("seconds", 0)) for part in made)
    if seconds:
        speed = sum(part.rows for part in made) / seconds * context.workers
        return _Speed(speed, "measured on existing parts", int(made[0].meta["dimension"]))
    if config.encoder.backend == "precomputed":
        return _Speed(dimension=encode.brought_dimension(context))
    if config.encoder.backend == "http":  # timing it would mean sending texts
        return _Speed(dimension=config.encoder.truncate_dim or 0)
    if not probe:
        return _Speed()
    sample = draw(context, _SAMPLE)
    asked = [*zip(sample.anchors["text"].to_pylist(), sample.complete.tolist(), strict=True)]
    model = encoders.resolve_model(config.encoder, context.digest_file)
    budget, outcome = context.on(context.devices()[0]).budget, None
    with suppress(NegpipeError):  # reported for the stage that it would stop
        outcome = Judge(context, sample).outcome
    variants = measured(config.encoder, model.path, sample.texts, budget, asked, outcome)
    own = variants[0]
    source = f"measured on {own.texts} of them"
    return _Speed(own.speed * context.workers, source, own.dimension, tuple(variants))


def _choices(context: Context, job: Job, gflops: float) -> tuple[Choice, ...]:
    if not job.dimension:
        return ()
    largest = max(part.rows for part in context.manifest("ingest").of_kind("anchors"))
    sample = None
    if "encode" in context.manifests:
        parts = documents(context.manifest("encode"))
        sample = sample_of(ann.open_parts([context.path(part, "vectors") for part in parts]), context.config.seed)
    machine = Machine(gflops * 5e8, context.workers, context.budget)
    return tuple(choices(context.config, job, sample, largest, machine))
