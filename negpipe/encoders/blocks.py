"""The vectors of a part's texts, some at a time: from the model or its cache, or from the user's files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from negpipe.data.arrays import Floats
from negpipe.encoders.encode import TextEncoder
from negpipe.encoders.precomputed import VectorFile
from negpipe.encoders.prompts import Kind
from negpipe.encoders.vectors import truncated
from negpipe.engine.manifest import Part
from negpipe.engine.stage import Progress, Task
from negpipe.errors import InputError

if TYPE_CHECKING:
    from negpipe.encoders.cache import VectorCache

Block = tuple[npt.NDArray[np.intp], Floats]
"""Offsets of some texts in their part, and their vectors (m, d)."""


def kind_of(part: Part | Task) -> Kind:
    """The kind as which a part's texts are encoded."""
    return "query" if part.kind == "anchors" else "passage"


@dataclass(frozen=True)
class ComputedVectors:
    """Those of the loaded model of this process, or of its cache."""

    encoder: TextEncoder
    provenance: dict[str, str]
    check: Callable[[int], None]
    """Checks that vectors of a dimension fit, once there are some."""
    cache: VectorCache | None = None
    unchanged: Callable[[], None] = lambda: None
    """Checks after each part that the model is still the same, if another process runs it."""

    def blocks(self, task: Task, table: Any, meta: dict[str, Any], progress: Progress) -> Iterator[Block]:
        """Vectors of the part's texts, some at a time; facts about all of them go to `meta`."""
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
            for vectors in self.encoder.encode(given, kind_of(task), on_batch, on_cut) if given else ():
                rows = left[first : first + len(vectors)]
                if self.cache:
                    self.cache.put([keys[row] for row in rows], vectors)
                yield rows, vectors
                first += len(rows)
            if given:
                self.unchanged()
        except InputError as error:
            if error.row is None:
                raise
            name = table["id"][int(left[error.row])].as_py()
            raise InputError(f"{task.kind}, id {name!r}: {error.problem}", remedy=error.remedy) from None
        if self.cache and self.cache.troubles:
            meta["cache_troubles"] = [*self.cache.troubles]


@dataclass(frozen=True)
class PrecomputedVectors:
    """Those of the user's files."""

    corpus: VectorFile
    anchors: VectorFile
    truncate_dim: int | None
    provenance: dict[str, str]
    check: Callable[[int], None]

    def blocks(self, task: Task, table: Any, meta: dict[str, Any], progress: Progress) -> Iterator[Block]:
        """All vectors of the part at once: a row group of a Parquet file may hold rows from all over it."""
        others = [[]] * table.num_rows if task.kind == "anchors" else table["other_ids"].to_pylist()
        vectors, differing = self._file(task).of(table["id"].to_pylist(), others, table["source_rows"].to_pylist())
        meta["differing_duplicates"] = differing
        progress(table.num_rows, "")
        yield np.arange(table.num_rows), truncated(vectors, self.truncate_dim)

    def place(self, task: Task, table: Any) -> dict[str, Any]:
        """File and row of the vector of the first text, for an error."""
        file = self._file(task)
        return {
            "file": str(file.path),
            "row": int(file.rows(table["id"].to_pylist(), table["source_rows"].to_pylist())[0]),
        }

    def _file(self, task: Task) -> VectorFile:
        return self.anchors if task.kind == "anchors" else self.corpus
