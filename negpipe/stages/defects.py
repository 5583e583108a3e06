"""What vectors do not represent of their texts: tokens that were cut, documents with the vector of another, and vectors
from a cache, which are not reproducible bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from negpipe import ann
from negpipe.data.tables import Rows, documents
from negpipe.encoders.cuts import percent
from negpipe.encoders.vectors import NOT_EXACT
from negpipe.engine.manifest import Part
from negpipe.engine.stage import Context

_COUNTED, _BLOCK = 2**22, 1024  # vectors whose hashes are held, and vectors read at a time
_MANY = 0.1  # share of lost tokens, or of documents with another's vector, that causes a warning


def cached(part: Part) -> int:
    """Number of its texts whose vectors came from a cache."""
    return int(part.meta.get("cached", 0))


def encoded(part: Part) -> int:
    """Number of its texts that were given to the model."""
    return part.rows - cached(part)


def cut(parts: list[Part], max_length: int) -> dict[str, Any]:
    """How many texts were cut and what they lost; excludes cached texts and old parts without these counts."""
    known = [part for part in parts if "cut" in part.meta]
    lost, kept = (sum(part.meta[name] for part in known) for name in ("tokens_lost", "tokens"))
    return {
        "texts": sum(part.meta["cut"] for part in known),
        "of": sum(map(encoded, known)),
        "max_length": max_length,
        "lost": lost / max(1, lost + kept),
    }


def equal(context: Context, parts: list[Part]) -> dict[str, Any]:
    """How many documents have another's vector, and two of them; estimated from a sample of vectors if there are very
    many."""
    vectors = ann.open_parts([context.path(part, "vectors") for part in parts])
    step = np.uint64(1 + vectors.rows // _COUNTED)
    odd = np.random.default_rng(0).integers(2**64, size=vectors.dimension, dtype=np.uint64) | np.uint64(1)
    sampled, numbers = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for first, block in vectors.blocks(_BLOCK):
        # A sum of odd multiples modulo 2^64: equal bits give equal numbers in every process. The upper half is mixed.
        hashes = block.view(np.uint32).astype(np.uint64) @ odd
        taken = np.flatnonzero((hashes >> np.uint64(32)) % step == 0)
        sampled.append(hashes[taken])
        numbers.append(first + taken)
    hashes, rows = np.concatenate(sampled), np.concatenate(numbers)
    shared, counts = np.unique(hashes, return_counts=True)
    found: dict[str, Any] = {"documents": int(counts[counts > 1].sum()) * int(step), "of": vectors.rows}
    if found["documents"]:
        alike = rows[hashes == shared[np.argmax(counts > 1)]][:2]
        corpus = Rows([context.path(part, "table") for part in documents(context.manifest("ingest"))])
        found["example"] = corpus.strings("id", alike).to_pylist()
    return found


def counted(stats: Mapping[str, Any]) -> dict[str, Any]:
    """The statistics that show how reliable the vectors are."""
    return {name: stats[name] for name in ("cut", "equal", "cached") if name in stats}


def from_cache(stats: Mapping[str, Any]) -> str | None:
    """A sentence about the share of vectors from the cache; None without a cache."""
    if "cached" not in stats:
        return None
    cached, of = stats["cached"]["texts"], stats["cached"]["of"]
    uncounted = " (cut texts among them are not counted)" if cached else ""
    return f"{cached:,} of {of:,} texts from the cache{uncounted}; {NOT_EXACT}"


@dataclass(frozen=True)
class Defect:
    """A reason why vectors represent less than their texts.

    Attributes:
        share: share of lost tokens, or of affected documents.
        problem: what is wrong.
        remedy: how to reduce it.
    """

    share: float
    problem: str
    remedy: str

    @property
    def many(self) -> bool:
        """Whether it deserves a warning."""
        return self.share >= _MANY


def of(stats: Mapping[str, Any]) -> Iterator[Defect]:
    """The defects found in the statistics."""
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
        such = " and ".join(map(repr, equal.get("example", ())))  # earlier versions name none
        yield Defect(
            equal["documents"] / equal["of"],
            f"{equal['documents']:,} of {equal['of']:,} documents have exactly the vector of another one"
            f"{such and f', such as {such}'}, so no search can distinguish them",
            "check what their texts have in common, and whether the vectors are complete",
        )
