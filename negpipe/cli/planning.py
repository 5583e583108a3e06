"""The `plan` command: show what a run would do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from negpipe.cli.app import ConfigArgument, DebugOption, LogOption, SetOption, app, checked
from negpipe.cli.formats import Format, FormatOption, printed_as
from negpipe.errors import ConfigError, count_of

if TYPE_CHECKING:
    from rich.table import Table

    from negpipe.config.schema import Config
    from negpipe.plan.cluster import Outlook
    from negpipe.plan.estimate import Plan
    from negpipe.plan.variants import Variant

_REFUSED = "refused, see below"


@app.command()
def plan(
    config: ConfigArgument,
    form: FormatOption = "table",
    as_json: Annotated[bool, typer.Option("--json", help="Short for --format json.")] = False,
    probe: Annotated[
        bool,
        typer.Option("--probe/--no-probe", help="Run the encoder to time it, if its speed is unknown."),
    ] = True,
    cluster: Annotated[
        Path | None,
        typer.Option(
            help="Plan a run on the nodes described in this YAML file instead, even before any data exists.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    nodes: Annotated[
        str | None,
        typer.Option(
            help="With --cluster: node counts to compare, such as 1,8,64; default: as in the file.",
            metavar="N,…",
            show_default=False,
        ),
    ] = None,
    overrides: SetOption = None,
    log_format: LogOption = "plain",
    debug: DebugOption = False,
) -> None:
    """Show what a run would do: parts done and to do, time, disk space, and the cost of each index kind. Runs no stage.

    After ingest, it runs the encoder on some texts to time it, and if encoding would take over ten minutes, other ways
    to encode too, for some seconds each (and minutes the first time, if a model is exported).

    docs/how-to/plan-a-cluster.md explains --cluster.

    Example: negpipe plan scifact.yaml
    """
    import dataclasses

    from negpipe.cli import console
    from negpipe.config.file import load_config
    from negpipe.plan import estimate
    from negpipe.review import wording

    console.set_up_logging(checked(log_format), debug=debug)
    settings = load_config(config, overrides)
    if cluster or nodes:
        _on_cluster(settings, cluster, nodes, "json" if as_json else form, probe=probe)
        return
    found = estimate.plan(settings, probe_encoder=probe)
    if printed_as("json" if as_json else form, dataclasses.asdict(found), map(dataclasses.asdict, found.steps)):
        return
    compared = len(found.encoding) > 1
    for table in (_steps(found), *([_encoding(found)] if compared else []), _kinds(found, settings.index.kind)):
        if table.row_count:
            console.out.print(table)
            console.out.print()
    slurm = settings.executor.kind == "slurm"
    if shards := ", ".join(_shards(found, 1 if slurm else 2)):
        how = "as Slurm arrays" if slurm else "in shards (negpipe work)"
        console.out.print(f"On several machines like this one, {how}: {shards}.\n")
    if compared:
        console.out.print(f"{_of_encoding(found.encoding[0].variant)}\n")
        console.out.print(f"{_advice(found, settings)}\n")
    refusals: dict[str, list[str]] = {}
    for name, refusal in [(s.stage, s.refusal) for s in found.steps] + [(c.kind, c.refusal) for c in found.choices]:
        if refusal:
            refusals.setdefault(refusal, []).append(name)
    if refusals:
        console.out.print("Refused")
    for refusal, names in refusals.items():
        console.out.print(wording.visible(f"  {', '.join(names)}: {refusal}"), markup=False, soft_wrap=True)
    console.out.print(f"Free at {settings.store or settings.run_dir}: {wording.size(found.free)}.")
    if (needed := sum(step.disk or 0 for step in found.steps)) > found.free and settings.url is None:
        size = wording.size(needed)
        console.out.print(f"[red]The run needs {size}: free up space, or set run_dir or store.[/red]")
    console.out.print(f"This machine compares vectors at {found.gflops:,.0f} GFLOP/s; times are estimates.")


def _on_cluster(config: Config, file: Path | None, nodes: str | None, form: Format, *, probe: bool) -> None:
    import dataclasses

    from negpipe.cli import console
    from negpipe.config.file import load_cluster
    from negpipe.plan import cluster
    from negpipe.review import wording

    if file is None:
        raise ConfigError("--nodes requires --cluster FILE, which describes a node")
    described = load_cluster(file)
    found = cluster.outlooks(config, described, _numbers(nodes) or [described.nodes], probe_encoder=probe)
    rows = [{"nodes": each.nodes, **vars(stage)} for each in found.outlooks for stage in each.stages]
    if printed_as(form, dataclasses.asdict(found), rows):
        return
    job = found.job
    console.out.print(
        f"{count_of(job.documents, 'document')} x {job.dimension:,} numbers, {count_of(job.anchors, 'anchor')}, texts"
        f" of {job.text_bytes:,.0f} bytes. {wording.visible(found.index)}".strip(),
        markup=False,
        soft_wrap=True,
    )
    for outlook in found.outlooks:
        console.out.print()
        console.out.print(_on_nodes(outlook))
    console.out.print()
    stages = [one for each in found.outlooks for one in each.stages]
    said = [f"{one.stage}: {one.note}" for one in stages if one.note]
    said += [f"{one.stage} is refused: {one.refusal}" for one in stages if one.refusal]
    for sentence in dict.fromkeys(said):
        console.out.print(wording.visible(sentence), markup=False, soft_wrap=True)
    console.out.print(
        "Estimates: the speeds of a core are those in the section rates, fitted to runs on one machine; time spent"
        " waiting for a scheduler is not included.",
        soft_wrap=True,
    )


def _numbers(text: str | None) -> list[int]:
    """Parse node counts.

    Raises:
        ConfigError: the text is not a list of numbers.
    """
    if text is None:
        return []
    if not re.fullmatch(r"[1-9][0-9]{0,5}(,[1-9][0-9]{0,5})*", text):
        raise ConfigError(f"--nodes {text}: expected node counts, for example 1,8,64")
    return [int(number) for number in text.split(",")]


def _on_nodes(outlook: Outlook) -> Table:
    from negpipe.review import wording

    numbers = ("tasks", "time", "disk", "memory per node", "moved")
    first = count_of(outlook.nodes, "node")
    table = _table(first, *numbers, "bound by", numbers=numbers)
    for one in outlook.stages:
        seconds = "" if one.seconds is None else wording.duration(one.seconds)
        sizes = (wording.size(count) if count else "" for count in (one.disk, one.memory, one.moved))
        bound = f"[red]{_REFUSED}[/red]" if one.refusal else one.bound
        table.add_row(one.stage, f"{one.tasks:,}" if one.tasks else "", seconds, *sizes, bound)
    whole = sum(one.disk for one in outlook.stages), sum(one.moved for one in outlook.stages)
    disk, moved = (wording.size(count) if count else "" for count in whole)
    longest = max(outlook.stages, key=lambda one: one.seconds or 0.0)
    lacking = [one.stage for one in outlook.stages if one.seconds is None]
    without = f", {', '.join(lacking)} not counted" if lacking else ""
    table.add_row("total", "", wording.duration(outlook.seconds), disk, "", moved, longest.stage + without)
    return table


def _table(*columns: str, numbers: tuple[str, ...]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left")
    return table


def _steps(plan: Plan) -> Table:
    from rich.markup import escape

    from negpipe.review import wording

    numbers = ("parts done", "to do", "time", "disk")
    table = _table("stage", "state", *numbers, "", numbers=numbers)
    for step in plan.steps:
        counts = ("" if count is None else f"{count:,}" for count in (step.done, step.todo))
        seconds = "" if step.seconds is None else wording.duration(step.seconds)
        note = f"[red]{_REFUSED}[/red]" if step.refusal else escape(step.note)
        table.add_row(step.stage, step.state, *counts, seconds, wording.size(step.disk) if step.disk else "", note)
    return table


def _shards(plan: Plan, least: int) -> Iterator[str]:
    """The number of shards that suits each stage, if there are as many, and the time one takes."""
    from negpipe.review import wording

    for step in plan.steps:
        if step.seconds and step.shards and step.shards >= least:
            yield f"{step.stage} {step.shards:,} × {wording.duration(step.seconds / step.shards)}"


def _encoding(plan: Plan) -> Table:
    from negpipe.review import wording

    numbers = ("texts/s", "time", "nearest", "negatives", "nDCG@10")  # 80 columns, with the lines to paste
    table = _table("encoder", *numbers, "", numbers=numbers)
    table.columns[0].no_wrap = True
    # The pasted lines must override another runtime.
    usual = {way.variant.settings["runtime"] for way in plan.encoding if way.variant.configured} <= {"torch"}
    for way in plan.encoding:
        one = way.variant
        shown = (f"{name}: {value}" for name, value in one.settings.items() if not (usual and value == "torch"))
        settings = "\n".join(shown)  # to be pasted verbatim
        same = ("" if share is None else f"{share:.1%}" for share in (one.agreement, one.negatives))
        ndcg = "" if one.ndcg is None else f"{one.ndcg:.3f}"
        note = "as configured" if one.configured else "other vectors"
        table.add_row(settings, f"{one.speed:,.0f}", wording.duration(way.seconds), *same, ndcg, note)
    return table


def _advice(plan: Plan, config: Config) -> str:
    """What to set, and what it saves and costs; or why nothing."""
    from negpipe.review import wording

    best, usual = plan.recommended, next(way for way in plan.encoding if way.variant.configured)
    if best is None:
        advice = "Keep the encoder's settings: no other way saves a tenth of the time and ranks as well."
    else:
        one, way = best.variant, ", ".join(f"{name}: {value}" for name, value in best.variant.settings.items())
        shares = {"negatives": one.negatives, "nearest": one.agreement}
        same = " and ".join(f"{share:.0%} of the {what}" for what, share in shares.items() if share is not None)
        ndcg = "" if one.ndcg is None else f", nDCG@10 {one.ndcg:.3f} instead of {usual.variant.ndcg:.3f}"
        times = f"{wording.duration(best.seconds)} instead of {wording.duration(usual.seconds)}"
        advice = f"Recommended: encoder: {{{way}}}: {times}, {same} as in float32{ndcg}."
    if config.encoder.backend == "flagembedding" and usual.variant.settings["runtime"] == "torch":
        advice += " Runtimes onnx and openvino are timed with encoder.backend: sentence-transformers only."
    return advice


def _of_encoding(one: Variant) -> str:
    """The legend of the columns of `_encoding`."""
    from negpipe.plan import variants

    anchors, documents = one.compared
    mined = f" negatives, nDCG@10: from mining {count_of(anchors, 'anchor')} among {count_of(documents, 'document')}."
    return (
        f"nearest: share of the {variants.NEIGHBOURS} nearest among {one.texts:,} documents that float32 finds too."
        f"{mined if anchors else ''} Paste the lines of the first column under encoder: in the config;"
        " batch_tokens replaces batch_size."
    )


def _kinds(plan: Plan, configured: str) -> Table:
    from rich.markup import escape

    from negpipe.review import wording

    numbers = ("build", "search", "disk", "memory")
    table = _table("index.kind", *numbers, "", numbers=numbers)
    for choice in plan.choices:
        times = ("" if took is None else wording.duration(took) for took in (choice.build, choice.search))
        sizes = ("" if count is None else wording.size(count) for count in (choice.disk, choice.memory))
        own = "as configured" if choice.kind == configured else ""
        note = "; ".join(filter(None, [_REFUSED if choice.refusal else "", own, choice.note]))
        table.add_row(escape(wording.visible(choice.kind)), *times, *sizes, escape(note))
    return table
