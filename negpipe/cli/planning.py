"""The command that says what a run would do."""

from __future__ import annotations

from typing import Annotated

import typer

from negpipe.cli.app import ConfigArgument, DebugOption, LogOption, SetOption, app, checked

_REFUSED = "refused, see below"


@app.command()
def plan(
    config: ConfigArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Load the encoder to time it, where nothing tells its speed.")
    ] = True,
    overrides: SetOption = None,
    log_format: LogOption = "plain",
    debug: DebugOption = False,
) -> None:
    """Say what a run would do: parts done and to do, time, disk, and what each kind of index would cost. Runs nothing.

    Example: negpipe plan scifact.yaml --set data.path=my/folder
    """
    import dataclasses
    import json

    from rich.markup import escape
    from rich.table import Table

    from negpipe.cli import console
    from negpipe.config.file import load_config
    from negpipe.plan import estimate
    from negpipe.review import wording

    console.set_up_logging(checked(log_format), debug=debug)
    settings = load_config(config, overrides)
    found = estimate.plan(settings, probe_encoder=probe)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found), allow_nan=False))
        return
    steps = Table(box=None, pad_edge=False)
    for column in ("stage", "state", "parts done", "to do", "about", "disk", ""):
        steps.add_column(column, justify="right" if column in ("parts done", "to do", "about", "disk") else "left")
    for step in found.steps:
        counts = ("" if count is None else f"{count:,}" for count in (step.done, step.todo))
        seconds = "" if step.seconds is None else wording.duration(step.seconds)
        note = f"[red]{_REFUSED}[/red]" if step.refusal else escape(step.note)
        steps.add_row(step.stage, step.state, *counts, seconds, wording.size(step.disk) if step.disk else "", note)
    console.out.print(steps)
    if found.choices:
        console.out.print()
        kinds = Table(box=None, pad_edge=False)
        for column in ("index.kind", "build", "search", "disk", "memory", ""):
            kinds.add_column(column, justify="left" if column in ("index.kind", "") else "right")
        for choice in found.choices:
            times = ("" if took is None else wording.duration(took) for took in (choice.build, choice.search))
            sizes = ("" if count is None else wording.size(count) for count in (choice.disk, choice.memory))
            note = "; ".join(filter(None, [_REFUSED if choice.refusal else "", choice.note]))
            kinds.add_row(escape(wording.visible(choice.kind)), *times, *sizes, escape(note))
        console.out.print(kinds)
    refusals: dict[str, list[str]] = {}
    for name, refusal in [(s.stage, s.refusal) for s in found.steps] + [(c.kind, c.refusal) for c in found.choices]:
        if refusal:
            refusals.setdefault(refusal, []).append(name)
    if refusals:
        console.out.print("\nRefused")
    for refusal, names in refusals.items():
        console.out.print(wording.visible(f"  {', '.join(names)}: {refusal}"), markup=False, soft_wrap=True)
    console.out.print(f"\nFree at {settings.store or settings.run_dir}: {wording.size(found.free)}.")
    if (needed := sum(step.disk or 0 for step in found.steps)) > found.free:
        size = wording.size(needed)
        console.out.print(f"[red]What is to be made takes {size}: make room, or set run_dir or store.[/red]")
    console.out.print(f"This machine compares vectors at {found.gflops:,.0f} GFLOP/s; times are estimates.")
