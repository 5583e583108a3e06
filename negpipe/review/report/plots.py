"""The figures, as SVG embedded in the page, with the page's colours, so that they work in light and dark mode."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from negpipe.review import calibrate
from negpipe.review.calibrate import Calibration
from negpipe.review.quality import Distribution, Quality

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCORES, APART, RANKS = "Similarity", "Positive minus negative", "Rank of the positives"
PER_ANCHOR = "Negatives per anchor"
DROPS, HUBS, LEAK = "Candidates dropped, by reason", "Hubs", "Leak against hardness"
WIDE, SMALL = (8.0, 5.0), (4.6, 2.9)
_JOINED = 3  # bins of a distribution per bin of the figure
# These colours are replaced by the page's; they include those of `calibrate.draw_leak`.
_COLOURS = {
    "#000000": "currentColor",
    "#0072b2": "var(--blue)",
    "#d55e00": "var(--orange)",
    "#009e73": "var(--green)",
    "#cc79a7": "var(--pink)",
    "#888888": "var(--grey)",
}
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#888888"
SIDES = {
    "positive": ("positives", GREEN),
    "negative": ("negatives", ORANGE),
    "random": ("random pairs", GREY),
}
DIFFERENCE = "positive - negative"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "text.parse_math": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), "#000000"),
}


@dataclass(frozen=True)
class Figure:
    """An SVG element with its title and caption. `wide`: it spans the page."""

    title: str
    svg: str
    caption: str
    wide: bool


def draw(
    measured: Quality,
    negatives: npt.NDArray[np.int64],
    drops: Mapping[str, int],
    hubs: npt.NDArray[np.int64],
    calibration: Calibration | None,
) -> dict[str, str]:
    """Draw every figure.

    Args:
        measured: scores and ranks of the anchors used.
        negatives: number per anchor.
        drops: reason → candidates.
        hubs: number of anchors per document that is a negative.
        calibration: None: no such figure.

    Returns:
        title → SVG element, in the order of the page.
    """
    paints: dict[str, Callable[[Axes], object]] = {
        SCORES: lambda axes: _scores(axes, measured),
        APART: lambda axes: _apart(axes, measured),
        RANKS: lambda axes: _ranks(axes, measured),
        PER_ANCHOR: lambda axes: _per_anchor(axes, negatives),
        DROPS: lambda axes: _drops(axes, drops),
        HUBS: lambda axes: _hubs(axes, hubs),
    }
    if calibration is not None:
        paints[LEAK] = lambda axes: calibrate.draw_leak(axes, calibration)
    return {title: figure(title, paint, WIDE if title == LEAK else SMALL) for title, paint in paints.items()}


def figure(title: str, paint: Callable[[Axes], object], size: tuple[float, float]) -> str:
    """An SVG element for a page with `page.css`; `size` in inches, `title` identifies it within the page."""
    import matplotlib.figure

    # Salted with the title: equal figures are equal files, and no two figures of a page share an id.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}):
        drawn = matplotlib.figure.Figure(figsize=size, layout="constrained")
        paint(drawn.subplots())
        target = io.StringIO()
        drawn.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    return _inline(target.getvalue())


def _inline(svg: str) -> str:
    """The SVG element alone, without ids that would be duplicated, in the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\s*<style .*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(<svg [^>]*?) width="[^"]*" height="[^"]*"', r'\1 aria-hidden="true" focusable="false"', svg)
    for drawn, shown in _COLOURS.items():
        svg = svg.replace(drawn, shown)
    return svg


def _scores(axes: Axes, measured: Quality) -> None:
    for side, (name, colour) in SIDES.items():
        _density(axes, measured.scores[side], colour, name)
    axes.set(xlabel="score", ylabel="density", yticks=[])
    axes.legend(loc="upper right")


def _apart(axes: Axes, measured: Quality) -> None:
    """In a figure of its own: differences are closer together than scores, and their peak would flatten those."""
    _density(axes, measured.scores[DIFFERENCE], BLUE)
    axes.set(xlabel="difference of their scores", ylabel="density", yticks=[])


def _density(axes: Axes, found: Distribution, colour: str, name: str | None = None) -> None:
    if found.count:
        edges, counts = (
            np.array(found.edges)[::_JOINED],
            np.add.reduceat(found.counts, range(0, len(found.counts), _JOINED)),
        )
        axes.stairs(counts / counts.sum() / np.diff(edges), edges, color=colour, fill=True, alpha=0.25)
        axes.stairs(counts / counts.sum() / np.diff(edges), edges, color=colour, label=name)


def _ranks(axes: Axes, measured: Quality) -> None:
    _bars(axes, list(measured.ranks), list(measured.ranks.values()), GREEN)
    axes.set(xlabel="rank (0 is the nearest document)", ylabel="positives")


def _per_anchor(axes: Axes, negatives: npt.NDArray[np.int64]) -> None:
    values, counts = np.unique(negatives, return_counts=True)
    if len(values) <= 12:
        _bars(axes, [str(value) for value in values], counts.tolist(), ORANGE)
    else:
        axes.hist(negatives, bins=30, color=ORANGE)
    axes.set(xlabel="negatives", ylabel="anchors")


def _drops(axes: Axes, drops: Mapping[str, int]) -> None:
    names = [name.replace("_", " ") for name in drops]
    bars = axes.barh(names, list(drops.values()), color=BLUE)
    axes.bar_label(bars, [f"{count:,}" for count in drops.values()], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set(xlabel="candidates", xticks=[])


def _hubs(axes: Axes, hubs: npt.NDArray[np.int64]) -> None:
    top = int(hubs.max(initial=1))
    # Bins that double: 1, 2-3, 4-7, …
    edges = 2 ** np.arange(int(np.log2(top)) + 2)
    counts = np.histogram(hubs, edges)[0].tolist()
    names = [f"{low}" if high == low + 1 else f"{low}-{high - 1}" for low, high in pairwise(edges)]
    _bars(axes, names, counts, ORANGE)
    axes.set(xlabel="anchors it is a negative for", ylabel="documents")


def _bars(axes: Axes, names: list[str], counts: list[int], colour: str) -> None:
    bars = axes.bar(names, counts, color=colour)
    axes.bar_label(bars, [f"{count:,}" for count in counts], padding=2, fontsize=7)
    axes.set_yticks([])
    if len(names) > 8:
        axes.tick_params(axis="x", labelrotation=30)
