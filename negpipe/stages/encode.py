"""encode: texts → vectors, one .npy part for each part of texts.

A part depends on its texts in order and on the settings that touch it: passages do not know the query
instruction, nor anchors the passage length. Vectors are checked before they are stored: no NaN, no
infinity, no zero vector, one dimension throughout. With `encoder.cache` they depend, within rounding, on what
that held; what was made in another way, or by other versions of the libraries, is not taken from there.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
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
from negpipe.encoders.cuts import percent
from negpipe.encoders.precomputed import VectorFile, dimension_of
from negpipe.encoders.vectors import NOT_EXACT, check_width, truncated
from negpipe.engine import devices, versions
from negpipe.engine.fingerprint import digest, key
from negpipe.engine.manifest import Manifest, Part
from negpipe.engine.stage import Context, Made, Progress, Publisher, Stage, Task
from negpipe.errors import BudgetError, InputError
from negpipe.sources import remote
from negpipe.stages import headers
from negpipe.store.files import BOOKS

if TYPE_CHECKING:
    from negpipe.encoders.cache import Cache

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
Block = tuple[npt.NDArray[np.intp], Floats]
"""Offsets of some texts in their part, and their vectors, (m, d)."""

VERSION = 1
_NOT_IDENTITY = {"model", "revision", "device", "devices", "corpus_vectors", "anchor_vectors", "cache_size", "http"}
_NOT_IDENTITY |= {"query_prompt_name", "passage_prompt_name"}  # what they choose is in `_sources`
# Not of a cached vector:
_OF_A_PART = {f"encoder.{name}" for name in ("batch_size", "batch_tokens", "call_texts", "storage", "cache")}
_PRECOMPUTED = {"backend", "normalize", "storage", "truncate_dim"}
_SERVED = _PRECOMPUTED | {"model", "cache", "query_instruction", "query_instruction_format"}
_SERVED |= {"passage_instruction", "passage_instruction_format"}
_OF_SERVER = {"api", "answers_as"}  # not the size of requests: servers put batches together as they like
_NEAR = 0.05  # of its length, that a vector may move: a server's kernels depend on what else is in a batch
_READ = 64  # bytes of a number of a server's answer: its digits, a float of Python, a float32 waiting for its turn
_COUNTED, _BLOCK = 2**22, 1024  # vectors whose hashes are held, and vectors that are read at a time
_MANY = 0.1  # share of tokens lost, or of documents with the vector of another, that is warned of


def _settings(config: Config) -> dict[str, Any]:
    encoder = config.encoder
    if encoder.runs_here:
        values = encoder.model_dump(mode="json", exclude=_NOT_IDENTITY)
    else:
        values = encoder.model_dump(mode="json", include=_SERVED if encoder.backend == "http" else _PRECOMPUTED)
    if encoder.backend == "http" and encoder.http:
        known = encoder.http.model_dump(mode="json", include=_OF_SERVER, exclude_none=True)
        values |= {f"http.{name}": value for name, value in known.items()}
    # As before there were such settings.
    if encoder.truncate_dim is None:
        del values["truncate_dim"]
    if encoder.runtime == "torch":
        values.pop("runtime", None)
    if encoder.batch_tokens is None:
        values.pop("batch_tokens", None)
    if values.pop("cache", None) is not None:
        values["cache"] = True
    return {f"encoder.{name}": value for name, value in values.items()}


def _settings_of(config: Config, kind: str) -> dict[str, Any]:
    """The slice that can change a part of this kind."""
    other = "encoder.passage_" if kind == "anchors" else "encoder.query_"
    return {name: value for name, value in _settings(config).items() if not name.startswith(other)}


def _sources(context: Context) -> dict[str, str]:
    encoder = context.config.encoder
    if encoder.runs_here:
        model = encoders.resolve_model(encoder, context.digest_file)
        own = prompts.of_the_model(encoder, model.path)
        return {"encoder.model": model.digest} | {f"encoder.{name}": value for name, value in own.items()}
    digests: dict[str, str] = {}
    if encoder.backend == "http":  # the name of the model, a setting, is all that is known of it
        return digests
    for name in ("corpus_vectors", "anchor_vectors"):
        path = _brought(context, name)
        if not path.is_file():
            raise InputError(f"vector file {path} does not exist", field=f"encoder.{name}", remedy="Fix the path")
        digests[f"encoder.{name}"] = context.digest_file(path)
    return digests


def _brought(context: Context, setting: str) -> Path:
    """The file of vectors that an `encoder` setting names, or a copy of it in the run directory."""
    return remote.here(getattr(context.config.encoder, setting), context.run_dir / BOOKS / "vectors")


def _check(context: Context) -> None:
    """The model or the vectors are there, batches and devices suit the model: known before the source is read. They
    fit, once there are some. A server is sent nothing.
    """
    encoder = context.config.encoder
    encoders.check_installed(encoder.runtime)
    _sources(context)
    if encoder.runs_here:
        encoders.check_tokens(encoder, encoders.resolve_model(encoder, context.digest_file).path)
        _check_devices(context)
    if encoder.backend == "http":
        server.check(encoder)
    if "ingest" not in context.manifests:
        return
    if encoder.backend == "precomputed":
        check_fits(context, brought_dimension(context))
    elif made := next(made_of(context), None):
        check_fits(context, int(made.meta["dimension"]))


def _check_devices(context: Context) -> None:
    """Every device computes in the precision, and has memory for the models of the workers that share it.

    Raises:
        ConfigError: one does not.
        BudgetError: one has not.
    """
    encoder, names = context.config.encoder, context.devices()
    for name in names:
        encoders.check_precision(encoder.precision, name, "encoder.precision")
    if context.config.executor.kind == "ray":  # what its nodes have is not known here
        return
    folder = Path(encoders.resolve_model(encoder, context.digest_file).path)
    halved = encoder.precision != "float32" and encoder.runtime == "torch"  # others begin with torch's float32
    model = encoders.parameters(folder) * (2 if halved else 4)
    shared = Counter(devices.same(names[number % len(names)]) for number in range(context.workers))
    for name, workers in shared.items():
        needed, there = workers * model, devices.memory(name)
        if needed > there:
            fewer = f"{there // model} of them fit: lower executor.workers" if there > model else "use another device"
            raise BudgetError(
                f"encoder.model takes {model // 2**20:,} MiB per worker, {workers} workers take {needed // 2**20:,} MiB"
                f" of {name}, which has {there // 2**20:,} MiB; {fewer}",
                needed=needed,
                there=there,
                remedy=fewer,
            )


def _plan(context: Context) -> Iterator[Task]:
    if context.config.encoder.trust_remote_code:
        logger.warning("encoder.trust_remote_code is on: code shipped with the model runs with your permissions")
    if context.config.encoder.runs_here:
        _tell_prompts(context)
    yield from _tasks(context)


def _tell_prompts(context: Context) -> None:
    """What the model's prompts come to, before hours are spent on it."""
    encoder = context.config.encoder
    folder = encoders.resolve_model(encoder, context.digest_file).path
    for name, value in prompts.of_the_model(encoder, folder).items():
        logger.info("encode: the model's own %s: %r", name.replace("_", " "), value)
    for sentence in prompts.unused(encoder, folder):
        logger.warning("encode: %s", sentence)


def made_of(context: Context) -> Iterator[Part]:
    """The parts with rows that are there already."""
    books = context.own
    return (part for task in _tasks(context) if (part := books.part(task.key)) and part.rows)


def _kind(part: Part | Task) -> encoders.Kind:
    """As what a part's texts are encoded."""
    return "query" if part.kind == "anchors" else "passage"


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
            own = (f"encoder.{_kind(part)}_prompt", "encoder.routes")
            decided = [sources[name] for name in own if name in sources]
            input_digest = [sources.get("encoder.model"), part.meta["texts"], *decided]
            if context.config.encoder.cache is not None:
                alike = {name: value for name, value in settings.items() if name not in _OF_A_PART}
                payload["space"] = digest(VERSION, role, alike, sources.get("encoder.model"), decided, made_with)
        yield Task(key("encode", VERSION, role, settings, input_digest), part.kind, part.rows, payload)


@dataclass(frozen=True)
class _Model:
    """The loaded model of this process."""

    encoder: encoders.Encoder
    provenance: dict[str, str]
    check: Callable[[int], None]
    """Whether vectors of a dimension fit: known once there are some."""
    cache: Cache | None = None

    def blocks(self, task: Task, table: Any, meta: dict[str, Any], progress: Progress) -> Iterator[Block]:
        """Vectors of the part's texts, some at a time; what is known of them all in `meta`."""
        asked: list[str] = table["text"].to_pylist()
        missing, keys = np.ones(len(asked), np.bool_), []
        if self.cache:
            keys = [self.cache.key(task.payload["space"], text) for text in asked]
            for rows, vectors in self.cache.known(keys):
                yield rows, vectors
                missing[rows] = False
                progress(len(rows), "from the cache")
            meta["cached"] = len(asked) - int(missing.sum())
        left, first = np.flatnonzero(missing), 0
        started, seen, meta["tokens"] = time.monotonic(), 0, 0

        def on_batch(rows: int, tokens: int) -> None:
            nonlocal seen
            seen, meta["tokens"] = seen + rows, meta["tokens"] + tokens
            seconds = max(time.monotonic() - started, 1e-9)
            progress(rows, f"{seen / seconds:,.0f} texts/s, {meta['tokens'] / seconds:,.0f} tokens/s")

        def on_cut(texts: int, tokens: int) -> None:
            meta["cut"], meta["tokens_lost"] = meta.get("cut", 0) + texts, meta.get("tokens_lost", 0) + tokens

        try:
            given = [asked[row] for row in left]
            for vectors in self.encoder.encode(given, _kind(task), on_batch, on_cut) if given else ():
                rows = left[first : first + len(vectors)]
                if self.cache:
                    self.cache.put([keys[row] for row in rows], vectors)
                yield rows, vectors
                first += len(rows)
        except InputError as error:
            if error.row is None:
                raise
            name = table["id"][int(left[error.row])].as_py()
            raise InputError(f"{task.kind}, id {name!r}: {error.problem}", remedy=error.remedy) from None
        if self.cache and self.cache.troubles:
            meta["cache_troubles"] = [*self.cache.troubles]


@dataclass(frozen=True)
class _Brought:
    """Vectors that the user brings."""

    corpus: VectorFile
    anchors: VectorFile
    truncate_dim: int | None
    provenance: dict[str, str]
    check: Callable[[int], None]

    def blocks(self, task: Task, table: Any, meta: dict[str, Any], progress: Progress) -> Iterator[Block]:
        """The part's vectors at once: a row group of a Parquet file may hold rows from all over the part."""
        others = [[]] * table.num_rows if task.kind == "anchors" else table["other_ids"].to_pylist()
        vectors, differing = self._file(task).of(table["id"].to_pylist(), others, table["source_rows"].to_pylist())
        meta["differing_duplicates"] = differing
        progress(table.num_rows, "")
        yield np.arange(table.num_rows), truncated(vectors, self.truncate_dim)

    def place(self, task: Task, table: Any) -> dict[str, Any]:
        file = self._file(task)
        return {
            "file": str(file.path),
            "row": int(file.rows(table["id"].to_pylist(), table["source_rows"].to_pylist())[0]),
        }

    def _file(self, task: Task) -> VectorFile:
        return self.anchors if task.kind == "anchors" else self.corpus


def brought_dimension(context: Context) -> int:
    """Numbers of the vectors that the user brings, cut as the config asks.

    Raises:
        ConfigError: they are narrower than that.
    """
    encoder = context.config.encoder
    width = dimension_of(_brought(context, "corpus_vectors"), "encoder.corpus_vectors", context.budget)
    check_width(width, encoder.truncate_dim)
    return encoder.truncate_dim or width


def _open_brought(context: Context, setting: str, rows: str) -> VectorFile:
    """The file of an `encoder` setting, whose rows ingest counted under the other name."""
    path = _brought(context, setting)
    return VectorFile(path, context.manifest("ingest").stats[rows], f"encoder.{setting}", context.budget)


@contextmanager
def _open(context: Context) -> Iterator[_Model | _Brought]:
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
        yield _Brought(corpus, anchors, config.truncate_dim, {}, lambda dimension: None)
    elif config.http and config.backend == "http":
        with server.opened(config, max(1, config.http.concurrency // context.workers)) as served:
            _check_same(context, served)
            with _cache(config) as kept:
                yield _Model(served, served.provenance, cache(partial(check_fits, context)), kept)
    else:
        model = encoders.resolve_model(config, context.digest_file)
        budget = context.budget
        encoder = encoders.load(config, model.path, budget.threads, budget.device)
        provenance = encoders.provenance(config, budget.device)
        with _cache(config) as kept:
            yield _Model(encoder, provenance, cache(partial(check_fits, context)), kept)


def _cache(config: Encoder) -> AbstractContextManager[Cache | None]:
    if config.cache is None:
        return nullcontext()
    from negpipe.encoders.cache import Cache  # here, as a Python may have been built without SQLite

    return closing(Cache(config.cache, config.cache_size))


def _check_same(context: Context, served: encoders.Encoder) -> None:
    """Where parts are there, the server has the model that made them: the first text of one has its vector still.

    Raises:
        InputError: it has another one.
    """
    books = context.own
    known = ((task, part) for task in _tasks(context) if (part := books.part(task.key)) and part.rows)
    for task, part in islice(known, 1):
        table = open_table(context.store.path(task.payload["part"]))
        before = ann.open_parts([context.path(part, "vectors")]).take(np.array([0]))[0]
        (now,) = served.encode(table["text"].slice(0, 1).to_pylist(), _kind(task), lambda rows, tokens: None)
        if now.shape[1:] != before.shape or not np.linalg.norm(now[0] - before) <= _NEAR * np.linalg.norm(before):
            raise InputError(
                f"the server's vector of {task.kind} {table['id'][0].as_py()!r} differs from the stored one,"
                f" {part.file('vectors').path}: it serves another model, or runs it differently",
                field="encoder.model",
                remedy="Serve the model that was served before, or give the new one another name",
            )


def _run(task: Task, shared: _Model | _Brought, context: Context, publish: Publisher, progress: Progress) -> Made:
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
        bad = np.flatnonzero(~(_usable(here) & _short(here)))
        if len(bad):
            at, row = int(bad[0]), int(rows[bad[0]])
            place = shared.place(task, table.slice(row, 1)) if isinstance(shared, _Brought) else {}
            raise _refused(task, table["id"][row].as_py(), vectors[at : at + 1], config, place)
    assert stored is not None
    publish("vectors", ".npy", partial(ann.write_part, stored), needed=stored.nbytes)
    return Made(len(stored), meta | {"dimension": int(stored.shape[1])}, dict(shared.provenance))


def check_fits(context: Context, dimension: int) -> None:
    """The largest part fits into memory; what is to be made onto the disk, and what search will find with it.

    Raises:
        ConfigError, StorageError: they do not.
    """
    config = context.config
    block, held = _held(config.encoder)
    parts = texts(context.manifest("ingest"))
    row = dimension * np.dtype(config.encoder.storage).itemsize

    def needs(part: Part) -> int:
        """Its texts, its vectors as they are stored, and a block of them with its scaled copy are held."""
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
    same = all(task.kind == "anchors" for task in left)  # then what is found for the other anchors stays
    searching = sum(task.rows for task in left) if same else anchors
    needed = {
        "encode": row * sum(task.rows for task in left),
        "index": 4 * rows * dimension if config.index.kind == "flat" and not same else 0,
        "search": candidates.BYTES * searching * min(config.depth, rows),
    }
    remedy = "move run_dir or store to a larger disk"
    context.store.check_room(needed, "vectors and search results take about", remedy)


def _held(encoder: Encoder) -> tuple[int | None, int]:
    """Rows that are made at a time, None for all of a part, and bytes a number that they take: float32, twice."""
    if encoder.backend == "precomputed":
        return None, 8
    if encoder.http and encoder.backend == "http":  # as they are sent, and as Python reads them
        return encoder.http.concurrency * encoder.http.batch_texts, _READ
    return encoder.call_size, 8


def _usable(vectors: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    usable: npt.NDArray[np.bool_] = np.isfinite(vectors).all(axis=1) & vectors.any(axis=1)
    return usable


def _short(vectors: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Whether products with such vectors fit float32."""
    with np.errstate(over="ignore"):
        short: npt.NDArray[np.bool_] = np.isfinite(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float32))
    return short


def _refused(task: Task, name: str, vector: Floats, encoder: Encoder, place: dict[str, Any]) -> InputError:
    whose = f"the vector of {'anchor' if task.kind == 'anchors' else 'document'} {name!r}"
    if _usable(vector).all():
        remedy = "Scale the vectors to about length 1"
        with np.errstate(all="ignore"):
            length = np.linalg.norm(vector)
        if encoder.normalize and not (np.isfinite(length) and length > 0):
            return InputError(f"the numbers in {whose} are too small or too large to scale", remedy=remedy, **place)
        if not encoder.normalize and not _short(vector).all():
            return InputError(f"{whose} is too long: its products do not fit float32", remedy=remedy, **place)
        remedy = "Set encoder.storage: float32" if encoder.storage == "float16" else remedy
        return InputError(f"{whose} does not fit {encoder.storage}", field="encoder.storage", remedy=remedy, **place)
    what = "not finite" if vector.any() else "zero"
    return InputError(f"{whose} is {what}", remedy="Fix the vector, or remove the text", **place)


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
        stats["cached"] = {"texts": sum(map(_cached, parts)), "of": stats["texts"], "troubles": [*troubles]}
    encoder = context.config.encoder
    sides = {
        "documents": ([part for part in parts if part.kind != "anchors"], encoder.passage_max_length),
        "anchors": ([part for part in parts if part.kind == "anchors"], encoder.query_max_length),
    }
    cut = {side: _cut(own, length) for side, (own, length) in sides.items() if any("cut" in part.meta for part in own)}
    own = {name.removeprefix("encoder."): text for name, text in _sources(context).items() if name.endswith("_prompt")}
    known = {"prompts": own, "cut": cut, "equal": _equal(context, sides["documents"][0])}
    known["sent"] = _told(encoder, parts, stats.get("tokens", 0))
    return stats | {name: value for name, value in known.items() if value}


def _cached(part: Part) -> int:
    """How many of its texts were not encoded, as a cache had their vectors."""
    return int(part.meta.get("cached", 0))


def encoded(part: Part) -> int:
    """How many of its texts were given to the model."""
    return part.rows - _cached(part)


def _told(encoder: Encoder, parts: list[Part], tokens: int) -> dict[str, Any]:
    """What is known of a server's tokens: whether it counted them, and what they cost."""
    if encoder.backend != "http" or not encoder.http:
        return {}
    estimated = any(part.provenance.get("tokens") == server.ESTIMATED for part in parts)
    price = encoder.http.price
    return {"tokens": tokens, "estimated": estimated, "price": price, "cost": price and tokens * price / 1e6}


def estimated_tokens(context: Context, tasks: Iterable[Task]) -> int:
    """Tokens that tasks would send to a server: an estimate, from the bytes of their texts."""
    total = 0
    for task in tasks:
        texts = open_table(context.store.path(task.payload["part"]))["text"]
        bytes_of = pc.binary_length(texts).to_numpy() + server.overhead(context.config.encoder, _kind(task))
        total += int(server.estimated_tokens(bytes_of).sum())
    return total


def _cut(parts: list[Part], max_length: int) -> dict[str, Any]:
    """How many texts were cut and what they lost; parts of before it was counted, and what a cache had, left out."""
    known = [part for part in parts if "cut" in part.meta]
    lost, kept = (sum(part.meta[name] for part in known) for name in ("tokens_lost", "tokens"))
    return {
        "texts": sum(part.meta["cut"] for part in known),
        "of": sum(map(encoded, known)),
        "max_length": max_length,
        "lost": lost / max(1, lost + kept),
    }


def _equal(context: Context, parts: list[Part]) -> dict[str, int]:
    """How many documents have the vector of another one; of very many, as many as a sample of vectors tells."""
    vectors = ann.open_parts([context.path(part, "vectors") for part in parts])
    step = np.uint64(1 + vectors.rows // _COUNTED)
    odd = np.random.default_rng(0).integers(2**64, size=vectors.dimension, dtype=np.uint64) | np.uint64(1)
    sampled = [np.empty(0, np.uint64)]
    for _, block in vectors.blocks(_BLOCK):
        # A sum of odd multiples modulo 2^64: equal bits give equal numbers, in every process. Its upper half is mixed.
        hashes = block.view(np.uint32).astype(np.uint64) @ odd
        sampled.append(hashes[(hashes >> np.uint64(32)) % step == 0])
    counts = np.unique(np.concatenate(sampled), return_counts=True)[1]
    return {"documents": int(counts[counts > 1].sum()) * int(step), "of": vectors.rows}


def counted(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Of the statistics, what tells how far vectors can be relied on."""
    return {name: stats[name] for name in ("cut", "equal", "cached") if name in stats}


def from_cache(stats: Mapping[str, Any]) -> str | None:
    """What the statistics tell of the cache's part in the vectors, in a sentence; None: there was none."""
    if "cached" not in stats:
        return None
    cached, of = stats["cached"]["texts"], stats["cached"]["of"]
    uncounted = " (cut texts among them are not counted)" if cached else ""
    return f"{cached:,} of {of:,} texts from the cache{uncounted}; {NOT_EXACT}"


@dataclass(frozen=True)
class Defect:
    """Why vectors stand for less than their texts.

    Attributes:
        share: of tokens that were lost, or of the documents concerned.
        problem: what is wrong.
        remedy: what gives fewer of them.
    """

    share: float
    problem: str
    remedy: str

    @property
    def many(self) -> bool:
        """Whether it is to be warned of."""
        return self.share >= _MANY


def defects(stats: Mapping[str, Any]) -> Iterator[Defect]:
    """Those that the statistics tell of."""
    for side, setting in (("documents", "encoder.passage_max_length"), ("anchors", "encoder.query_max_length")):
        cut = stats.get("cut", {}).get(side)
        if cut and cut["texts"]:
            yield Defect(
                cut["lost"],
                f"{cut['texts']:,} of {cut['of']:,} {side} were cut at {cut['max_length']} tokens"
                f" ({percent(cut['lost'])} of all their tokens lost)",
                f"raise {setting} as far as the model allows, or split the {side}",
            )
    equal = stats.get("equal")
    if equal and equal["documents"]:
        yield Defect(
            equal["documents"] / equal["of"],
            f"{equal['documents']:,} of {equal['of']:,} documents have exactly the vector of another one, so no search"
            " can distinguish them",
            "check what their texts have in common, and whether the vectors are complete",
        )


def cost_of(tokens: int, price: float) -> str:
    """What tokens cost, in words."""
    return f"cost {tokens * price / 1e6:,.4g} at {price:g} per million"


def _remarks(stats: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    if sent := stats.get("sent"):
        counted_by = "estimated, as it reports none" if sent["estimated"] else "by its own count"
        cost = f", {cost_of(sent['tokens'], sent['price'])}" if sent["price"] else ""
        yield logging.INFO, f"the server read {sent['tokens']:,} tokens for these vectors, {counted_by}{cost}"
    for one in defects(stats):
        yield logging.WARNING if one.many else logging.INFO, f"{one.problem}: {one.remedy}"
    if sentence := from_cache(stats):
        yield logging.INFO, sentence
        yield from ((logging.WARNING, trouble) for trouble in stats["cached"]["troubles"])


def _devices(config: Config) -> tuple[str, ...]:
    """Those of the encoder where torch runs it."""
    encoder = config.encoder
    return devices.of_encoder(config) if encoder.runs_here and encoder.runtime == "torch" else (devices.CPU,)


def _libraries(config: Config) -> tuple[str, ...]:
    return encoders.libraries(config.encoder) if config.encoder.runs_here else ("numpy",)


def _settle(config: Config, manifest: Manifest) -> tuple[Config, str]:
    """What `index.kind: auto` means, once the sizes are known."""
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
    devices=_devices,
    place=lambda config: "apart" if config.encoder.runs_here else "worker",
)
