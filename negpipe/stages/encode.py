"""encode: texts → vectors, one .npy part per part of texts.

A part depends on its texts in order and on the settings that affect them: passages do not depend on the query
instruction, nor anchors on the passage length. Vectors are checked before they are stored: no NaN, no infinity, no zero
vector, one dimension throughout. With `encoder.cache` they depend, within rounding, on what the cache held; vectors
computed in another way, or with other versions of the libraries, are not taken from it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from negpipe import ann, encoders
from negpipe.ann import auto
from negpipe.config.encoder import Encoder
from negpipe.config.schema import Config
from negpipe.data import candidates
from negpipe.data.tables import open_table, texts
from negpipe.encoders import prompts, server
from negpipe.encoders.blocks import ComputedVectors, PrecomputedVectors, kind_of
from negpipe.encoders.precomputed import VectorFile, dimension_of
from negpipe.encoders.vectors import check_width, refused, short, usable
from negpipe.engine import devices, versions
from negpipe.engine.fingerprint import digest, key
from negpipe.engine.manifest import Manifest, Part
from negpipe.engine.stage import Context, Made, Needs, Progress, Publisher, Stage, Task, Workload
from negpipe.errors import BudgetError, InputError, NegpipeError, count_of
from negpipe.sources import remote
from negpipe.stages import defects, headers
from negpipe.store.files import BOOKS

if TYPE_CHECKING:
    from negpipe.encoders.cache import VectorCache

logger = logging.getLogger(__name__)

VERSION = 1
_NOT_IDENTITY = {"model", "revision", "device", "devices", "corpus_vectors", "anchor_vectors", "cache_size", "http"}
_NOT_IDENTITY |= {"query_prompt_name", "passage_prompt_name"}  # the chosen prompts are in `_sources`
# Not part of a cached vector's identity:
_OF_A_PART = {f"encoder.{name}" for name in ("batch_size", "batch_tokens", "call_texts", "storage", "cache")}
_PRECOMPUTED = {"backend", "normalize", "storage", "truncate_dim"}
_SERVED = _PRECOMPUTED | {"model", "cache", "query_instruction", "query_instruction_format"}
_SERVED |= {"passage_instruction", "passage_instruction_format"}
_OF_SERVER = {"api", "answers_as"}  # not the size of requests: servers form batches as they like
_LIBRARIES_BYTES = 350 * 2**20  # of a worker besides the model, not shared with others: torch and the model's library
_READ = 64  # bytes per number of a server's answer: digits, Python float, queued float32


def _settings(config: Config) -> dict[str, Any]:
    encoder = config.encoder
    if encoder.runs_here:
        values = encoder.model_dump(mode="json", exclude=_NOT_IDENTITY)
    else:
        values = encoder.model_dump(mode="json", include=_SERVED if encoder.backend == "http" else _PRECOMPUTED)
    if encoder.backend == "http" and encoder.http:
        known = encoder.http.model_dump(mode="json", include=_OF_SERVER, exclude_none=True)
        values |= {f"http.{name}": value for name, value in known.items()}
    # Defaults are omitted, as before these settings existed.
    if encoder.truncate_dim is None:
        del values["truncate_dim"]
    if encoder.runtime == "torch":
        values.pop("runtime", None)
    for name in ("batch_tokens", "attention"):
        if getattr(encoder, name) is None:
            values.pop(name, None)
    if values.pop("cache", None) is not None:
        values["cache"] = True
    return {f"encoder.{name}": value for name, value in values.items()}


def _settings_of(config: Config, kind: str) -> dict[str, Any]:
    """The settings that can change a part of this kind."""
    other = "encoder.passage_" if kind == "anchors" else "encoder.query_"
    return {name: value for name, value in _settings(config).items() if not name.startswith(other)}


def _sources(context: Context) -> dict[str, str]:
    encoder = context.config.encoder
    if encoder.runs_here:
        model = encoders.resolve_model(encoder, context.digest_file)
        own = prompts.of_the_model(encoder, model.path)
        return {"encoder.model": model.digest} | {f"encoder.{name}": value for name, value in own.items()}
    if encoder.backend == "http":  # only the model's name, a setting, is known
        return {}
    corpus, anchors = (_brought(context, name) for name in ("corpus_vectors", "anchor_vectors"))
    return context.digest_of("encoder.corpus_vectors", corpus) | context.digest_of("encoder.anchor_vectors", anchors)


def _brought(context: Context, setting: str) -> Path:
    """The vector file that an `encoder` setting names, or its copy in the run directory."""
    return remote.here(getattr(context.config.encoder, setting), context.run_dir / BOOKS / "vectors")


def _check(context: Context) -> None:
    """Check model or vectors, batches and devices before the source is read, and whether the vectors fit once there are
    some. Nothing is sent to a server.
    """
    encoder = context.config.encoder
    encoders.check_installed(encoder.runtime)
    _sources(context)
    if encoder.runs_here:
        encoders.check_tokens(encoder, encoders.resolve_model(encoder, context.digest_file).path)
        _check_devices(context)
    if encoder.backend == "http":
        server.check(encoder, context.workers)
    if "ingest" not in context.manifests:
        return
    if encoder.backend == "precomputed":
        check_fits(context, brought_dimension(context))
    elif made := next(made_of(context), None):
        check_fits(context, int(made.meta["dimension"]))


def _check_devices(context: Context) -> None:
    """Check that every device supports the precision and has memory for the models of the workers that share it.

    Raises:
        ConfigError: a device does not support it.
        BudgetError: a device does not have the memory.
    """
    encoder, names = context.config.encoder, context.devices()
    for name in names:
        encoders.check_precision(encoder.precision, name, "encoder.precision")
        encoders.check_attention(encoder, name)
    if context.config.executor.kind == "ray":  # the devices of its nodes are unknown here
        return
    folder = Path(encoders.resolve_model(encoder, context.digest_file).path)
    halved = encoder.precision != "float32" and encoder.runtime == "torch"  # other runtimes start from torch's float32
    model = encoders.parameters(folder) * (2 if halved else 4)
    shared = Counter(devices.same(names[number % len(names)]) for number in range(context.workers))
    for name, workers in shared.items():
        libraries = _LIBRARIES_BYTES if workers > 1 and not devices.is_gpu(name) else 0
        each, there = model + libraries, devices.memory(name)
        needed = workers * each
        if needed > there:
            fewer = f"{there // each} of them fit: lower executor.workers" if there > each else "use another device"
            raise BudgetError(
                f"encoder.model takes {each // 2**20:,} MiB per worker{', libraries included' if libraries else ''},"
                f" {workers} workers take {needed // 2**20:,} MiB of {name}, which has {there // 2**20:,} MiB; {fewer}",
                needed=needed,
                there=there,
                remedy=fewer,
            )


def _plan(context: Context) -> Iterator[Task]:
    if context.config.encoder.trust_remote_code:
        logger.warning("encoder.trust_remote_code is on: code shipped with the model runs with your permissions")
    if context.config.encoder.runs_here:
        _tell_prompts(context)
        if (runtime := context.config.encoder.runtime) != "torch":
            logger.info("encode: the model is first exported for %s, for a minute or more, if it never was", runtime)
    yield from _tasks(context)


def _tell_prompts(context: Context) -> None:
    """Log the model's prompts before hours are spent on encoding."""
    encoder = context.config.encoder
    folder = encoders.resolve_model(encoder, context.digest_file).path
    for name, value in prompts.of_the_model(encoder, folder).items():
        logger.info("encode: the model's own %s: %r", name.replace("_", " "), value)
    for sentence in prompts.unused(encoder, folder):
        logger.warning("encode: %s", sentence)


def made_of(context: Context) -> Iterator[Part]:
    """The existing parts with rows."""
    books = context.own
    return (part for task in _tasks(context) if (part := books.part(task.key)) and part.rows)


def _tasks(context: Context) -> Iterator[Task]:
    sources = _sources(context)
    precomputed = context.config.encoder.backend == "precomputed"
    made_with = versions.installed(_libraries(context.config))
    settings_of = cache(partial(_settings_of, context.config))
    for part in texts(context.manifest("ingest")):
        role = "anchors" if part.kind == "anchors" else "passages"
        settings, payload = settings_of(part.kind), {"part": part.file("table").path}
        if precomputed:
            vectors = "encoder.anchor_vectors" if part.kind == "anchors" else "encoder.corpus_vectors"
            input_digest = [sources[vectors], part.meta["source_rows"]]
        else:
            own = (f"encoder.{kind_of(part)}_prompt", "encoder.routes")
            decided = [sources[name] for name in own if name in sources]
            input_digest = [sources.get("encoder.model"), part.meta["texts"], *decided]
            if context.config.encoder.cache is not None:
                alike = {name: value for name, value in settings.items() if name not in _OF_A_PART}
                payload["space"] = digest(VERSION, role, alike, sources.get("encoder.model"), decided, made_with)
        yield Task(key("encode", VERSION, role, settings, input_digest), part.kind, part.rows, payload)


def brought_dimension(context: Context) -> int:
    """Dimension of the user's vectors, truncated as configured.

    Raises:
        ConfigError: they have fewer dimensions than that.
    """
    encoder = context.config.encoder
    width = dimension_of(_brought(context, "corpus_vectors"), "encoder.corpus_vectors", context.budget)
    check_width(width, encoder.truncate_dim)
    return encoder.truncate_dim or width


def _open_brought(context: Context, setting: str, rows: str) -> VectorFile:
    """The file of an `encoder` setting, whose source rows ingest counted under the name `rows`."""
    path = _brought(context, setting)
    return VectorFile(path, context.manifest("ingest").stats[rows], f"encoder.{setting}", context.budget)


@contextmanager
def _open(context: Context) -> Iterator[ComputedVectors | PrecomputedVectors]:
    config = context.config.encoder
    if config.backend == "precomputed":
        corpus, anchors = (
            _open_brought(context, name, rows)
            for name, rows in (("corpus_vectors", "source_documents"), ("anchor_vectors", "source_queries"))
        )
        if corpus.dimension != anchors.dimension:
            raise InputError(
                f"{anchors.path} has vectors of dimension {anchors.dimension}, {corpus.path} of {corpus.dimension}",
                field="encoder.anchor_vectors",
                remedy="Compute both with the same model",
            )
        yield PrecomputedVectors(corpus, anchors, config.truncate_dim, {}, lambda dimension: None)
    elif config.http and config.backend == "http":
        with server.opened(config, context.workers) as served:
            _check_same(context, served)
            with _cache(config) as kept:
                fits = cache(partial(check_fits, context))
                yield ComputedVectors(served, served.provenance, fits, kept, served.check_unchanged)
    else:
        model = encoders.resolve_model(config, context.digest_file)
        budget = context.budget
        encoder = encoders.load(config, model.path, budget.threads, budget.device)
        provenance = encoders.provenance(config, budget.device)
        with _cache(config) as kept:
            yield ComputedVectors(encoder, provenance, cache(partial(check_fits, context)), kept)


def _cache(config: Encoder) -> AbstractContextManager[VectorCache | None]:
    if config.cache is None:
        return nullcontext()
    from negpipe.encoders.cache import VectorCache  # local import, as Python may have been built without SQLite

    return closing(VectorCache(config.cache, config.cache_size))


def _check_same(context: Context, served: encoders.TextEncoder) -> None:
    """If parts exist, check that the server still has their model: the first text of one gets the same vector.

    Raises:
        InputError: it has another model.
    """
    books = context.own
    known = ((task, part) for task in _tasks(context) if (part := books.part(task.key)) and part.rows)
    for task, part in islice(known, 1):
        table = open_table(context.store.path(task.payload["part"]))
        before = ann.open_parts([context.path(part, "vectors")]).take(np.array([0]))[0]
        (now,) = served.encode(table["text"].slice(0, 1).to_pylist(), kind_of(task), lambda rows, tokens: None)
        if server.differs(now[0], before):
            raise InputError(
                f"the server's vector of {task.kind} {table['id'][0].as_py()!r} differs from the stored one,"
                f" {part.file('vectors').path}: it serves another model, or runs it differently",
                field="encoder.model",
                remedy="Serve the model that was served before, or give the new one another name",
            )


def _run(
    task: Task, shared: ComputedVectors | PrecomputedVectors, context: Context, publish: Publisher, progress: Progress
) -> Made:
    config = context.config.encoder
    table = open_table(context.store.path(task.payload["part"]))
    meta: dict[str, Any] = {}
    stored: npt.NDArray[Any] | None = None
    for rows, vectors in shared.blocks(task, table, meta, progress):
        if stored is None:
            shared.check(vectors.shape[1])
            stored = np.empty((table.num_rows, vectors.shape[1]), config.storage)
        if vectors.shape[1] != stored.shape[1]:
            raise InputError(
                f"the model gives vectors of dimension {vectors.shape[1]}, the cache {stored.shape[1]}",
                field="encoder.cache",
                remedy="Check which model the server runs, or use another folder",
            )
        with np.errstate(all="ignore"):
            stored[rows] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if config.normalize else vectors
        here = stored[rows]
        bad = np.flatnonzero(~(usable(here) & short(here)))
        if len(bad):
            at, row = int(bad[0]), int(rows[bad[0]])
            place = shared.place(task, table.slice(row, 1)) if isinstance(shared, PrecomputedVectors) else {}
            whose = f"the vector of {'anchor' if task.kind == 'anchors' else 'document'} {table['id'][row].as_py()!r}"
            raise refused(whose, vectors[at : at + 1], config, place)
    assert stored is not None
    publish("vectors", ".npy", partial(ann.write_part, stored), needed=stored.nbytes)
    return Made(len(stored), meta | {"dimension": int(stored.shape[1])}, dict(shared.provenance))


def check_fits(context: Context, dimension: int) -> None:
    """Check that the largest part fits into memory, and that vectors and search results fit onto the disk.

    Raises:
        ConfigError, StorageError: they do not fit.
    """
    config = context.config
    block, held = _held(config.encoder)
    parts = texts(context.manifest("ingest"))
    row = dimension * np.dtype(config.encoder.storage).itemsize

    def needs(part: Part) -> int:
        """Bytes held: its texts, its stored vectors, and a block of vectors with its scaled copy."""
        return 2 * part.file("table").bytes + part.rows * row + min(block or part.rows, part.rows) * dimension * held

    largest = max(parts, key=needs)
    context.budget.require(
        needs(largest),
        f"encoding a part of {largest.rows:,} rows (texts and vectors)",
        "lower data.part_rows or executor.workers",
    )
    books = context.own
    left = [task for task in _tasks(context) if books.part(task.key) is None]
    rows, anchors = (sum(part.rows for part in parts if (part.kind == "anchors") is asks) for asks in (False, True))
    same = all(task.kind == "anchors" for task in left)  # then the results of the other anchors stay valid
    searching = sum(task.rows for task in left) if same else anchors
    needed = {
        "encode": row * sum(task.rows for task in left),
        "index": 4 * rows * dimension if config.index.kind == "flat" and not same else 0,
        "search": candidates.BYTES * searching * min(config.depth, rows),
    }
    remedy = "move run_dir or store to a larger disk"
    context.store.check_room(needed, "vectors and search results take about", remedy)


def _needs(context: Context, work: Workload) -> Needs:
    encoder, left, dimension = context.config.encoder, work.left, work.dimension
    speed = work.speed and work.speed * context.workers
    note = count_of(left, "text") + (f" at {speed:,.0f} per second, {work.source}" if speed else "")
    needs = Needs(left / speed if speed else None, note=note + (", minus cached texts" if encoder.cache else ""))
    if work.missing and encoder.backend == "http" and encoder.http:
        needs = _priced(needs, _estimated_tokens(context, work.missing), encoder.http.price)
    if not dimension:
        return needs
    needs = replace(needs, disk=left * dimension * np.dtype(encoder.storage).itemsize)
    try:
        check_fits(context, dimension)
    except NegpipeError as error:
        return replace(needs, refusal=str(error))
    return needs


def _priced(needs: Needs, tokens: int, price: float | None) -> Needs:
    """The tokens for a server, and their cost if there is a price."""
    note = f"{needs.note}; about {tokens:,} tokens (a quarter of the bytes)"
    if price is None:
        return replace(needs, tokens=tokens, note=note)
    return replace(needs, tokens=tokens, cost=tokens * price / 1e6, note=f"{note}, {cost_of(tokens, price)}")


def _held(encoder: Encoder) -> tuple[int | None, int]:
    """Rows computed at a time (None: the entire part) and bytes per number: float32, twice."""
    if encoder.backend == "precomputed":
        return None, 8
    if encoder.http and encoder.backend == "http":  # as sent, and as Python reads them
        return encoder.http.concurrency * encoder.http.batch_texts, _READ
    return encoder.call_size, 8


def _stats(context: Context, parts: list[Part]) -> dict[str, Any]:
    dimensions = {part.meta["dimension"] for part in parts}
    if len(dimensions) > 1:
        raise InputError(f"vectors have different dimensions: {sorted(dimensions)}", remedy="Use one model for all")
    stats: dict[str, Any] = {"texts": sum(part.rows for part in parts), "dimension": dimensions.pop()}
    for name in ("tokens", "differing_duplicates"):
        if any(name in part.meta for part in parts):
            stats[name] = sum(part.meta.get(name, 0) for part in parts)
    if any("cached" in part.meta for part in parts):
        troubles = dict.fromkeys(trouble for part in parts for trouble in part.meta.get("cache_troubles", ()))
        stats["cached"] = {"texts": sum(map(defects.cached, parts)), "of": stats["texts"], "troubles": [*troubles]}
    encoder = context.config.encoder
    sides = {
        "documents": ([part for part in parts if part.kind != "anchors"], encoder.passage_max_length),
        "anchors": ([part for part in parts if part.kind == "anchors"], encoder.query_max_length),
    }
    cut = {
        side: defects.cut(own, length)
        for side, (own, length) in sides.items()
        if any("cut" in part.meta for part in own)
    }
    own = {name.removeprefix("encoder."): text for name, text in _sources(context).items() if name.endswith("_prompt")}
    known = {"prompts": own, "cut": cut, "equal": defects.equal(context, sides["documents"][0])}
    known["sent"] = _told(encoder, parts, stats.get("tokens", 0))
    return stats | {name: value for name, value in known.items() if value}


def _told(encoder: Encoder, parts: list[Part], tokens: int) -> dict[str, Any]:
    """A server's tokens: whether it counted them, and what they cost."""
    if encoder.backend != "http" or not encoder.http:
        return {}
    estimated = any(part.provenance.get("tokens") == server.ESTIMATED for part in parts)
    price = encoder.http.price
    return {"tokens": tokens, "estimated": estimated, "price": price, "cost": price and tokens * price / 1e6}


def _estimated_tokens(context: Context, tasks: Iterable[Task]) -> int:
    """Estimated tokens that tasks would send to a server, from the bytes of their texts."""
    total = 0
    for task in tasks:
        texts = open_table(context.store.path(task.payload["part"]))["text"]
        bytes_of = pc.binary_length(texts).to_numpy() + server.overhead(context.config.encoder, kind_of(task))
        total += int(server.estimated_tokens(bytes_of).sum())
    return total


def cost_of(tokens: int, price: float) -> str:
    """The cost of tokens, in words."""
    return f"cost {tokens * price / 1e6:,.4g} at {price:g} per million"


def _remarks(stats: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    if sent := stats.get("sent"):
        counted_by = "estimated, as it reports none" if sent["estimated"] else "by its own count"
        cost = f", {cost_of(sent['tokens'], sent['price'])}" if sent["price"] else ""
        yield logging.INFO, f"the server read {sent['tokens']:,} tokens for these vectors, {counted_by}{cost}"
    for one in defects.of(stats):
        yield logging.WARNING if one.many else logging.INFO, f"{one.problem}: {one.remedy}"
    if sentence := defects.from_cache(stats):
        yield logging.INFO, sentence
        yield from ((logging.WARNING, trouble) for trouble in stats["cached"]["troubles"])


def _devices(config: Config) -> tuple[str, ...]:
    """The encoder's devices if torch runs it, else the CPU."""
    encoder = config.encoder
    return devices.of_encoder(config) if encoder.runs_here and encoder.runtime == "torch" else (devices.CPU,)


def _libraries(config: Config) -> tuple[str, ...]:
    return encoders.libraries(config.encoder) if config.encoder.runs_here else ("numpy",)


def _settle(config: Config, manifest: Manifest) -> tuple[Config, str]:
    """Resolve `index.kind: auto`, now that the sizes are known."""
    rows, anchors = (
        sum(part.rows for part in manifest.parts if (part.kind == "anchors") is asks) for asks in (False, True)
    )
    return auto.decided(config, rows, manifest.stats["dimension"], anchors)


STAGE = Stage(
    name="encode",
    version=VERSION,
    inputs=("ingest",),
    settings=_settings,
    sources=_sources,
    plan=_plan,
    open=_open,
    run=_run,
    settle=_settle,
    remarks=_remarks,
    misfit=headers.misfit,
    libraries=_libraries,
    stats=_stats,
    check=_check,
    fetches=True,
    needs=_needs,
    devices=_devices,
    place=lambda config: "apart" if config.encoder.runs_here else "worker",
    unit="texts",
)
