"""What a run would do, before it does it: tasks done and to do, time, disk and memory. Runs no stage.

Times are extrapolated from a probe of this machine and, where parts were made before, from what those took: right
within a factor of two, not to the second.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from negpipe import ann, encoders, kinds
from negpipe.config import Config
from negpipe.manifest import Books, Part
from negpipe.stage import Context, Stage
from negpipe.stages import STAGES
from negpipe.state import digests_of, look
from negpipe.tables import documents, open_table

_PROBE_TEXTS = 64
_DIMENSION = 384  # where it is not known yet
_SEARCH_SHARE = 0.75  # of the speed of comparing, the rest is exact scores and merging
_ROWS_SECOND = 150_000  # rows the last stage writes, a core and second; it is seldom what takes long


@dataclass(frozen=True)
class Step:
    """One stage: parts there and to make (None: not known yet), seconds to go, and what is to be said of it."""

    stage: str
    state: str
    done: int | None = None
    todo: int | None = None
    seconds: float | None = None
    disk: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Choice:
    """One kind of index: bytes on disk, working memory it needs, seconds to build and to search."""

    kind: str
    disk: int
    memory: int
    build: float
    search: float
    note: str


@dataclass(frozen=True)
class Plan:
    """What a run would do; `choices` are empty until the source has been read."""

    gflops: float
    steps: tuple[Step, ...]
    choices: tuple[Choice, ...]


def plan(config: Config, *, probe_encoder: bool = True) -> Plan:
    """Look at what is on disk, probe this machine, and estimate the rest.

    Args:
        config: what a run would make.
        probe_encoder: load the model to time it, where no part tells its speed.
    """
    steps: list[Step] = []
    with digests_of(config) as digests:
        context = Context(config, config.run_dir, digests)
        waiting = []
        for stage in STAGES.values():
            state = look(stage, context)
            if state.state == "current" and state.manifest:
                steps.append(Step(stage.name, "current", len(state.manifest.parts), 0, 0.0))
                context = context.after(state.manifest)
            else:
                waiting.append((stage, state.state, context))
        gflops = _gflops(context)
        choices = _choices(context, gflops)
        chosen = next((choice for choice in choices if choice.kind == context.config.index.kind), None)
        steps += [_of_index(_step(*each, gflops, probe_encoder), context.config, chosen) for each in waiting]
    return Plan(gflops, tuple(steps), choices)


def _of_index(step: Step, config: Config, chosen: Choice | None) -> Step:
    """A step with what the configured kind of index costs, where that can be said."""
    if step.stage == "index" and step.todo != 0 and chosen:
        return replace(step, seconds=chosen.build, disk=chosen.disk, note=chosen.note)
    if step.stage == "search" and config.index.approximate:
        note = f"no estimate for {config.index.kind}" if chosen is None else chosen.note
        return replace(step, seconds=chosen.search if chosen else None, note=note)
    return step


def _gflops(context: Context) -> float:
    """GFLOP/s at which this machine compares anchors with documents; a multiplication and an addition are two."""
    rows, anchors, dimension = _sizes(context) if "ingest" in context.manifests else (0, 0, 0)
    dimension = dimension or _DIMENSION
    return 2e-9 * ann.rate(float(rows) * anchors * dimension, dimension) * context.threads * context.workers


def _step(stage: Stage, state: str, context: Context, gflops: float, probe_encoder: bool) -> Step:
    if stage.name == "ingest":
        return Step(stage.name, state, note="reads the source; afterwards the plan knows the rest")
    if "ingest" not in context.manifests:
        return Step(stage.name, state, note="waits for ingest")
    rows, anchors, dimension = _sizes(context)
    if any(name not in context.manifests for name in stage.inputs):
        done, todo, left = None, None, rows + anchors
    else:
        tasks = list(stage.plan(replace(context, key="")))
        books = Books(context.run_dir, stage.name)
        missing = [task for task in tasks if books.part(task.key) is None]
        done, todo, left = len(tasks) - len(missing), len(missing), sum(task.rows for task in missing)
    step = Step(stage.name, state, done, todo)
    if stage.name == "encode":
        speed, source = _encoding(context, probe_encoder)
        seconds = left / speed if speed else None
        note = f"{left:,} texts at {speed:,.0f} a second, {source}" if speed else f"{left:,} texts"
        return replace(step, seconds=seconds, disk=_bytes(left, dimension, context.config), note=note)
    if stage.name == "search" and dimension:
        flops = 2.0 * rows * anchors * dimension
        disk = anchors * min(context.config.depth, rows) * 12
        return replace(step, seconds=flops / gflops / 1e9 / _SEARCH_SHARE, disk=disk, note="searched exactly")
    if stage.name == "triplets":
        made = anchors * context.config.mining.wanted
        return replace(step, seconds=made / _ROWS_SECOND, note=f"{made:,} negatives at most")
    return step


def _sizes(context: Context) -> tuple[int, int, int]:
    """Documents, anchors, and the dimension of their vectors, 0 where nothing tells it yet."""
    ingest = context.manifest("ingest")
    rows = sum(part.rows for part in documents(ingest))
    anchors = sum(part.rows for part in ingest.of_kind("anchors"))
    made = context.manifests.get("encode")
    known = [made.stats["dimension"]] if made else [part.meta["dimension"] for part in _made(context, "encode")]
    return rows, anchors, int(known[0]) if known else 0


def _made(context: Context, stage: str) -> list[Part]:
    return [part for part in Books(context.run_dir, stage).parts() if part.rows]


def _bytes(rows: int, dimension: int, config: Config) -> int | None:
    return rows * dimension * np.dtype(config.encoder.storage).itemsize if dimension else None


def _encoding(context: Context, probe: bool) -> tuple[float, str]:
    """Texts a second, and how that is known; 0 where it is not."""
    config = context.config
    made = _made(context, "encode")
    seconds = sum(float(part.provenance.get("seconds", 0)) for part in made)
    if seconds:
        return sum(part.rows for part in made) / seconds * context.workers, "as the parts that are there took"
    if config.encoder.backend == "precomputed" or not probe:
        return 0.0, ""
    part = documents(context.manifest("ingest"))[0]
    texts = open_table(context.run_dir / part.path)["text"].slice(0, _PROBE_TEXTS).to_pylist()
    model = encoders.resolve_model(config.encoder, context.digest_file)
    encoder = encoders.load(config.encoder, model.path, context.threads)
    list(encoder.encode(texts[:8], "passage", lambda rows, tokens: None))
    started = time.perf_counter()
    list(encoder.encode(texts, "passage", lambda rows, tokens: None))
    return len(texts) / (time.perf_counter() - started) * context.workers, f"as {len(texts)} of them took just now"


def _choices(context: Context, gflops: float) -> tuple[Choice, ...]:
    if "ingest" not in context.manifests:
        return ()
    rows, anchors, dimension = _sizes(context)
    if not dimension:
        return ()
    depth = min(context.config.depth, rows)
    memory = min(context.config.resources.memory_budget, anchors * depth * 20 + 2 * 131072 * 4 * dimension)
    rate = gflops * 1e9 * _SEARCH_SHARE
    exact = 2.0 * rows * anchors * dimension / rate
    vectors = rows * dimension * 4
    automatic, reason = kinds.choose(rows, dimension, anchors, depth)
    choices = [
        Choice("stream", 0, memory, 0.0, exact, "exact, no second copy"),
        Choice("flat", vectors, memory, vectors / 5e8, exact, "exact, and a file for faiss.read_index"),
    ]
    for name, lists, trained, share in kinds.options(rows, depth):
        flops = 2.0 * dimension * (trained * lists * 10 + rows * lists + rows * min(anchors, 1000))
        search = exact * (share + kinds.FIXED)
        disk = vectors + rows * 8
        choices.append(Choice(name, disk, max(memory, 2**28 * 3), flops / rate, search, "recall is measured"))
    chosen = f"; what auto chooses: {reason}"
    return tuple(replace(one, note=one.note + chosen) if one.kind == automatic else one for one in choices)
