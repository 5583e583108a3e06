"""Tables for people: quality, calibration, audit, training and differences."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from negpipe.cli.console import out
from negpipe.errors import count_of
from negpipe.review.audit import NEMO, Audit
from negpipe.review.calibrate import METHODS, Calibration, Estimate, Recommendation
from negpipe.review.calibrate.recommend import percent
from negpipe.review.diff import Change, Difference
from negpipe.review.quality import Distribution, Quality
from negpipe.review.wording import clean_text
from negpipe.stages import defects
from negpipe.train import ablation_page
from negpipe.train.ablation import TABLE, Ablation
from negpipe.train.comparison import METRICS, of_document

if TYPE_CHECKING:
    from negpipe.train.refresh import Refreshed

_SETTINGS = 10
"""Settings that a table of `calibrate` shows, besides the config's and the recommended one."""


def table(title: str, *columns: str) -> Table:
    """A table without borders; columns after the first are aligned to the right."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left")
    return made


def show_quality(found: Quality) -> None:
    """Metrics, ranks of the positives, and scores."""
    what = f"{count_of(found.anchors, 'anchor')}, {count_of(found.positives, 'positive')}, depth {found.depth}"
    metrics = table(what, "metric", "mean")
    for name, value in found.metrics.items():
        metrics.add_row(name, f"{value:.4f}")
    out.print(metrics)
    ranks = table("\nRanks of the positives", "rank", "positives", "share")
    for name, count in found.ranks.items():
        ranks.add_row(name, f"{count:,}", f"{count / max(1, found.positives):.1%}")
    out.print(ranks)
    scores = table("\nScores", "", "count", "mean", "std", "p5", "p25", "p50", "p75", "p95")
    for name, values in found.scores.items():
        scores.add_row(name, *_spread(values))
    out.print(scores)
    median = f"beyond rank {found.depth}" if found.median_rank is None else f"at rank {found.median_rank}"
    lines = [f"The median positive is {median}."]
    if found.outscored is not None:
        lines.append(
            f"{found.outscored:.1%} of the selected negatives, each once per anchor, score above its positive."
        )
    if found.separation is not None:
        lines.append(f"A positive scores above a random document in {found.separation:.1%} of cases.")
    lines += [f"{one.problem}: {one.remedy}." for one in defects.of(found.vectors)]
    out.print("\n" + "\n".join(lines), markup=False)


def _spread(values: Distribution) -> list[str]:
    numbers = [values.mean, values.std, *values.quantiles.values()]
    return [f"{values.count:,}", *("" if number is None else f"{number:.3f}" for number in numbers)]


def show_calibration(made: Calibration, advice: Recommendation, *, coverage: float, max_leak: float) -> None:
    """The settings worth choosing, then the recommendation."""
    out.print(f"{METHODS[made.method]}\n", markup=False)
    title = (
        f"{made.anchors:,} of {count_of(made.all_anchors, 'anchor')}, {count_of(made.trials, 'trial')},"
        f" negatives per trial: {made.num_negatives}"
    )
    rows = table(title, "sampling", "from", "cutoff", "leak", "lo", "hi", "score", "rank", "below", "cover", "")
    rows.padding = (0, 1, 0, 0)
    for column in rows.columns:
        column.no_wrap = True
    rows.columns[2].justify = rows.columns[-1].justify = "left"
    own = made.estimates[0]
    shown, which = _worth_choosing(made, advice)
    for one in shown:
        notes = {"config": one is own, "chosen": one is advice.chosen}
        note = ", ".join(name for name, holds in notes.items() if holds)
        style = "bold green" if one is advice.chosen else "" if one.coverage >= coverage else "dim"
        rows.add_row(*_cells(one), note, style=style)
    out.print(rows)
    out.print(
        f"\nShown: {which}\n"
        "from: range_min; leak, lo, hi: share of false negatives and its 95 % interval\n"
        "score, rank: of the negatives taken; below: distance below the positive\n"
        "cover: share of anchors that get all their negatives from the stored candidates alone, whichever positive is"
        " shown\nconfig: your setting; chosen: the one recommended below",
        style="dim",
    )
    out.print(
        f"\nYour setting: leak {percent(own.leak)}, with 95 % confidence {percent(own.lo)} to {percent(own.hi)};"
        f" coverage {percent(own.coverage)}"
    )
    if advice.chosen is None:
        best = max(one.coverage for one in made.estimates)
        out.print(
            f"No setting gives {coverage:.0%} of the anchors all their negatives; the best gives {best:.1%}:"
            " ask for fewer negatives, lower --coverage, or store deeper candidates (search.depth)"
        )
        return
    why = (
        f"the hardest setting whose leak is within {max_leak:.1%} even at the upper end, hi"
        if advice.allowed
        else f"the setting with the least leak, as none is within {max_leak:.1%} at the upper end, hi"
    )
    same = ", which is yours" if advice.chosen is own else ""
    out.print(f"Recommended at a coverage of {coverage:.0%}: {why}{same}")
    for line in advice.sure:
        out.print(f"- {line}", markup=False)
    if advice.chosen.setting.relative_margin is None and advice.chosen.setting.absolute_margin is None:
        out.print("- without a margin, negatives may score above their positive: audit counts them as above_positive")
    out.print(f"\n{advice.chosen.setting.yaml()}", markup=False)


def _worth_choosing(made: Calibration, advice: Recommendation) -> tuple[list[Estimate], str]:
    """At most `_SETTINGS` settings besides the config's and the recommended one, and which they are, in words."""
    own, *others = made.estimates
    if len(others) <= _SETTINGS:
        return made.estimates, "all settings tried"
    if advice.frontier:
        best, which = advice.frontier, "those that no other surpasses: whichever has harder negatives leaks more"
    else:
        best, which = sorted(others, key=lambda one: -one.coverage)[:_SETTINGS], "those that cover most anchors"
    at = {*range(len(best))}
    if len(best) > _SETTINGS:  # evenly, from the least leak to the hardest negatives
        at = {round(number * (len(best) - 1) / (_SETTINGS - 1)) for number in range(_SETTINGS)}
    shown = [one for number, one in enumerate(best) if one is not own and (number in at or one is advice.chosen)]
    tried = count_of(len(made.estimates), "setting")
    return [own, *shown], f"yours, and {len(shown)} of {tried}: {which}. --format csv or json prints all"


def _cells(one: Estimate) -> list[str]:
    setting = one.setting

    def shown(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    return [
        setting.sampling_strategy,
        str(setting.range_min),
        setting.cutoff,
        *(percent(share) for share in (one.leak, one.lo, one.hi)),
        shown(one.score, 3),
        shown(one.rank, 0),
        shown(one.distance, 3),
        percent(one.coverage),
    ]


def show_audit(found: Audit, failed: set[str], *, foreign: bool) -> None:
    """Counts of every check, and examples of what was found; for a `foreign` file, the points of NeMo's checklist."""
    compared = "the qrels and each other" if found.qrels else "each other (no qrels: pass a CONFIG to use its qrels)"
    out.print(
        f"{found.source}: {count_of(found.rows, 'row')}, {count_of(found.anchors, 'anchor')},"
        f" {count_of(found.positives, 'positive')} and {count_of(found.negatives, 'negative')}, compared to"
        f" {compared}\n",
        markup=False,
    )
    rows = table("", "check", "found", "share", "of", "")
    rows.title = None
    rows.columns[4].justify = "left"
    for one in found.findings:
        style = "bold red" if one.check in failed else "yellow" if one.count else ""
        if one.of:
            rows.add_row(one.check, f"{one.count:,}", f"{one.share:.2%}", f"{one.of:,}", one.unit, style=style)
        else:
            needed = "it needs a CONFIG" if one.check == "unknown_id" else "no column for it"
            rows.add_row(one.check, "", "", "", f"not checked: {needed}", style="dim")
    out.print(rows)
    if any("row" in example for one in found.findings for example in one.examples):
        out.print("\nRows are counted from 0.")
    for one in found.findings:
        if one.examples:
            out.print(f"\n{one.check}: {one.about}", style="bold", markup=False)
            for example in one.examples:
                out.print(clean_text(_example(example), 200), markup=False)
    if foreign:
        points = table("\nNeMo's checklist", "point", "checks")
        points.columns[1].justify = "left"
        for point, checks in NEMO.items():
            points.add_row(point, ", ".join(checks))
        out.print(points)


def show_training(stats: dict[str, Any], model: Path) -> None:
    """The training, the metrics before and after, and the result as the last line."""
    loss = " to ".join(f"{value:.4f}" for value in stats["loss"])
    steps = count_of(stats["steps"], "step")
    out.print(f"{steps} on {count_of(stats['rows'], 'row')}, loss {loss}. Model: {model}/\n", markup=False)
    compared = [of_document(document) for document in stats["compared"]]
    rows = table(
        count_of(stats["held_out_anchors"], "held-out anchor"), "", "before", "after", "difference", "95 %", ""
    )
    for one in compared:
        difference, interval = f"{one.after - one.before:+.4f}", f"{one.low:+.4f} to {one.high:+.4f}"
        rows.add_row(one.metric, f"{one.before:.4f}", f"{one.after:.4f}", difference, interval, one.verdict)
    out.print(rows)
    shared = stats["overlap"]
    out.print(
        f"\nAlso trained on: {shared['anchors_trained_on']:,} of {shared['anchors']:,} held-out anchors,"
        f" {shared['positives_trained_on']:,} of {shared['positives']:,} texts of their positives.\n",
        markup=False,
    )
    out.print(compared[0].line, markup=False, soft_wrap=True)


def show_ablation(made: Ablation) -> None:
    """Every arm, best first, and the verdict as the last line."""
    head, rows = ablation_page.HEAD, [*ablation_page.rows(made)]
    for title, first, last in (
        (count_of(made.anchors, "held-out anchor"), 1, 5),
        ("\nCompared", 5, 9),
        ("\nRows", 9, None),
    ):
        shown = table(title, *head[:1], *head[first:last])
        for row in rows:
            if any(row[first:last]):
                shown.add_row(*map(escape, (*row[:1], *row[first:last])))
        out.print(shown)
    files = ", ".join(str(made.folder / name) for name in (ablation_page.PAGE, ablation_page.MARKDOWN, TABLE))
    out.print(f"\n{ablation_page.about(made)}\n\nWritten: {files}\n", markup=False, style="dim")
    for cell, why in made.failed.items():
        out.print(f"No result: {cell}: {why}", markup=False, style="red")
    out.print(f"RESULT: {made.verdict}", markup=False, soft_wrap=True)


def show_rounds(made: Refreshed) -> None:
    """Every round compared to the model before it, and the best one to the base in the last line."""
    metric, base = METRICS[0], made.rounds[0].compared[0].before
    title = count_of(made.compared[0].anchors, "held-out anchor")
    rows = table(title, "round", metric, "difference", "95 %", "", "rows", "new", "leak", "")
    above = made.best.score > base
    rows.add_row("base", f"{base:.4f}", *[""] * 6, "" if above else "best")
    for one in made.rounds:
        first = one.compared[0]
        rows.add_row(
            str(one.number),
            f"{first.after:.4f}",
            f"{first.after - first.before:+.4f}",
            f"{first.low:+.4f} to {first.high:+.4f}",
            first.verdict,
            f"{one.rows:,}",
            "" if one.changed is None else percent(one.changed),
            percent(one.leak),
            "best" if above and one is made.best else "",
        )
    out.print(rows)
    anchors = count_of(made.best.leak_anchors, "anchor")
    notes = [
        "difference: to the previous model, with its 95 % interval. new: share of the negatives that the previous round"
        " did not have. leak: estimated share of false negatives, from"
        f" {anchors} with several positives."
    ]
    notes += [f"No leak: {reason}." for reason in dict.fromkeys(one.leak_missing for one in made.rounds) if reason]
    notes += [
        f"The vectors of round {one.number}'s model have {one.trained_dimension} dimensions; it was mined with vectors"
        f" of {one.dimension}."
        for one in made.rounds
        if one.dimension != one.trained_dimension
    ]
    out.print("\n" + "\n".join(notes), style="dim", markup=False)
    stopped = f"Stopped: {made.stopped}. " if made.stopped else ""
    out.print(f"\n{stopped}Model of round {made.best.number}: {made.model}/\n", markup=False)
    out.print(made.compared[0].line, markup=False, soft_wrap=True)


def _example(example: dict[str, Any]) -> str:
    row = f"row {example['row']}" if "row" in example else ""
    named = (
        f"{side} {example.get(f'{side}_id', '')} {clean_text(example.get(side, ''), 70)}".strip()
        for side in ("anchor", "document")
        if side in example or f"{side}_id" in example
    )
    return "  " + ": ".join(filter(None, [row, " | ".join(filter(None, [example.get("detail", ""), *named]))]))


def show_difference(found: Difference) -> None:
    """Both sides, what changed, the settings that differ, and examples."""
    sides = table("", "", "A", "B")
    sides.title = None
    sides.add_row("", clean_text(found.a.source), clean_text(found.b.source))
    for name in ("anchors", "negatives"):
        sides.add_row(name, *(f"{getattr(side, name):,}" for side in (found.a, found.b)))
    sides.add_row("mean score", *(_number(side.score, ".4f") for side in (found.a, found.b)))
    sides.add_row("mean rank", *(_number(side.rank, ".1f") for side in (found.a, found.b)))
    out.print(sides)
    every = max(1, found.kept + found.added + found.removed)
    changes = table(f"\n{count_of(found.common, 'anchor')} in common", "", "count", "share")
    for name, where in (("kept", "in both"), ("added", "only in B"), ("removed", "only in A")):
        count = getattr(found, name)
        changes.add_row(f"negatives {name}, {where}", f"{count:,}", f"{count / every:.1%}")
    changes.add_row("anchors with the same negatives", f"{found.same:,}", f"{found.same / found.common:.1%}")
    changes.add_row("anchors with none in common", f"{found.disjoint:,}", f"{found.disjoint / found.common:.1%}")
    out.print(changes)
    lines = [
        "share: of the negatives that either side has, or of these anchors.",
        f"Overlap {found.overlap:.1%}: per anchor, the negatives found on both sides as a share of all; averaged.",
    ]
    if found.score_shift is not None and f"{found.largest_score_shift:.4f}" != "0.0000":
        most = _number(found.largest_score_shift, ".4f")
        lines.append(f"Kept negatives: scores shift by {_shift(found.score_shift)} on average, by {most} at most.")
    if found.rank_shift:
        lines.append(f"Kept negatives: ranks shift by {found.rank_shift:+.1f} on average.")
    for what, count, names in (
        ("gained", found.gained, found.gained_ids),
        ("lost", found.lost, found.lost_ids),
    ):
        if count:
            lines.append(f"Anchors {what}: {count:,}, such as {', '.join(clean_text(name, 70) for name in names)}")
    out.print("\n" + "\n".join(lines), markup=False)
    if found.settings:
        settings = table("\nSettings that differ", "", "A", "B")
        for name, values in found.settings.items():
            settings.add_row(name, *(clean_text("null" if value is None else str(value), 60) for value in values))
        out.print(settings)
    elif found.settings is not None:
        out.print("\nNo settings differ.")
    _show_examples(found)


def _show_examples(found: Difference) -> None:
    if found.examples:
        out.print("\nAnchors that changed most: - only in A, + only in B.", markup=False)
    for example in found.examples:
        name = "" if example.anchor_id is None else f"{clean_text(example.anchor_id)} "
        out.print(f"\nanchor {name}{clean_text(example.anchor, 100)}", style="bold", markup=False)
        for sign, some, style in (("-", example.removed, "red"), ("+", example.added, "green")):
            for one in some:
                out.print(f"  {sign} {_change(one)}", style=style, markup=False)


def _change(one: Change) -> str:
    rank = "" if one.rank is None else f" rank {one.rank}"
    return f"{_number(one.score, '.3f')}{rank} {clean_text(one.id or '')} {clean_text(one.text, 80)}"


def _shift(value: float) -> str:
    """With its sign, but for one that rounds to zero."""
    return f"{value:+.4f}" if abs(value) >= 0.00005 else "0.0000"


def _number(value: float | None, digits: str) -> str:
    return "" if value is None else format(value, digits)
