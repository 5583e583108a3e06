"""The review sample: anchors whose negatives a person should look at.

Some are drawn at random, by seed, so that the marks among them estimate how many negatives are false. The others are
the riskiest of the rest: their negatives score nearest to the positive, or share most words with it. The riskiest are
shown first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np
import numpy.typing as npt

from negpipe.data.tables import Rows
from negpipe.review.report import words
from negpipe.select.selector import SOURCES, Units

ANCHORS = 50
_RANDOM = 20
_COMPARED = 5000  # maximum negatives whose words are compared
_WORDS = 100  # maximum positives, and negatives, per unit for that
_POSITIVES, _NEGATIVES, _LETTERS = 4, 10, 3000  # maximum shown per anchor, and letters per text
_NEAR = "a negative scores close to the positive"
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class CardDocument:
    """A positive or a negative on a card; `rank` is 0-based, None beyond the depth or for a random negative.
    `reference`: the one of several positives that margins are measured from."""

    id: str
    pieces: words.Pieces
    score: float
    rank: int | None
    random: bool
    reference: bool


@dataclass(frozen=True)
class Card:
    """An anchor to review: why it is in the sample, and its documents, of which some may be left out."""

    why: str
    anchor_id: str
    anchor: words.Pieces
    positives: list[CardDocument]
    negatives: list[CardDocument]
    positives_left_out: int
    negatives_left_out: int


@dataclass
class Pool:
    """The anchors from which a sample is drawn, filled a slice at a time."""

    slices: list[Units] = field(default_factory=list)

    def add(self, units: Units) -> None:
        """Keep what the sample needs."""
        alone = units.only_negatives()
        self.slices.append(replace(alone, fates=alone.fates[:, :0]))

    def hubs(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Documents, and for how many anchors each is a negative, in descending order."""
        pairs = [
            np.unique(np.stack([np.repeat(units.anchor, units.counts), units.negatives]), axis=1)[1]
            for units in self.slices
        ]
        rows, counts = np.unique(np.concatenate([np.empty(0, np.int64), *pairs]), return_counts=True)
        order = np.lexsort([rows, -counts])
        return rows[order], counts[order]


def cards(pool: Pool, corpus: Rows, seed: int) -> list[Card]:
    """Choose anchors and gather their texts; anchors without negatives are left out."""
    places = [(units, number) for units in pool.slices for number in np.flatnonzero(units.counts).tolist()]
    if not places:
        return []
    order = np.random.default_rng(seed).permutation(len(places))
    size = min(ANCHORS, len(places))
    drawn = order[: max(1, size * _RANDOM // ANCHORS)].tolist()
    rest = np.sort(order[len(drawn) :])
    alike, usual = _likeness(places, corpus)
    chosen: dict[int, str] = {}
    by_risk = {
        _NEAR: _nearness(places),
        "a negative shares words with a positive": alike,
    }
    for why, risk in by_risk.items():
        riskiest = [at for at in rest[np.argsort(-risk[rest], kind="stable")].tolist() if at not in chosen]
        # Half of the anchors that are not random, then the other half.
        chosen |= dict.fromkeys(riskiest[: -(-(size - len(drawn)) // 2)][: size - len(drawn) - len(chosen)], why)
    chosen |= dict.fromkeys(drawn, "random")
    return [_card(*places[at], corpus, usual, why) for at, why in chosen.items()]


def _nearness(places: Sequence[tuple[Units, int]]) -> Floats:
    """How close each unit's best negative comes to the reference positive, relative to that one's score."""
    references = np.array([units.references[at] for units, at in places], np.float64)
    best = np.array([_of(units, "negative", at).max() for units, at in places], np.float64)
    return np.nan_to_num((best - references) / np.maximum(np.abs(references), 1e-6), nan=-np.inf)


def _likeness(places: Sequence[tuple[Units, int]], corpus: Rows) -> tuple[Floats, set[str]]:
    """The highest word similarity of each unit's negatives to a positive (-1 if not compared), and the common words."""
    total = sum(int(units.counts[at]) for units, at in places)
    looked_at = range(0, len(places), -(-total // _COMPARED))
    rows = [_rows(*places[at], side)[:_WORDS] for at in looked_at for side in ("positive", "negative")]
    every = np.unique(np.concatenate(rows))
    texts = corpus.strings("text", every).to_pylist()
    found = dict(zip(every.tolist(), (words.words(text[:_LETTERS]) for text in texts), strict=True))
    usual = words.common(found.values())
    telling = {row: own - usual for row, own in found.items()}
    out = np.full(len(places), -1.0)
    for at, positives, negatives in zip(looked_at, rows[::2], rows[1::2], strict=True):
        pairs = product(positives.tolist(), negatives.tolist())
        out[at] = max(words.likeness(telling[one], telling[other]) for one, other in pairs)
    return out, usual


def _card(units: Units, number: int, corpus: Rows, usual: set[str], why: str) -> Card:
    at = int(units.anchor[number])
    anchor = units.anchors["text"][at].as_py()
    positives = _documents(units, number, corpus, "positive", _POSITIVES)
    negatives = _documents(units, number, corpus, "negative", _NEGATIVES)
    own = words.words(anchor) - usual
    theirs = {word for text, _ in positives for word in words.words(text)} - usual
    shared = {word for text, _ in negatives for word in words.words(text)}
    several = len(_rows(units, number, "positive"))
    if why == _NEAR and several > 1:
        why = f"{_NEAR} that margins are measured from"
    return Card(
        why=why,
        anchor_id=units.anchors["id"][at].as_py(),
        anchor=words.marked(anchor, own & (shared | theirs), set()),
        positives=[replace(one, pieces=words.marked(text, own, theirs & shared)) for text, one in positives],
        negatives=[replace(one, pieces=words.marked(text, own, theirs)) for text, one in negatives],
        positives_left_out=several - len(positives),
        negatives_left_out=int(units.counts[number]) - len(negatives),
    )


def _documents(units: Units, number: int, corpus: Rows, side: str, most: int) -> list[tuple[str, CardDocument]]:
    """Those with the best scores, and the reference positive: texts, shortened if long, and the facts shown with
    them."""
    every = _of(units, side, number)
    best = np.argsort(-every, kind="stable")[:most]
    references = np.flatnonzero(every == units.references[number])[-1:]
    if side == "negative" or len(every) == 1:  # a single positive is the reference without saying so
        references = references[:0]
    if not np.isin(references, best).all():
        best[-1:] = references
    ids, texts = (corpus.strings(name, _rows(units, number, side)[best]).to_pylist() for name in ("id", "text"))
    scores, ranks = (_of(units, side, number, column)[best].tolist() for column in ("scores", "ranks"))
    random = [False] * len(best)
    if side == "negative":
        random = (_of(units, side, number, "sources")[best] == SOURCES.index("random")).tolist()
    return [
        (
            text if len(text) <= _LETTERS else text[:_LETTERS] + " …",
            CardDocument(name, [], score, rank if rank >= 0 else None, drawn, at in references),
        )
        for at, name, text, score, rank, drawn in zip(best, ids, texts, scores, ranks, random, strict=True)
    ]


def _rows(units: Units, number: int, side: str) -> npt.NDArray[np.int64]:
    offsets = getattr(units, f"{side}_offsets")
    found: npt.NDArray[np.int64] = getattr(units, f"{side}s")[offsets[number] : offsets[number + 1]]
    return found


def _of(units: Units, side: str, number: int, column: str = "scores") -> npt.NDArray[np.float32]:
    offsets = getattr(units, f"{side}_offsets")
    found: npt.NDArray[np.float32] = getattr(units, f"{side}_{column}")[offsets[number] : offsets[number + 1]]
    return found
