"""Plots leak against hardness, one point per setting."""

from __future__ import annotations

from typing import TYPE_CHECKING

from negpipe.errors import count_of
from negpipe.review.calibrate.estimate import Calibration, Estimate
from negpipe.review.calibrate.recommend import Recommendation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # Okabe and Ito: distinguishable for the colour-blind
_MARKS = {"none": "o", "relative margin": "s", "absolute margin": "^", "max score": "D"}


def draw_leak(axes: Axes, calibration: Calibration, recommendation: Recommendation | None = None) -> None:
    """Draw every setting with the interval of its leak, the frontier, and the recommended setting.

    Args:
        axes: the axes to draw on; the caller saves the figure.
        calibration: the settings to draw.
        recommendation: adds the frontier and a ring; None: neither.
    """
    known = [one for one in calibration.estimates if None not in (one.leak, one.lo, one.hi, one.score)]
    strategies = list(dict.fromkeys(one.setting.sampling_strategy for one in known))
    kinds = [kind for kind in _MARKS if any(_kind(one) == kind for one in known)]
    for strategy, colour in zip(strategies, _COLOURS, strict=False):
        for kind in kinds:
            some = [one for one in known if one.setting.sampling_strategy == strategy and _kind(one) == kind]
            if some:
                x, y = [_percent(one.leak) for one in some], [one.score or 0.0 for one in some]
                reach = [
                    [max(0.0, at - _percent(one.lo)) for at, one in zip(x, some, strict=True)],
                    [max(0.0, _percent(one.hi) - at) for at, one in zip(x, some, strict=True)],
                ]
                axes.errorbar(
                    x, y, xerr=reach, fmt=_MARKS[kind], color=colour, elinewidth=0.6, markersize=5, alpha=0.8,
                    label=f"{strategy}, {'no cutoff' if kind == 'none' else kind}",
                )  # fmt: skip
    for one in known:
        if one.setting.range_min:
            where = (_percent(one.leak), one.score or 0.0)
            axes.annotate(f"{one.setting.range_min}", where, xytext=(4, 3), textcoords="offset points", fontsize=6)
    if recommendation is not None and recommendation.frontier:
        line = recommendation.frontier
        axes.plot([_percent(one.leak) for one in line], [one.score or 0.0 for one in line], color="#888888", zorder=0)
        if recommendation.chosen is not None:
            chosen = recommendation.chosen
            (ring,) = axes.plot([_percent(chosen.leak)], [chosen.score or 0.0], "ok", label="recommended")
            ring.set(markerfacecolor="none", markersize=13)
    axes.set_xlabel(f"leak: {_what(calibration.method)} among the negatives taken, % (bars: 95 % interval)")
    axes.set_ylabel("hardness: mean score of the negatives taken")
    axes.set_title(
        f"negatives per trial: {calibration.num_negatives}, {count_of(calibration.anchors, 'anchor')};"
        " numbers: range_min, if not 0"
    )
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="lower right")  # settings that leak a lot are hard: this corner is empty


def _kind(one: Estimate) -> str:
    for name in ("relative_margin", "absolute_margin", "max_score"):
        if getattr(one.setting, name) is not None:
            return name.replace("_", " ")
    return "none"


def _percent(value: float | None) -> float:
    return 100 * (value or 0.0)


def _what(method: str) -> str:
    names = {"hidden": "hidden positives", "near_anchors": "positives of near anchors"}
    return names.get(method, "documents that a second model ranks above the positive")
