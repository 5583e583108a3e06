"""Why an anchor has the negatives it has: every stored candidate with its fate and the rule in numbers.

The fates are those of `Selector.select`, the one the training rows come from. Texts are as they stand in
the source; whoever shows them cleans them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from negpipe import candidates, mining
from negpipe.candidates import Candidates
from negpipe.errors import InputError
from negpipe.mining import Fate, Rules
from negpipe.selection import Selector, Units
from negpipe.tables import Rows, open_table

_NEAR = 3
_WORDS = {
    Fate.POSITIVE_ID: "a known positive of the anchor",
    Fate.POSITIVE_TEXT: "the text of a known positive, under another id",
    Fate.POSITIVE_NORMALIZED: "the text of a known positive but for case, white space or Unicode form",
    Fate.SHARED_ANCHOR: "a positive of another anchor with the same text",
    Fate.ANCHOR_TEXT: "the anchor's own text",
    Fate.EXCLUDED_FILE: "named for this anchor in mining.exclude_file",
    Fate.NEAR_DUPLICATE: "nearly the text of a positive",
    Fate.INVALID_SCORE: "the score is no finite number",
}


@dataclass(frozen=True)
class Document:
    """A positive or a candidate. `rank` is 0-based over all documents, None beyond the stored depth."""

    rank: int | None
    score: float | None
    id: str
    text: str


@dataclass(frozen=True)
class Candidate(Document):
    """A candidate and what became of it: `taken`, or the drop reason; `rule` says why, in numbers."""

    fate: str
    rule: str


@dataclass(frozen=True)
class Unit:
    """The anchor, or with `margin_reference: each` the anchor with one of its positives.

    Attributes:
        reference: the positive score that margins refer to; None: there is none.
        counts: how many candidates met each fate.
        candidates: in order of rank, negatives that were not among them last.
    """

    positives: list[Document]
    reference: float | None
    counts: dict[str, int]
    candidates: list[Candidate]


@dataclass(frozen=True)
class Explanation:
    """An anchor and all its units; `window` is [first rank, rank after the last], over raw ranks or survivors."""

    anchor_id: str
    anchor: str
    window: tuple[int, int]
    rank_over: str
    units: list[Unit]


def explain(
    selector: Selector, corpus: Rows, anchors: Sequence[Path], found: Sequence[Path], anchor_id: str
) -> Explanation:
    """Explain one anchor.

    Args:
        anchors: ingest's parts of anchors.
        found: search's parts of candidates, one for each.

    Raises:
        InputError: no anchor has the id; the message names near ones.
        DamagedError: a file is not whole.
    """
    for anchor_part, part in zip(anchors, found, strict=True):
        table = open_table(anchor_part)
        at = pc.index(table["id"], anchor_id).as_py()
        if at >= 0:
            piece = _one(part, at)
            units = selector.select(table.slice(at, 1), piece)
            rules = selector.rules
            return Explanation(
                anchor_id=anchor_id,
                anchor=table["text"][at].as_py(),
                window=(rules.range_min, rules.range_max),
                rank_over=rules.rank_over,
                units=[_unit(units, number, piece, rules, corpus) for number in range(len(units.anchor))],
            )
    raise _unknown(anchors, anchor_id)


def _one(part: Path, at: int) -> Candidates:
    """The candidates of one anchor of a part."""
    for piece in candidates.read(part):
        if at < len(piece.rows):
            here = slice(at, at + 1)
            own = slice(piece.offsets[at], piece.offsets[at + 1])
            return replace(
                piece,
                rows=piece.rows[here],
                scores=piece.scores[here],
                positives=piece.positives[own],
                offsets=np.array([0, own.stop - own.start]),
                positive_scores=piece.positive_scores[own],
            )
        at -= len(piece.rows)
    raise AssertionError("a part of candidates is shorter than its part of anchors")


def _unit(units: Units, number: int, piece: Candidates, rules: Rules, corpus: Rows) -> Unit:
    own = slice(units.positive_offsets[number], units.positive_offsets[number + 1])
    reference = float(units.references[number])
    fates = units.fates[number]
    real = np.flatnonzero(fates != Fate.PADDING)
    rows, scores = piece.rows[0, real], piece.scores[0, real]
    rule = _Rule(fates, scores, reference, rules)
    counts = mining.counts(fates[None, :])[0]
    ids, texts = (corpus.strings(name, rows).to_pylist() for name in ("id", "text"))
    return Unit(
        positives=_documents(
            corpus, units.positives[own], units.positive_scores[own], units.positive_ranks[own].tolist()
        ),
        reference=_number(reference),
        counts={fate.name.lower(): int(counts[fate]) for fate in Fate if counts[fate] and fate != Fate.PADDING},
        candidates=[
            Candidate(rank, _number(score), name, text, Fate(fates[rank]).name.lower(), rule(rank))
            for rank, score, name, text in zip(real.tolist(), scores.tolist(), ids, texts, strict=True)
        ],
    )


def _documents(corpus: Rows, rows: npt.NDArray[np.int64], scores: Any, ranks: list[int]) -> list[Document]:
    ids, texts = (corpus.strings(name, rows).to_pylist() for name in ("id", "text"))
    return [
        Document(rank if rank >= 0 else None, _number(score), name, text)
        for rank, score, name, text in zip(ranks, scores.tolist(), ids, texts, strict=True)
    ]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _unknown(anchors: Sequence[Path], anchor_id: str) -> InputError:
    from rapidfuzz import process

    near: list[tuple[float, str]] = []
    count = 0
    for path in anchors:
        ids = open_table(path)["id"].to_pylist()
        count += len(ids)
        near += [(-score, name) for name, score, _ in process.extract(anchor_id, ids, limit=_NEAR, score_cutoff=50)]
        near = sorted(near)[:_NEAR]
    names = ", ".join(repr(name) for _, name in near)
    return InputError(
        f"none of {count:,} anchors has the id {anchor_id!r}" + (f"; near: {names}" if near else ""),
        field="--anchor",
        remedy="Anchors are the queries with a positive in data.split",
    )
