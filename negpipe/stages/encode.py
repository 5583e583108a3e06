"""encode: texts → vectors, one .npy part for each part of texts.

A part depends on its texts in order and on the settings that touch it: passages do not know the query
instruction, nor anchors the passage length. Vectors are checked before they are stored: no NaN, no
infinity, no zero vector, one dimension throughout.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from negpipe import encoders
from negpipe.config import Config
from negpipe.errors import InputError
from negpipe.fingerprint import key
from negpipe.manifest import Part
from negpipe.stage import Context, Made, Progress, Publisher, Stage, Task
from negpipe.tables import open_table
from negpipe.vectors import VectorFile

VERSION = 1
_NOT_IDENTITY = {"model", "revision", "device", "corpus_vectors", "anchor_vectors"}
_PRECOMPUTED = {"backend", "normalize", "storage"}


def _settings(config: Config) -> dict[str, Any]:
    values = config.encoder.model_dump(mode="json", exclude=_NOT_IDENTITY)
    if config.encoder.backend == "precomputed":
        values = {name: value for name, value in values.items() if name in _PRECOMPUTED}
    return {f"encoder.{name}": value for name, value in values.items()}


def _settings_of(config: Config, kind: str) -> dict[str, Any]:
    """The slice that can change a part of this kind."""
    other = "encoder.passage_" if kind == "anchors" else "encoder.query_"
    return {name: value for name, value in _settings(config).items() if not name.startswith(other)}


def _sources(context: Context) -> dict[str, str]:
    encoder = context.config.encoder
    if encoder.backend != "precomputed":
        return {"encoder.model": encoders.resolve_model(encoder, context.digest_file).digest}
    digests = {}
    for name in ("corpus_vectors", "anchor_vectors"):
        path = Path(getattr(encoder, name))
        if not path.is_file():
            raise InputError(f"there is no vector file {path}", field=f"encoder.{name}", remedy="Mend the path")
        digests[f"encoder.{name}"] = context.digest_file(path)
    return digests


def _plan(context: Context) -> Iterator[Task]:
    sources = _sources(context)
    precomputed = context.config.encoder.backend == "precomputed"
    for part in context.manifest("ingest").parts:
        if part.kind == "counts":
            continue
        if precomputed:
            vectors = "encoder.anchor_vectors" if part.kind == "anchors" else "encoder.corpus_vectors"
            input_digest = [sources[vectors], part.meta["source_rows"]]
        else:
            input_digest = [sources["encoder.model"], part.meta["texts"]]
        role = "anchors" if part.kind == "anchors" else "passages"
        name = key("encode", VERSION, role, _settings_of(context.config, part.kind), input_digest)
        yield Task(name, part.kind, part.rows, {"part": part.path})


@dataclass(frozen=True)
class _Model:
    """The loaded model of this process."""

    encoder: encoders.Encoder
    provenance: dict[str, str]

    def __call__(self, task: Task, table: Any, progress: Progress) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        texts: list[str] = table["text"].to_pylist()
        started, seen, read = time.monotonic(), 0, 0

        def on_batch(rows: int, tokens: int) -> None:
            nonlocal seen, read
            seen, read = seen + rows, read + tokens
            seconds = max(time.monotonic() - started, 1e-9)
            progress(rows, f"{seen / seconds:,.0f} texts/s, {read / seconds:,.0f} tokens/s")

        vectors = self.encoder.encode(texts, "query" if task.kind == "anchors" else "passage", on_batch)
        return vectors, {"tokens": read}


@dataclass(frozen=True)
class _Brought:
    """Vectors that the user brings."""

    corpus: VectorFile
    anchors: VectorFile
    provenance: dict[str, str]

    def __call__(self, task: Task, table: Any, progress: Progress) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        file = self.anchors if task.kind == "anchors" else self.corpus
        vectors, differing = file.of(table["id"].to_pylist(), table["source_rows"].to_pylist())
        progress(task.rows, "")
        return vectors, {"differing_duplicates": differing}


@contextmanager
def _open(context: Context) -> Iterator[_Model | _Brought]:
    config = context.config.encoder
    if config.backend == "precomputed":
        counts = context.manifest("ingest").stats
        corpus = VectorFile(Path(str(config.corpus_vectors)), counts["source_documents"], "encoder.corpus_vectors")
        anchors = VectorFile(Path(str(config.anchor_vectors)), counts["source_queries"], "encoder.anchor_vectors")
        if corpus.dimension != anchors.dimension:
            raise InputError(
                f"{anchors.path} has vectors of {anchors.dimension} numbers, {corpus.path} of {corpus.dimension}",
                field="encoder.anchor_vectors",
                remedy="Bring both from the same model",
            )
        yield _Brought(corpus, anchors, {})
    else:
        model = encoders.resolve_model(config, context.digest_file)
        encoder = encoders.load(config, model.path, context.threads)
        yield _Model(encoder, encoders.provenance(config))


def _run(task: Task, shared: _Model | _Brought, context: Context, publish: Publisher, progress: Progress) -> Made:
    config = context.config.encoder
    table = open_table(context.run_dir / task.payload["part"])
    vectors, meta = shared(task, table, progress)
    ids = table["id"]
    if config.normalize:
        with np.errstate(all="ignore"):
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    stored = vectors.astype(config.storage)
    bad = np.flatnonzero(~np.isfinite(stored).all(axis=1) | ~stored.any(axis=1))
    if len(bad):
        what = "anchor" if task.kind == "anchors" else "document"
        raise InputError(
            f"the vector of {what} {ids[int(bad[0])].as_py()!r} is zero, not finite, or too large for"
            f" {config.storage} ({len(bad)} such vectors in this part)",
            file=str(config.anchor_vectors if task.kind == "anchors" else config.corpus_vectors)
            if config.backend == "precomputed"
            else None,
            field="encoder.storage" if config.storage == "float16" and np.isfinite(vectors[bad]).all() else None,
            remedy="Mend the vectors, or remove the text",
        )
    publish(".npy", lambda file: np.save(file, stored, allow_pickle=False))
    return Made(len(stored), meta | {"dimension": int(stored.shape[1])}, dict(shared.provenance))


def _stats(_: Context, parts: list[Part]) -> dict[str, Any]:
    dimensions = {part.meta["dimension"] for part in parts}
    if len(dimensions) > 1:
        raise InputError(f"vectors have different dimensions: {sorted(dimensions)}", remedy="Use one model for all")
    texts = sum(part.rows for part in parts)
    stats: dict[str, Any] = {"texts": texts, "dimension": dimensions.pop()}
    for name in ("tokens", "differing_duplicates"):
        if any(name in part.meta for part in parts):
            stats[name] = sum(part.meta.get(name, 0) for part in parts)
    return stats


STAGE = Stage(
    name="encode",
    version=VERSION,
    inputs=("ingest",),
    settings=_settings,
    sources=_sources,
    plan=_plan,
    open=_open,
    run=_run,
    stats=_stats,
    apart=lambda config: config.encoder.backend != "precomputed",
)
