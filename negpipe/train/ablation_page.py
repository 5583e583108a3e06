"""The table of an ablation: for the terminal, as Markdown, and as an HTML page with figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np

from negpipe import __version__
from negpipe.review.report import plots
from negpipe.review.wording import duration
from negpipe.store.files import publish, write_all
from negpipe.train.comparison import METRICS
from negpipe.train.evaluation import BEST

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from negpipe.train.ablation import Ablation
    from negpipe.train.effects import Effect

MARKDOWN, PAGE = "ablation.md", "ablation.html"
_FIRST = METRICS[0]
_JUDGED = ("difference", "95 %", "p", "p best", "leak", "distance", "coverage")
HEAD = ("arm", *METRICS, *_JUDGED, "rows", "steps", "seeds", "time")
"""The columns of the table."""


def rows(found: Ablation) -> Iterator[list[str]]:
    """A row per base, then one per arm, best first."""
    bases = dict.fromkeys(tuple(base.values()) for base in found.bases.values())
    for values in bases:
        arms = [arm for arm, base in found.bases.items() if tuple(base.values()) == values]
        name = "base" if len(bases) == 1 else f"base of {', '.join(arms)}"
        yield [name, *(f"{value:.4f}" for value in values), *[""] * (len(HEAD) - len(METRICS) - 1)]
    for one in found.effects:
        facts, spread = found.facts[one.arm], one.spreads[_FIRST]
        leak, distance = facts["leak"], facts["distance"]
        yield [
            one.arm,
            f"{one.means[_FIRST]:.4f}" + ("" if spread is None else f" ±{spread:.4f}"),
            *(f"{one.means[name]:.4f}" for name in METRICS[1:]),
            f"{one.difference:+.4f}",
            f"{one.low:+.4f} to {one.high:+.4f}",
            _p(one.p_base),
            "" if one.p_leader is None else _p(one.p_leader),
            "" if leak is None else f"{leak:.1%}",
            "" if distance is None else f"{distance:.3f}",
            "" if facts["coverage"] is None else f"{facts['coverage']:.0%}",
            f"{facts['rows']:,.0f}",
            f"{facts['steps']:,.0f}",
            str(one.seeds),
            duration(facts["seconds"]),
        ]


def about(found: Ablation) -> str:
    """Explains the columns."""
    counts = sorted({found.facts[one.arm]["steps"] for one in found.effects})
    apart = (
        f" Arms were trained for {counts[0]:,.0f} to {counts[-1]:,.0f} steps: an epoch of more rows is longer. Set"
        " train.steps to train all equally."
        if len(counts) > 1
        else ""
    )
    return (
        f"Means over {found.anchors:,} held-out anchors and the seeds; ± is the standard deviation of the seeds' means."
        f" Difference: in {_FIRST} from the base, with its paired interval over anchors. p: of no difference from the"
        " base, and from the best arm, between the trained models, by a paired permutation test corrected for the"
        " number of arms (Holm); ± shows how much other seeds would differ. Leak: expected share of false negatives,"
        " as calibrate measures it. Distance: mean score of the positives minus that of the negatives; small is hard."
        f" Coverage: share of anchors with all their negatives. Time: selection and training.{apart}"
    )


def write(found: Ablation, settings: dict[str, str]) -> None:
    """Write both files next to the cells; `settings` describes the changes of each arm."""
    table = [[*HEAD], *rows(found)]
    lines = [" | ".join(map(_escaped, row)) for row in table]
    lines.insert(1, "|".join(["---", *["---:"] * (len(table[0]) - 1)]))
    text = f"# Ablation\n\n{found.verdict}\n\n{about(found)}\n\n" + "\n".join(f"| {line} |" for line in lines) + "\n"
    for name, data in {MARKDOWN: text, PAGE: _page(found, settings)}.items():
        publish(found.folder, name, partial(write_all, data=data.encode()))


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


def _p(value: float) -> str:
    return "< .001" if value < 0.001 else f"{value:.3f}".removeprefix("0")


def _page(found: Ablation, settings: dict[str, str]) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    style = (files("negpipe.review.report") / "assets/page.css").read_text(encoding="utf-8")
    template = (files("negpipe.train") / "assets/ablation.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        found=found,
        version=__version__,
        about=about(found),
        head=HEAD,
        rows=[*rows(found)],
        figures=[*_figures(found)],
        settings=settings,
        style=Markup(style),
    )


def _figures(found: Ablation) -> Iterator[plots.Figure]:
    def made(
        title: str, paint: Callable[[Axes], object], caption: str, size: tuple[float, float] = plots.SMALL
    ) -> plots.Figure:
        return plots.Figure(title, plots.figure(title, paint, size), caption, wide=size[0] > plots.SMALL[0])

    yield made(
        "Effect",
        partial(_effects, found=found),
        f"Difference in {_FIRST} from the base, best arm first, with its 95 % interval; dots are the seeds.",
        (8.0, 1.0 + 0.35 * len(found.effects)),
    )
    for name, label in (("leak", "leak"), ("distance", "mean score of positives minus negatives")):
        if any(found.facts[one.arm][name] is not None for one in found.effects):
            yield made(
                f"Effect against {name}",
                partial(_against, found=found, name=name, label=label),
                {
                    "leak": "Further left, fewer false negatives are taken.",
                    "distance": "Further left, the negatives are harder.",
                }[name],
            )
    for side in ("before", "after") if found.cells[found.effects[0].arm][0].best else ():
        yield made(
            f"Scores {side}",
            partial(_scores, found=found, side=side),
            "The highest score of a positive and of another document, for every held-out anchor that has one in its"
            " first 100, by " + ("the base." if side == "before" else f"the first model of '{found.effects[0].arm}'."),
        )
    yield made("Loss", partial(_losses, found=found), "First seed, mean over a tenth of the steps.")


def _effects(axes: Axes, found: Ablation) -> None:
    shown = found.effects[::-1]
    for at, one in enumerate(shown):
        axes.plot([one.low, one.high], [at, at], color=plots.BLUE)
        axes.plot(one.difference, at, "o", color=plots.BLUE)
        own = [np.mean(cell.scores[_FIRST] - cell.base[_FIRST]) for cell in found.cells[one.arm]]
        axes.plot(own, np.full(len(own), at + 0.25), ".", color=plots.GREY)
    axes.axvline(0, color="#888888", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [one.arm for one in shown])
    axes.set(xlabel=f"{_FIRST}, difference from the base")


def _against(axes: Axes, found: Ablation, name: str, label: str) -> None:
    for one in found.effects:
        if (value := found.facts[one.arm][name]) is not None:
            _bar(axes, value, one)
            axes.annotate(one.arm, (value, one.difference), (4, 4), textcoords="offset points", fontsize=7)
    axes.axhline(0, color=plots.GREY, linewidth=0.8)
    axes.margins(x=0.15)
    axes.set(xlabel=label, ylabel="difference")


def _bar(axes: Axes, value: float, one: Effect) -> None:
    axes.plot([value, value], [one.low, one.high], color=plots.BLUE, linewidth=0.8)
    axes.plot(value, one.difference, "o", color=plots.ORANGE)


def _scores(axes: Axes, found: Ablation, side: str) -> None:
    """Both sides with the same bins, so that they can be compared."""
    best = found.cells[found.effects[0].arm][0].best
    every = np.concatenate([*best.values()])
    edges = np.linspace(np.nanmin(every), np.nanmax(every), 41)
    for name, colour in zip(BEST, (plots.GREEN, plots.ORANGE), strict=True):
        values = best[f"{name}_{side}"]
        shown = values[np.isfinite(values)]
        label = name.removeprefix("best_") + "s"
        axes.hist(shown, edges.tolist(), color=colour, alpha=0.4, label=label if name == BEST[0] else "other documents")
    axes.set(xlabel="score", ylabel="anchors")
    axes.legend(loc="upper left")


def _losses(axes: Axes, found: Ablation) -> None:
    for arm, cells in found.cells.items():
        losses = cells[0].losses
        width = max(1, len(losses) // 10)
        means = np.convolve(losses, np.full(width, 1 / width), "valid")
        axes.plot(np.arange(width, len(losses) + 1), means, label=arm, linewidth=1)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend(fontsize=6)
