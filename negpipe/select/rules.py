"""Decides which candidates become negatives: pure functions on numpy arrays.

Every candidate of every unit gets exactly one code: it is taken, it is padding, or the first applicable reason why it
is not taken. So the counts of a unit add up to its candidates, and the same arrays give the same codes regardless of
how units are split into blocks.

A block is n units (anchors, or (anchor, positive) pairs) by k candidates. The column of a candidate is
its raw rank: 0-based, before any exclusion, -1 rows last. Ragged lists (the positives of each unit) are
`values` with `offsets` of shape (n + 1,) int64: unit i owns `values[offsets[i]:offsets[i + 1]]`. A slice
of longer offsets goes with the full values.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Rows = NDArray[np.int64]
Hashes = NDArray[np.uint64]
Scores = NDArray[np.float32]
Doubles = NDArray[np.float64]
Fates = NDArray[np.uint8]
_Key = TypeVar("_Key", np.int64, np.uint64)

_CELLS = 2**18  # comparisons at a time in `contains`: fits the cache
LONG = 128  # length of a list from which lookups are faster than comparisons


class Fate(IntEnum):
    """Fate of a candidate that no filter dropped; dropped ones have codes from `FILTERED` on."""

    TAKEN = 0
    PADDING = 1
    BEFORE_WINDOW = 2
    AFTER_WINDOW = 3
    NOT_SAMPLED = 4
    SHORTAGE = 5
    PREFERRED = 6


FILTERED = len(Fate)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How negatives are chosen from the candidates that no filter dropped.

    Attributes:
        range_min: first rank of the window.
        range_max: rank after the last of the window.
        rank_over: raw: rank among all candidates. survivors: rank among those that passed every filter.
        num_negatives: maximum number taken per unit.
        sampling_strategy: what is taken of the window. top: the first ranks. The others draw without replacement,
            each draw with probability proportional to w among those left; random: w = 1; simans:
            w = exp(-simans_a * (s - p - simans_b)^2), so simans_b > 0 puts the peak above the positive
            (SimANS, Zhou et al. 2022; w = 1 without p); weighted: w = softmax(s / temperature).
        temperature: above 0.
        on_shortage: drop: a unit with fewer than num_negatives gives up those it has. fail: selects like keep; the
            caller raises an error based on the counts.
    """

    range_min: int
    range_max: int
    num_negatives: int
    rank_over: Literal["raw", "survivors"] = "survivors"
    sampling_strategy: Literal["top", "random", "simans", "weighted"] = "top"
    simans_a: float = 1.0
    simans_b: float = 0.0
    temperature: float = 1.0
    on_shortage: Literal["keep", "drop", "fail"] = "keep"


def contains(
    candidates: NDArray[_Key], values: NDArray[_Key], offsets: Rows, lists: NDArray[np.int64] | None = None
) -> Mask:
    """Whether each candidate is in its unit's ragged list.

    Args:
        candidates: (n, k) rows or hashes.
        values: rows or hashes of all lists, at least 0.
        offsets: (m + 1,) int64.
        lists: (n,) int64, the list of each unit; None: unit i has list i.

    Returns:
        (n, k) bool. Short lists are compared value by value. A long one is sorted once for all units that share it, and
        searched: neither time nor memory grows with its length times the number of units or candidates.
    """
    n, k = candidates.shape
    lists = np.arange(n) if lists is None else lists
    found = np.zeros((n, k), np.bool_)
    lengths = np.diff(offsets)[lists]
    short = np.where(lengths > LONG, 0, lengths)
    ends = np.cumsum(short)
    step = max(1, _CELLS // max(1, k))
    for start in range(0, int(ends[-1]) if n else 0, step):
        at = np.arange(start, min(start + step, int(ends[-1])))
        unit = np.searchsorted(ends, at, side="right")
        owned = values[offsets[lists[unit]] + at - (ends[unit] - short[unit])]
        value, column = np.nonzero(candidates[unit] == owned[:, None])
        found[unit[value], column] = True
    long = np.flatnonzero(lengths > LONG)
    long = long[np.argsort(lists[long], kind="stable")]
    for sharing in np.split(long, np.flatnonzero(np.diff(lists[long])) + 1) if len(long) else ():
        ordered = np.sort(values[slice(*offsets[lists[sharing[0]] :][:2])])
        for start in range(0, len(sharing), step):
            units = sharing[start : start + step]
            place = np.minimum(np.searchsorted(ordered, candidates[units]), len(ordered) - 1)
            found[units] = ordered[place] == candidates[units]
    return found


def reference_positives(scores: Scores, offsets: Rows, which: Literal["min", "max"]) -> Rows:
    """The positive that sets each unit's margins.

    Args:
        scores: float32, the scores of all units' positives; NaN sorts before all numbers.
        offsets: (n + 1,) int64.
        which: min: the lowest of the unit's positives. max: the highest. Among equals, the first.

    Returns:
        (n,) int64, places in `scores`, -1 for a unit without positives.
    """
    counts = np.diff(offsets)
    keys = scores[offsets[0] : offsets[-1]]
    keys = np.where(np.isnan(keys), -np.inf, keys if which == "min" else -keys)
    order = offsets[0] + np.lexsort((keys, np.repeat(np.arange(len(counts)), counts)))
    places = np.full(len(counts), -1, np.int64)
    places[counts > 0] = order[offsets[:-1][counts > 0] - offsets[0]]
    return places


def reference_scores(scores: Scores, offsets: Rows, which: Literal["min", "max"]) -> Scores:
    """The scores of `reference_positives`: (n,) float32, NaN for a unit without positives."""
    return np.append(scores, np.float32(np.nan))[reference_positives(scores, offsets, which)]


def uniform(seed: int, anchor_hash: Hashes, document_hash: Hashes) -> Doubles:
    """A number in (0, 1) that depends only on (seed, anchor, document).

    The three are chained through the output function of SplitMix64 (Steele, Lea and Flood, "Fast splittable
    pseudorandom number generators", OOPSLA 2014, with the constants of Vigna's splitmix64.c at
    https://prng.di.unimi.it): h = mix(mix(mix(seed) ^ anchor) ^ document). Its upper 52 bits, centred, give
    the number, which is never 0 or 1.

    Args:
        seed: any integer, taken modulo 2^64.
        anchor_hash: (n,) uint64.
        document_hash: (n, k) uint64.

    Returns:
        (n, k) float64.
    """
    anchor = _mix(_mix(np.array([seed % 2**64], np.uint64)) ^ anchor_hash)
    bits = _mix(anchor[:, None] ^ document_hash)
    return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def _mix(state: Hashes) -> Hashes:
    z = state + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def select(
    rows: Rows,
    scores: Scores,
    reference: Scores,
    dropped: Fates,
    uniform: Doubles | None,
    rules: Rules,
    wanted: Rows | None = None,
) -> Fates:
    """The fate of every candidate. Those taken are in the order of their columns.

    Args:
        rows: (n, k) int64, -1 for no candidate.
        scores: (n, k) float32; values at padding are ignored.
        reference: (n,) float32, the positive score p; NaN if there is none.
        dropped: (n, k) uint8, the code of the filter that drops a candidate, or of a candidate that is taken without
            selection, else 0.
        uniform: (n, k) float64 in (0, 1); None for `top`, which draws nothing.
        rules: what to apply.
        wanted: (n,) int64, number taken per unit; None: `rules.num_negatives`.

    Returns:
        (n, k) uint8 codes.

    Raises:
        ValueError: the sampling strategy draws and `uniform` is None.
    """
    fates = dropped.copy()
    fates[rows < 0] = Fate.PADDING

    rank: NDArray[np.int32] = np.arange(rows.shape[1], dtype=np.int32)[None, :]
    if rules.rank_over == "survivors":
        rank = np.cumsum(fates == Fate.TAKEN, axis=1, dtype=np.int32) - np.int32(1)
    _drop(fates, rank < rules.range_min, Fate.BEFORE_WINDOW)
    _drop(fates, rank >= rules.range_max, Fate.AFTER_WINDOW)

    eligible, keys = fates == Fate.TAKEN, _keys(scores, reference[:, None], uniform, rules)
    numbers = np.full(len(rows), rules.num_negatives) if wanted is None else wanted
    taken = np.zeros(fates.shape, np.bool_)
    for number in np.unique(numbers[numbers > 0]).tolist():
        some = np.flatnonzero(numbers == number) if numbers.min() < number else slice(None)
        taken[some] = _take(eligible[some], None if keys is None else keys[some], number)
    _drop(fates, ~taken, Fate.NOT_SAMPLED)
    if rules.on_shortage == "drop":
        short = (taken.sum(axis=1) < numbers)[:, None]
        _drop(fates, short, Fate.SHORTAGE)
    return fates


def counts(fates: Fates, codes: int) -> NDArray[np.int64]:
    """Number of candidates per unit and code: (n, codes) int64; a row adds up to k."""
    counted = np.zeros((len(fates), codes), np.int64)
    step = max(1, _CELLS // max(1, fates.shape[1]))
    for start in range(0, len(fates), step):
        some = fates[start : start + step]
        cells = np.arange(len(some))[:, None] * codes + some
        counted[start : start + step] = np.bincount(cells.ravel(), minlength=len(some) * codes).reshape(-1, codes)
    return counted


def _drop(fates: Fates, dropped: Mask, reason: Fate) -> None:
    """Mark newly dropped candidates: the first reason stays."""
    np.copyto(fates, np.uint8(reason), where=(fates == Fate.TAKEN) & dropped)


def _keys(scores: Scores, p: Scores, uniform: Doubles | None, rules: Rules) -> Doubles | None:
    """Keys whose smallest are taken; None: the first columns are taken.

    The n smallest values of -ln(u) / w are a draw without replacement (Efraimidis and Spirakis, 2006). Its logarithm,
    ln(-ln(u)) - ln(w), has the same order and never underflows.
    """
    if rules.sampling_strategy == "top":
        return None
    if uniform is None:
        raise ValueError(f"sampling_strategy '{rules.sampling_strategy}' needs uniform numbers")
    if rules.sampling_strategy == "random":
        return uniform
    with np.errstate(invalid="ignore"):  # padding and invalid scores are already excluded
        if rules.sampling_strategy == "weighted":
            log_weight = scores.astype(np.float64) / rules.temperature
        else:
            log_weight = -rules.simans_a * (scores.astype(np.float64) - p - rules.simans_b) ** 2
            log_weight = np.where(np.isnan(p), 0.0, log_weight)
        return np.asarray(np.log(-np.log(uniform)) - log_weight)


def _take(eligible: Mask, keys: Doubles | None, num: int) -> Mask:
    """The `num` eligible candidates with the smallest keys of each unit, ties by column."""
    if keys is None or num >= eligible.shape[1]:
        return eligible & (np.cumsum(eligible, axis=1, dtype=np.int32) <= num)
    keys = np.where(eligible, keys, np.inf)
    last = np.partition(keys, num - 1, axis=1)[:, num - 1 : num]
    first: Mask = keys < last
    tied: Mask = eligible & (keys == last)
    room = num - first.sum(axis=1, keepdims=True)
    tied &= np.cumsum(tied, axis=1, dtype=np.int32) <= room
    return first | tied
