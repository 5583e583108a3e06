"""Explains the negatives of an anchor: every stored candidate with its fate and the rule in numbers.

The fates come from `Selector.select`, like the training rows. Texts are as in the source; the code that displays them
must clean them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from negpipe.data.arrays import Ints
from negpipe.data.candidates import Candidates
from negpipe.data.tables import Rows, open_table
from negpipe.errors import InputError
from negpipe.select.filters import CODES, NAMES, filter_of
from negpipe.select.rules import Fate
from negpipe.select.selector import SOURCES, PartFiles, Selector, Units

_NEAR = 3
_SAYS = {"random": "a random negative", "given": "given by the source", "judged": "judged not relevant"}
# Fates of candidates that no filter dropped.
_PASSED = (Fate.TAKEN, Fate.BEFORE_WINDOW, Fate.AFTER_WINDOW, Fate.NOT_SAMPLED, Fate.SHORTAGE)


@dataclass(frozen=True)
class RankedDocument:
    """A positive or a candidate. `rank` is 0-based over all documents, None beyond the stored depth."""

    rank: int | None
    score: float | None
    id: str
    text: str


@dataclass(frozen=True)
class Candidate(RankedDocument):
    """A candidate and its fate: `taken`, or the drop reason; `rule` says why, in numbers."""

    fate: str
    rule: str


@dataclass(frozen=True)
class Unit:
    """The anchor, or with `margin_reference: each`, the anchor with one of its positives.

    Attributes:
        positives: the one with the best score first.
        reference: the positive score that margins refer to; None if there is none.
        counts: number of candidates per fate.
        candidates: in order of rank, followed by negatives that were not candidates.
    """

    positives: list[RankedDocument]
    reference: float | None
    counts: dict[str, int]
    candidates: list[Candidate]

    def shortened(self, limit: int) -> Unit:
        """The unit with its first `limit` candidates, and every further one that was taken."""
        further = [candidate for candidate in self.candidates[limit:] if candidate.fate == "taken"]
        return replace(self, candidates=[*self.candidates[:limit], *further])


@dataclass(frozen=True)
class Explanation:
    """An anchor and all its units; `window` is [first rank, rank after the last], over raw ranks or survivors."""

    anchor_id: str
    anchor: str
    window: tuple[int, int]
    rank_over: str
    units: list[Unit]


def find(parts: Sequence[PartFiles], anchor: str, *, trains: bool = False) -> tuple[PartFiles, int]:
    """The part with the anchor of an id, else with the first of an exact text, and its position there.

    `trains`: the config has a section train.

    Raises:
        InputError: no anchor has the id or the text; the message lists similar ids.
        DamagedError: a file is incomplete.
    """
    for column in ("id", "text"):
        for part in parts:
            at = pc.index(open_table(part.anchors)[column], anchor).as_py()
            if at >= 0:
                return part, at
    raise _unknown([part.anchors for part in parts], anchor, trains)


def explain(selector: Selector, corpus: Rows, part: PartFiles, at: int) -> Explanation:
    """Explain one anchor, by its position in its part.

    Raises:
        DamagedError: a file is incomplete.
    """
    found, units = selector.one(part, at)
    rules = selector.rules
    return Explanation(
        anchor_id=units.anchors["id"][0].as_py(),
        anchor=units.anchors["text"][0].as_py(),
        window=(rules.range_min, rules.range_max),
        rank_over=rules.rank_over,
        units=[_unit(units, number, found, selector, corpus) for number in range(len(units.anchor))],
    )


def _unit(units: Units, number: int, piece: Candidates, selector: Selector, corpus: Rows) -> Unit:
    fates = units.fates[number]
    own = slice(units.positive_offsets[number], units.positive_offsets[number + 1])
    chosen = slice(units.negative_offsets[number], units.negative_offsets[number + 1])
    # Padding comes last, so a candidate's position is its rank.
    real = int(np.count_nonzero(fates != Fate.PADDING))
    fates = fates[:real]
    documents = _documents(corpus, piece.rows[0, :real], piece.scores[0, :real], np.arange(real))
    rule = _Rule(fates, [document.score for document in documents], float(units.references[number]), selector)
    named = [(NAMES[code], rule(rank)) for rank, code in enumerate(fates.tolist())]
    unranked = units.negative_ranks[chosen] < 0
    more = _documents(
        corpus,
        units.negatives[chosen][unranked],
        units.negative_scores[chosen][unranked],
        units.negative_ranks[chosen][unranked],
    )
    reasons = [_SAYS.get(SOURCES[source], "") for source in units.negative_sources[chosen][unranked].tolist()]
    positives = _documents(corpus, units.positives[own], units.positive_scores[own], units.positive_ranks[own])
    return Unit(
        positives=sorted(positives, key=lambda one: -math.inf if one.score is None else one.score, reverse=True),
        reference=_number(float(units.references[number])),
        counts={name: found for name, code in CODES.items() if (found := int(np.sum(fates == code)))},
        candidates=[
            *(
                Candidate(**vars(document), fate=fate, rule=why)
                for document, (fate, why) in zip(documents, named, strict=True)
            ),
            *(Candidate(**vars(document), fate="taken", rule=why) for document, why in zip(more, reasons, strict=True)),
        ],
    )


def _documents(corpus: Rows, rows: Ints, scores: npt.NDArray[np.float32], ranks: Ints) -> list[RankedDocument]:
    ids, texts = (corpus.strings(name, rows).to_pylist() for name in ("id", "text"))
    return [
        RankedDocument(rank if rank >= 0 else None, _number(score), name, text)
        for rank, score, name, text in zip(ranks.tolist(), scores.tolist(), ids, texts, strict=True)
    ]


class _Rule:
    """The rule behind each fate of one unit's candidates, in words and numbers."""

    def __init__(self, fates: npt.NDArray[np.uint8], scores: list[float | None], reference: float, selector: Selector):
        self._fates, self._scores, self._reference = fates, scores, reference
        self._mining, self._rules = selector.mining, selector.rules
        rules = selector.rules
        passed = np.isin(fates, _PASSED)
        self._ranks = np.cumsum(passed) - 1 if rules.rank_over == "survivors" else np.arange(len(fates))
        within = rules.range_min, rules.range_max
        self._window = int(np.sum(passed & (self._ranks >= within[0]) & (self._ranks < within[1])))

    def __call__(self, rank: int) -> str:
        code, score, rules = int(self._fates[rank]), self._scores[rank], self._rules
        if dropped := filter_of(code):
            return dropped.explain(self._mining, math.nan if score is None else score, self._reference)
        if code == Fate.PREFERRED:
            return "taken before others: given by the source, or judged not relevant"
        place = f"{'survivor' if rules.rank_over == 'survivors' else 'rank'} {self._ranks[rank]}"
        if code == Fate.BEFORE_WINDOW:
            return f"{place} < {rules.range_min} (range_min)"
        if code == Fate.AFTER_WINDOW:
            return f"{place} ≥ {rules.range_max} (range_max)"
        return f"{place}, {self._drawn(Fate(code))}"

    def _drawn(self, fate: Fate) -> str:
        rules = self._rules
        if fate == Fate.SHORTAGE:
            found = int(np.sum(self._fates == Fate.SHORTAGE))
            return f"given up: {found} of {rules.num_negatives} negatives (on_shortage drop)"
        top = rules.sampling_strategy == "top"
        if fate == Fate.TAKEN:
            return f"one of the first {rules.num_negatives}" if top else f"drawn ({rules.sampling_strategy})"
        taken = int(np.sum(self._fates == Fate.TAKEN)) or rules.num_negatives
        return f"{taken} of {self._window} in the window taken {'before it' if top else 'instead'} (num_negatives)"


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _unknown(anchors: Sequence[Path], anchor: str, trains: bool) -> InputError:
    from rapidfuzz import process

    near: list[tuple[float, str]] = []
    count = 0
    for path in anchors:
        ids = open_table(path)["id"].to_pylist()
        count += len(ids)
        near += [(-score, name) for name, score, _ in process.extract(anchor, ids, limit=_NEAR, score_cutoff=50)]
        near = sorted(near)[:_NEAR]
    names = ", ".join(repr(name) for _, name in near)
    split = "; train.split leaves some of them out" if trains else ""
    return InputError(
        f"none of {count:,} anchors has the id {anchor!r}, or this text" + (f"; similar ids: {names}" if near else ""),
        remedy=f"Anchors are the queries with a positive in data.split{split}",
    )
