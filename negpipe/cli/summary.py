"""Summaries that commands print to standard output: samples, scores, drops, states, fates."""

from __future__ import annotations

import math
import re
from datetime import datetime
from typing import Any

from rich.table import Table
from rich.text import Text

from negpipe.cli import console
from negpipe.cli.app import program
from negpipe.config.schema import Mining
from negpipe.engine.stage import Graph
from negpipe.engine.state import State
from negpipe.errors import count_of
from negpipe.graph import Result
from negpipe.ingest.rejected import NAME as REJECTED
from negpipe.review import wording
from negpipe.review.explain import Explanation, Unit
from negpipe.review.wording import clean_text
from negpipe.stages.shortage import advice, is_short, negatives_of

_SAMPLE_TEXTS = 5
_OTHER_MARGIN = 0.1  # suggested as a variant
_MANY, _NEARLY_ALL = 0.25, 0.95  # shares: of candidates that margins dropped, of the requested negatives
_STYLE = {
    "current": "green",
    "missing": "dim",
    "blocked": "dim",
    "partial": "yellow",
    "stale": "yellow",
    "damaged": "red",
}


def show_result(result: Result, typed: str, mining: Mining) -> None:
    """Location of the rows, samples, scores, drops and next steps; `typed`: the run's name in commands."""
    stats = result.stats["triplets"]
    if not result.ran:
        console.out.print("Nothing to do: every stage is up to date.")
    files = len(result.store.entries("triplets"))
    place = result.store.place("triplets")
    console.out.print(
        f"\n{count_of(stats['rows'], 'row')} in {count_of(files, 'Parquet file')}: {place}{'/' * ('://' not in place)}",
        markup=False,
        soft_wrap=True,
    )
    if count := result.stats["ingest"]["rejected_rows"]:
        console.out.print(
            f"{count_of(count, 'source row')} rejected: {result.store.place(REJECTED)}", markup=False, soft_wrap=True
        )
    if result.ran:
        _show_samples(result)
    _show_scores(stats["scores"])
    _show_drops(stats)
    _show_next(result, typed, mining)


def _show_samples(result: Result) -> None:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    for path in map(result.store.path, result.store.entries("triplets")):
        batch = next(pq.ParquetFile(path).iter_batches(4096), None)
        if batch is None or not batch.num_rows:
            continue
        at = sorted({0, batch.num_rows // 2, batch.num_rows - 1})
        console.out.print("\nSamples")
        for row in batch.take(at).to_pylist():
            # A ranking with positives (n-tuple) has them among its negatives, including those of other rows.
            own = batch.filter(pc.equal(batch["anchor"], row["anchor"]))["positive"].to_pylist()
            for name, text, score, rank in _documents(row, own)[:_SAMPLE_TEXTS]:
                line = Text(f"  {name:8}", style={"positive": "green", "negative": "red"}.get(name, "bold"))
                about = "" if score is None else f" {score:.3f}"
                if name == "anchor" and "anchor_id" in row:  # for `negpipe explain`
                    about = f" {clean_text(row['anchor_id'])} "
                line.append(f"{about}{'' if rank is None else f' rank {rank}'} ", style="dim")
                line.append(clean_text(text, 120), style="default")
                console.out.print(line)
            console.out.print()
        return


def _documents(row: dict[str, Any], positives: list[Any]) -> list[tuple[str, str, float | None, int | None]]:
    """The documents of a row of any format: side, text, score and rank, if the row has them."""
    if "labels" in row:
        texts, labels = row["positive"], row["labels"]
        scores, ranks = row.get("scores"), row.get("ranks")
    elif "label" in row:
        texts, labels = [row["positive"]], [row["label"]]
        scores, ranks = [row.get("score")], [row.get("rank")]
    elif "negative" in row:
        texts, labels = [row["positive"], row["negative"]], [1, 0]
        scores, ranks = [row.get("positive_score"), row.get("negative_score")], [None, row.get("negative_rank")]
    else:
        negatives = [name for name in row if re.fullmatch(r"negative_\d+", name)]
        texts = [row["positive"], *(row[name] for name in negatives)]
        labels = [int(text in positives) for text in texts]
        scores, ranks = row.get("scores"), row.get("ranks")
    nothing = [None] * len(texts)
    sides = ["positive" if label else "negative" for label in labels]
    documents = zip(sides, texts, scores or nothing, ranks or nothing, strict=True)
    return [("anchor", row["anchor"], None, None), *documents]


def _show_scores(scores: dict[str, Any]) -> None:
    table = Table(title="Scores", title_justify="left", box=None, pad_edge=False)
    for column in ("", "count", "mean", "std", "min", "max"):
        table.add_column(column, justify="right" if column else "left")
    for side, summary in scores.items():
        values = [f"{summary[name]:.3f}" for name in ("mean", "std", "min", "max")] if summary["count"] else []
        table.add_row(f"{side}s", f"{summary['count']:,}", *values)
    console.out.print(table)


def _show_drops(stats: dict[str, Any]) -> None:
    table = Table(title="\nCandidates", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    table.add_column("count", justify="right")
    table.add_column("share", justify="right")
    rows = {"seen": stats["candidates"], "taken": stats["negatives"]}
    if stats["own_positives"]:
        rows["ranked: own positives"] = stats["own_positives"]
    if stats.get("preferred_negatives"):
        rows["before: given or judged"] = stats["preferred_negatives"]
    rows |= {f"dropped: {name.replace('_', ' ')}": count for name, count in stats["drops"].items()}
    for label, count in rows.items():
        table.add_row(label, f"{count:,}", f"{count / max(1, stats['candidates']):.1%}")
    console.out.print(table)
    if stats["texts_compared"]:
        seconds = f"{stats['seconds_comparing']:,.1f} s"
        pairs = count_of(stats["texts_compared"], "pair")
        console.out.print(f"{pairs} of texts compared for near duplicates, in {seconds}.")
    if stats["short_anchors"]:
        short = count_of(stats["short_anchors"], "anchor has", "anchors have")
        console.out.print(f"{short} fewer negatives than requested: `negpipe.Run(…).ledger()` lists them.")


def _show_next(result: Result, typed: str, mining: Mining) -> None:
    stats, command = result.stats["triplets"], program()
    several = result.stats["ingest"]["positives"] > result.stats["ingest"]["anchors"]  # calibrate hides one of them
    check = ("settings for a given leak", "calibrate") if several else ("check the rows", "audit")
    lines = [(check[0], f"{command} {check[1]} {typed}")]
    if is_short(stats):
        lines.insert(0, ("more rows", advice(stats)))
    elif several and mining.margin_reference == "min" and _by_margins(stats) > _MANY:
        lines.insert(0, ("harder, from each positive", f"{command} mine {typed} --set mining.margin_reference=each"))
    elif (mining.relative_margin or 0) < _OTHER_MARGIN and negatives_of(stats) > _NEARLY_ALL * stats["wanted"]:
        change = f"--set mining.relative_margin={_OTHER_MARGIN}"
        lines.insert(0, ("other negatives, in seconds", f"{command} mine {typed} {change}"))
    lines += [("state of every stage", f"{command} status {typed}"), ("load the rows in Python", _loading(result))]
    console.out.print("\nNext")
    for what, suggested in lines:
        console.out.print(f"  {what + ':':30} {suggested}", markup=False, soft_wrap=True)


def show_following(only: str, stages: Graph, command: str, typed: str) -> None:
    """The command of the stage after the only one that ran; `command`: it, but for the stage's name."""
    names = [name for name, stage in stages.items() if not stage.provides]  # no command runs those that replace another
    following = names[names.index(only) + 1]
    console.out.print(f"\nNext: {program()} {command}{following} {typed}", markup=False, soft_wrap=True)


def _by_margins(stats: dict[str, Any]) -> float:
    """Share of the candidates that margins dropped."""
    dropped: int = sum(stats["drops"].get(name, 0) for name in ("relative_margin", "absolute_margin"))
    return dropped / max(1, int(stats["candidates"]))


def _loading(result: Result) -> str:
    place = result.store.place("triplets")
    if "://" in place:
        return f'load_dataset("parquet", data_files=[…]) with the files listed in {place}'
    return f'load_dataset("parquet", data_dir="{place}")'


def show_status(states: list[State], stages: Graph) -> None:
    """One line per stage."""
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "state", "parts", "output", "size", "seconds", "finished"):
        table.add_column(column, justify="right" if column in ("parts", "output", "size", "seconds") else "left")
    for state in states:
        manifest = state.manifest
        cells: list[str | Text] = [str(state.done) if state.done else "", "", "", "", ""]
        if manifest:
            seconds = manifest.provenance.get("seconds")
            unit, made = next(iter(stages[state.stage].counts(manifest.stats).items()), ("", 0))
            cells = [
                str(len(manifest.parts)),
                f"{made:,} {unit}" if unit else "",
                wording.size(sum(file.bytes for part in manifest.parts for file in part.files)),
                f"{seconds:.1f}" if isinstance(seconds, int | float) else "",
                Text(_local(manifest.provenance.get("finished"))),
            ]
        table.add_row(state.stage, Text(state.state, style=_STYLE[state.state]), *cells)
    console.out.print(table)
    for state in states:
        if state.reason:
            console.out.print(f"{state.stage}: {state.reason}", markup=False)
    for state in states:
        if state.versions:
            console.out.print(f"{state.stage}: {state.versions}", markup=False)
        for _, remark in stages[state.stage].remarks(state.manifest.stats) if state.manifest else ():
            console.out.print(f"{state.stage}: {remark}", markup=False)
        if state.manifest and (count := state.manifest.stats.get("rejected_rows")):
            console.out.print(f"{state.stage}: {count_of(count, 'source row')} rejected, see {REJECTED}", markup=False)


def _local(finished: Any) -> str:
    """A time as the log shows it, in the zone of this machine, with its date."""
    try:
        return datetime.fromisoformat(finished).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except (TypeError, ValueError):
        return ""


def show_superseded(rows: list[dict[str, Any]]) -> None:
    """What `clean` deletes (`formats.superseded`), and why nothing needs it."""
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "folder", "files", "size", "written"):
        table.add_column(column, justify="right" if column in ("files", "size") else "left")
    for row in rows:
        written = dict.fromkeys(_local(row[name]) for name in ("first_written", "last_written"))
        size = wording.size(row["bytes"])
        table.add_row(row["stage"], Text(row["folder"]), f"{row['files']:,}", size, " to ".join(written))
    console.out.print(table)
    console.out.print(
        "\nThe current output of these stages does not include them: they were made with earlier settings or input, or"
        " left by killed runs. Going back to such settings would compute them again.",
        soft_wrap=True,
    )


def show_explanation(found: Explanation, limit: int) -> None:
    """An anchor, its first `limit` positives, and as many candidates with their fates, besides those taken.

    With `margin_reference: each`, so for the `limit` units with the best positives.
    """
    console.out.print(
        Text.assemble(("anchor ", "bold"), clean_text(found.anchor_id), "  ", clean_text(found.anchor, 300))
    )
    over = "ranks among survivors only" if found.rank_over == "survivors" else "raw ranks"
    best = sorted(found.units, key=lambda one: -math.inf if one.reference is None else one.reference, reverse=True)
    for unit in best[:limit]:
        console.out.print()
        for positive in unit.positives[:limit]:
            rank = "beyond the depth" if positive.rank is None else f"rank {positive.rank}"
            about = f"{_score(positive.score)} {rank} {clean_text(positive.id)}  "
            console.out.print(Text.assemble(("positive ", "green"), (about, "dim"), clean_text(positive.text, 120)))
        if len(unit.positives) > limit:
            console.out.print(
                f"{count_of(len(unit.positives) - limit, 'more positive')}: --limit {len(unit.positives)} shows all"
            )
        console.out.print(
            f"margins are measured from {_score(unit.reference)}; window {found.window[0]} to {found.window[1]}, {over}"
        )
        counts = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in unit.counts.items())
        console.out.print(f"candidates {sum(unit.counts.values()):,}: {counts}", markup=False)
        shown = unit.shortened(limit)
        console.out.print(_candidates(shown))
        if more := len(unit.candidates) - len(shown.candidates):
            console.out.print(f"{more:,} more: --limit {len(unit.candidates)} shows all")
    if len(best) > limit:
        console.out.print(
            f"\n{count_of(len(best) - limit, 'more positive')}, each with candidates: --limit {len(best)} shows all"
        )


def _candidates(unit: Unit) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("rank", "score", "document", "fate", "rule", "text"):
        right = column in ("rank", "score")
        table.add_column(column, justify="right" if right else "left", no_wrap=column not in ("rule", "text"))
    for candidate in unit.candidates:
        table.add_row(
            "" if candidate.rank is None else str(candidate.rank),
            _score(candidate.score),
            Text(clean_text(candidate.id)),
            Text(candidate.fate.replace("_", " "), style="green" if candidate.fate == "taken" else ""),
            Text(clean_text(candidate.rule)),
            Text(clean_text(candidate.text, 60), style="dim", no_wrap=True, overflow="ellipsis"),
        )
    return table


def _score(score: float | None) -> str:
    return "no score" if score is None else f"{score:.3f}"
