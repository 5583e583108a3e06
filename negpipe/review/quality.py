"""Measures how well the encoder retrieves the positives, from stored candidates: can mining find anything?

Metrics come from ir-measures (trec_eval's code, MS MARCO's for MRR). Conventions:

- The ranking is the stored one: by score, ties by row. trec_eval receives ranks, so it breaks no ties itself.
- It is truncated at the stored depth. Documents below count as not found, which does not affect MRR@10, nDCG@10 and
  Recall@k for k up to the depth; MAP is that of the truncated ranking, as its name says.
- The relevant documents of an anchor are its positives in `data.split`. Only nDCG uses grades: a positive's gain is
  its grade, rounded down, at least 1. Rows are unique texts: ids that share a text are one document.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from negpipe import ann
from negpipe.data.arrays import Floats, Ints
from negpipe.data.candidates import Candidates
from negpipe.data.tables import ragged
from negpipe.select.selector import Units

_CUTOFFS = (1, 5, 10, 50, 100)
_RANKS = (0, 1, 5, 10, 50, 100)
_ANCHORS = 1000  # anchors whose rankings are Python objects at a time
_BINS = 60
_RANDOM_ANCHORS, _RANDOM_EACH = 10_000, 5


@dataclass(frozen=True)
class Distribution:
    """A summary of numbers.

    Attributes:
        quantiles: at 5, 25, 50, 75 and 95 %, by name (`p5`).
        edges: (b + 1,) edges of the histogram's bins, the last bin closed.
        counts: (b,) count per bin.
    """

    count: int
    mean: float | None
    std: float | None
    quantiles: dict[str, float]
    edges: list[float]
    counts: list[int]


@dataclass(frozen=True)
class Quality:
    """The measurements.

    Attributes:
        depth: candidates per anchor that were considered.
        metrics: means over the anchors, by name: Recall@k, MRR@10, nDCG@10, MAP@depth.
        ranks: positives by raw rank: `0`, `1-4`, …, and `beyond` the depth.
        median_rank: of the positives; None if it is beyond the depth.
        scores: of (anchor, document) pairs: positive, negative (as selected by the config), random, and the
            positive's minus the negative's. Cosines if `encoder.normalize` is set.
        outscored: share of negatives that score above the positive their margins refer to.
        vectors: counts from encode: texts cut at the maximum length, documents with equal vectors.
        separation: probability that a random positive scores higher than a random document.
    """

    anchors: int
    positives: int
    depth: int
    metrics: dict[str, float]
    ranks: dict[str, int]
    median_rank: int | None
    scores: dict[str, Distribution]
    outscored: float | None
    separation: float | None
    vectors: Mapping[str, Any] = field(default_factory=dict)


def measure(slices: Iterable[tuple[Candidates, Units]], random: Floats, depth: int) -> Quality:
    """Measure the encoder on all anchors.

    Args:
        slices: the candidates of all anchors with their selection; keeps one float32 per score, but no candidates.
        random: scores of random pairs, from `random_scores`.
        depth: candidates per anchor to consider, at most the stored depth.
    """
    totals: Counter[str] = Counter()
    anchors = 0
    ranks, positives, negatives, references = ([np.empty(0, kind)] for kind in (np.int64, *[np.float32] * 3))
    for found, units in slices:
        grades, _ = ragged(units.anchors["grades"])
        for low in range(0, len(found.rows), _ANCHORS):
            high = min(low + _ANCHORS, len(found.rows))
            own = slice(found.offsets[low], found.offsets[high])
            totals.update(
                _metrics(
                    found.rows[low:high, :depth],
                    found.positives[own],
                    found.offsets[low : high + 1] - found.offsets[low],
                    grades[own],
                )
            )
        anchors += len(found.rows)
        ranks.append(np.where(units.positive_ranks < depth, units.positive_ranks, -1))
        positives.append(found.positive_scores)
        negatives.append(units.negative_scores)
        references.append(np.repeat(units.references, units.counts))
    rank, positive, negative, reference = map(np.concatenate, (ranks, positives, negatives, references))
    ordered = np.sort(np.where(rank < 0, depth, rank))
    middle = int(ordered[(len(ordered) - 1) // 2]) if len(ordered) else depth
    return Quality(
        anchors=anchors,
        positives=len(rank),
        depth=depth,
        metrics={name: total / max(1, anchors) for name, total in totals.items()},
        ranks=_rank_counts(rank, depth),
        median_rank=middle if middle < depth else None,
        scores={
            "positive": distribution(positive),
            "negative": distribution(negative),
            "random": distribution(random),
            "positive - negative": distribution(reference - negative),
        },
        outscored=float(np.mean(negative > reference)) if len(negative) else None,
        separation=_separation(positive, random),
    )


def random_scores(anchors: Sequence[Path], documents: Sequence[Path], searchable: int, seed: int) -> Floats:
    """Scores of random (anchor, document) pairs: at most 10,000 anchors evenly spaced, 5 documents each by seed.

    Args:
        anchors: .npy parts of the anchors' vectors.
        documents: .npy parts of the documents' vectors, in row order.
        searchable: number of documents, from the first on, that can be candidates.
        seed: any nonnegative integer.

    Returns:
        (n,) float32.
    """
    parts = [ann.open_parts([path]) for path in anchors]
    step = max(1, sum(part.rows for part in parts) // _RANDOM_ANCHORS)
    vectors = np.concatenate([part.take(np.arange(0, part.rows, step)) for part in parts])
    owner = np.repeat(np.arange(len(vectors)), _RANDOM_EACH)
    rows = np.random.default_rng(seed).integers(searchable, size=len(owner))
    return ann.score_pairs(vectors, ann.open_parts(documents), (owner, rows))


def distribution(values: Floats) -> Distribution:
    """Count, mean, spread, quantiles and histogram of the finite values."""
    wide = values[np.isfinite(values)].astype(np.float64)
    if not len(wide):
        return Distribution(0, None, None, {}, [], [])
    counts, edges = np.histogram(wide, bins=_BINS)
    named = zip((5, 25, 50, 75, 95), np.percentile(wide, [5, 25, 50, 75, 95]).tolist(), strict=True)
    return Distribution(
        len(wide),
        float(wide.mean()),
        float(wide.std()),
        {f"p{share}": value for share, value in named},
        edges.tolist(),
        counts.tolist(),
    )


def _metrics(rows: Ints, positives: Ints, offsets: Ints, grades: npt.NDArray[Any]) -> dict[str, float]:
    """Sums over some anchors of every metric, by name."""
    depth = rows.shape[1]
    recall = [f"Recall@{k}" for k in sorted({*(k for k in _CUTOFFS if k < depth), depth})]
    found = of_each([*recall, "MRR@10", "nDCG@10", f"MAP@{depth}"], rows, positives, offsets, grades)
    return {name: sum(values.tolist()) for name, values in found.items()}


def of_each(
    metrics: Sequence[str], rows: Ints, positives: Ints, offsets: Ints, grades: npt.NDArray[Any]
) -> dict[str, npt.NDArray[np.float64]]:
    """(n,) values of every metric for each anchor.

    Args:
        metrics: Recall@k, MRR@k, nDCG@k, MAP@k.
        rows: (n, depth) ranking, -1 beyond the corpus.
        positives: relevant rows of all anchors, ragged by `offsets` (n + 1,), with their `grades`.
    """
    import ir_measures

    kinds = {"Recall": "R", "MRR": "RR", "nDCG": "nDCG", "MAP": "AP"}
    named = {ir_measures.parse_measure(f"{kinds[name]}@{k}"): f"{name}@{k}" for name, _, k in map(_parted, metrics)}
    down = [float(score) for score in range(rows.shape[1], 0, -1)]
    run = {str(at): dict(zip(map(str, row[row >= 0].tolist()), down, strict=False)) for at, row in enumerate(rows)}
    gains = np.maximum(1, grades.astype(np.float64)).astype(np.int64)
    qrels = {
        str(at): dict(zip(map(str, positives[low:high].tolist()), gains[low:high].tolist(), strict=True))
        for at, (low, high) in enumerate(pairwise(offsets.tolist()))
    }
    values = {name: np.zeros(len(rows)) for name in metrics}
    for found in ir_measures.iter_calc(list(named), qrels, run):
        values[named[found.measure]][int(found.query_id)] = found.value
    return values


def _parted(metric: str) -> tuple[str, str, str]:
    return metric.partition("@")


def _rank_counts(ranks: Ints, depth: int) -> dict[str, int]:
    edges = [edge for edge in _RANKS if edge < depth] + [depth]
    counts = {
        f"{low}" if high == low + 1 else f"{low}-{high - 1}": int(np.sum((ranks >= low) & (ranks < high)))
        for low, high in pairwise(edges)
    }
    return counts | {"beyond": int(np.sum(ranks < 0))}


def _separation(positive: Floats, random: Floats) -> float | None:
    """The area under the ROC curve: P(positive > random) + P(equal) / 2."""
    if not len(positive) or not len(random):
        return None
    ordered = np.sort(random)
    below, upto = (np.searchsorted(ordered, positive, side=side).mean() for side in ("left", "right"))
    return float((below + upto) / 2 / len(ordered))
