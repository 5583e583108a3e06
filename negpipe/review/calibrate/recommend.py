"""Recommends a setting from a calibration: the frontier of leak against hardness, one setting on it, its certainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from negpipe.errors import count_of
from negpipe.review.calibrate.estimate import Calibration, Estimate

_FEW = 100  # number of anchors below which an interval is a guess


@dataclass(frozen=True)
class Recommendation:
    """A recommendation.

    Attributes:
        frontier: settings that reach the coverage such that no other one is harder without leaking more; least
            leak first.
        chosen: the hardest of them whose interval is within the allowed leak; if there is none, the
            one that leaks least. None: no setting reaches the coverage.
        allowed: whether `chosen` is within it.
        sure: how certain that is, in sentences.
    """

    frontier: list[Estimate]
    chosen: Estimate | None
    allowed: bool
    sure: list[str]


def recommend(calibration: Calibration, *, coverage: float, max_leak: float) -> Recommendation:
    """Choose a setting.

    Args:
        calibration: the calibration of all settings.
        coverage: least share of anchors that get all their negatives.
        max_leak: greatest upper end of the leak's interval.
    """
    frontier = frontier_of([one for one in calibration.estimates if one.coverage >= coverage])
    kept = [one for one in frontier if one.hi is not None and one.hi <= max_leak]
    chosen = (kept[-1] if kept else frontier[0]) if frontier else None
    sure = [] if chosen is None else _sure(calibration, chosen, max_leak)
    return Recommendation(frontier, chosen, bool(kept), sure)


def frontier_of(estimates: Sequence[Estimate]) -> list[Estimate]:
    """Estimates such that no other one has a higher mean score without more leak; least leak first."""
    known = [(one.leak, one.score, one) for one in estimates if one.leak is not None and one.score is not None]
    frontier: list[Estimate] = []
    hardest = float("-inf")
    for _, score, one in sorted(known, key=lambda item: (item[0], -item[1], item[2].setting.range_min)):
        if score > hardest:
            frontier.append(one)
            hardest = score
    return frontier


def _sure(calibration: Calibration, chosen: Estimate, max_leak: float) -> list[str]:
    tried = f"{calibration.anchors:,} of {calibration.all_anchors:,} anchors"
    lines = [
        f"leak {percent(chosen.leak)}, with 95 % confidence {percent(chosen.lo)} to {percent(chosen.hi)},"
        f" from {tried}, {count_of(calibration.trials, 'trial')} and {count_of(round(chosen.negatives), 'negative')}"
    ]
    if calibration.anchors < _FEW:
        lines.append(f"{count_of(calibration.anchors, 'anchor is', 'anchors are')} few: treat the interval as a guess")
    if not chosen.leaking:
        lines.append("no false negative was taken: the upper end is for the share of anchors with one (rule of three)")
        if chosen.hi is not None and chosen.hi > max_leak:
            enough = f": it takes {math.ceil(3 / max_leak):,}" if max_leak else ""
            lines.append(f"too few anchors to show that a leak is within {percent(max_leak)}{enough}")
    if calibration.anchors < calibration.all_anchors / 2:
        lines.append(f"only {tried} could be tried; the figures may not hold for the others")
    if calibration.method == "hidden":
        lines.append("all positives except one were hidden: known ones are excluded in a run, so less leaks")
    return lines


def percent(value: float | None) -> str:
    """A share as text."""
    return "?" if value is None else f"{value:.1%}"
