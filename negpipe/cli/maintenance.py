"""Commands that maintain a run directory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from negpipe.cli.app import ConfigArgument, DebugOption, LogOption, SetOption, app, checked, named, program
from negpipe.cli.formats import FormatOption, printed_as
from negpipe.errors import count_of

_SHOWN = 20


@app.command()
def status(
    config: ConfigArgument,
    form: FormatOption = "table",
    overrides: SetOption = None,
    log_format: LogOption = "plain",
    debug: DebugOption = False,
) -> None:
    """Show the state of every stage, and why a stage is not current.

    Example: negpipe status quickstart.yaml
    """
    from negpipe import graph
    from negpipe.cli import console, formats, summary
    from negpipe.config.file import load_config
    from negpipe.review import wording
    from negpipe.store.lock import in_use

    console.set_up_logging(checked(log_format), debug=debug)
    settings = load_config(config, overrides, tell=False)
    states = graph.status(settings)
    rows = formats.states(states)
    if not printed_as(form, rows, rows):
        summary.show_status(states, graph.stages(settings))
        if who := in_use(settings.run_dir):
            remark = f"In use by {wording.visible(who)}: what is not current may be in progress."
            console.out.print(remark, markup=False, highlight=False, soft_wrap=True)


@app.command()
def verify(
    config: ConfigArgument,
    overrides: SetOption = None,
    log_format: LogOption = "plain",
    debug: DebugOption = False,
) -> None:
    """Check every file of the run against its digest. Changes nothing; exits with code 5 if a file differs.

    Example: negpipe verify quickstart.yaml
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    from negpipe import graph
    from negpipe.cli import console
    from negpipe.config.file import load_config
    from negpipe.engine import upkeep
    from negpipe.errors import DamagedError
    from negpipe.review import wording

    console.set_up_logging(checked(log_format), debug=debug)
    settings = load_config(config, overrides)
    place = settings.place
    found = graph.inventory(settings)
    console.logger.info("verify: reading %s, %s", count_of(len(found.files), "file"), wording.size(found.bytes))
    columns = ("verify", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console.err, transient=True, disable=not console.err.is_terminal) as bar:
        task = bar.add_task("", total=found.bytes)
        problems = upkeep.verify(settings, found, lambda count: bar.advance(task, count))
    count = len(found.files)
    if problems:
        listed = "\n".join(problems[:_SHOWN])
        more = f"\nand {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise DamagedError(
            f"{len(problems)} of {count} files in {place} are damaged:\n{listed}{more}\n"
            f"Rebuild them with `{program()} mine {named(settings)} --repair`."
        )
    console.out.print(f"{count} files in {place} are intact.", markup=False)


@app.command()
def clean(
    config: ConfigArgument,
    form: FormatOption = "table",
    overrides: SetOption = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking.")] = False,
    forget: Annotated[
        Path | None, typer.Option(metavar="RUN_DIR", help="Unregister a deleted run directory from the store.")
    ] = None,
    log_format: LogOption = "plain",
    debug: DebugOption = False,
) -> None:
    """Delete files that the current output of no stage needs, after confirmation: parts made with earlier settings, and
    what killed runs left.

    In a store that several run directories share, parts that any of them needs are kept.

    --format json and csv ask nothing: they list the files, and delete them only with --yes.

    Example: negpipe clean quickstart.yaml
    """
    from negpipe import graph
    from negpipe.cli import console, formats, summary
    from negpipe.config.file import load_config
    from negpipe.engine import upkeep
    from negpipe.errors import ConfigError
    from negpipe.review import wording

    console.set_up_logging(checked(log_format), debug=debug)
    settings = load_config(config, overrides)
    run_dir = settings.store or settings.run_dir
    place = settings.place if settings.url else str(run_dir)
    if forget is not None:
        upkeep.forget(settings, forget)
    listed = graph.superseded(settings)
    rows = formats.superseded(listed, run_dir, graph.stages(settings), local=settings.url is None)
    if form != "table":
        if yes:
            graph.clean(settings)
        printed_as(form, rows, rows)
        return
    if not listed:
        console.out.print(f"Nothing to clean in {place}.", markup=False)
        return
    summary.show_superseded(rows)
    try:
        agreed = yes or typer.confirm(f"Delete {count_of(len(listed), 'file')} from {wording.visible(place)}?")
    except typer.Abort:
        if sys.stdin.isatty():
            raise
        raise ConfigError("no terminal to ask for confirmation: pass --yes to delete these files") from None
    if not agreed:
        console.out.print("Nothing was deleted.")
        return
    console.out.print(f"Freed {wording.size(graph.clean(settings))}.")
