"""What selection should do, in slow plain Python written from its description.

Shares no code with `negpipe.select.rules`: fates are names, one candidate is judged at a time, and draws use
-ln(u) / w itself, in decimals wide enough that no weight underflows.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from typing import Any

import numpy as np

EXCLUSIONS = ("POSITIVE_ID", "POSITIVE_TEXT", "POSITIVE_NORMALIZED", "SHARED_ANCHOR", "ANCHOR_TEXT")


def first_reason(reasons: set[str]) -> str | None:
    """The exclusion that counts when several hold."""
    return next((name for name in EXCLUSIONS if name in reasons), None)


def fates_of_unit(
    rows: list[int], scores: list[float], reasons: list[set[str]], p: float, u: list[float], rules: dict[str, Any]
) -> list[str]:
    """The name of the fate of each candidate of one unit; p is NaN where no margin applies."""
    fates: list[str | None] = []
    for row, score, found in zip(rows, scores, reasons, strict=True):
        fates.append("PADDING" if row == -1 else first_reason(found) or _cutoff(np.float32(score), p, rules))

    survivors = 0
    window = []
    for place, fate in enumerate(fates):
        if fate is not None:
            continue
        rank = place if rules["rank_over"] == "raw" else survivors
        survivors += 1
        if rank < rules["range_min"]:
            fates[place] = "BEFORE_WINDOW"
        elif rank >= rules["range_max"]:
            fates[place] = "AFTER_WINDOW"
        else:
            window.append(place)

    drawn = sorted(window, key=lambda place: (_draw(scores[place], p, u[place], place, rules), place))
    chosen = drawn[: rules["num_negatives"]]
    short = len(chosen) < rules["num_negatives"]
    for place in window:
        if place not in chosen:
            fates[place] = "NOT_SAMPLED"
        else:
            fates[place] = "SHORTAGE" if short and rules["on_shortage"] == "drop" else "TAKEN"
    return [str(fate) for fate in fates]


def _cutoff(s: np.float32, p: float, rules: dict[str, Any]) -> str | None:
    if not math.isfinite(s):
        return "INVALID_SCORE"
    strict = rules["strict"]

    def over(left: Any, right: Any) -> bool:
        return bool(left > right or (strict and left == right))

    if rules["max_score"] is not None and over(s, np.float32(rules["max_score"])):
        return "MAX_SCORE"
    if rules["min_score"] is not None and over(np.float32(rules["min_score"]), s):
        return "MIN_SCORE"
    if math.isnan(p):
        return None
    positive = np.float32(p)
    if rules["absolute_margin"] is not None and over(s + np.float32(rules["absolute_margin"]), positive):
        return "ABSOLUTE_MARGIN"
    if rules["relative_margin"] is not None:
        size = positive if positive >= 0 else -positive
        if over(s, positive - size * np.float32(rules["relative_margin"])):
            return "RELATIVE_MARGIN"
    return None


def _draw(score: float, p: float, u: float, place: int, rules: dict[str, Any]) -> Decimal:
    strategy = rules["sampling_strategy"]
    if strategy == "top":
        return Decimal(place)
    if strategy == "random":
        return Decimal(u)
    with localcontext(prec=40):
        if strategy == "weighted":
            exponent = Decimal(score) / Decimal(rules["temperature"])
        elif math.isnan(p):
            exponent = Decimal(0)
        else:
            distance = Decimal(score) - Decimal(p) - Decimal(rules["simans_b"])
            exponent = -Decimal(rules["simans_a"]) * distance * distance
        return -Decimal(u).ln() / exponent.exp()


def member(candidate: int, owned: list[int]) -> bool:
    """Whether a candidate is in its unit's list."""
    return any(candidate == value for value in owned)


def splitmix64(state: int) -> int:
    """The next output of SplitMix64 in this state, in exact integers."""
    wrap = 2**64
    z = (state + 0x9E3779B97F4A7C15) % wrap
    z = (z ^ (z // 2**30)) * 0xBF58476D1CE4E5B9 % wrap
    z = (z ^ (z // 2**27)) * 0x94D049BB133111EB % wrap
    return z ^ (z // 2**31)


def uniform(seed: int, anchor: int, document: int) -> float:
    """The number in (0, 1) of one candidate."""
    mixed = splitmix64(splitmix64(splitmix64(seed) ^ anchor) ^ document)
    return (mixed // 2**12 + 0.5) / 2**52
