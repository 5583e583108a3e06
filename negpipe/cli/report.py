"""The commands `report` and `diff`: show the mined rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from negpipe.cli.app import (
    ColumnsOption,
    ConfigArgument,
    DebugOption,
    LogOption,
    SetOption,
    app,
    by_field,
    checked,
    named,
)
from negpipe.cli.formats import FormatOption, printed_as


@app.command()
def report(
    config: ConfigArgument,
    out: Annotated[Path | None, typer.Option(help="Output file; default: RUN_DIR/report.html.")] = None,
    anchors: Annotated[int, typer.Option(min=1, help="Anchors to sample, evenly spaced; more take longer.")] = 1000,
    overrides: SetOption = None,
    log_format: LogOption = "plain",
    debug: DebugOption = False,
) -> None:
    """Write an HTML report of the mined rows, with a sample to review. Does not run any stage.

    Contains the stages, scores, ranks, drops, the audit, and 50 anchors with their negatives. Mark negatives that are
    correct answers, and pass the saved verdicts to `mining.exclude_file`. Works offline.

    Example: negpipe report quickstart.yaml --out report.html
    """
    from negpipe.cli import console
    from negpipe.config.file import load_config
    from negpipe.review import report as reports

    console.set_up_logging(checked(log_format), debug=debug)
    settings = load_config(config, overrides)
    made = reports.write(settings, out, typed=named(settings), anchors=anchors)
    console.out.print(f"Written: {made}", markup=False, soft_wrap=True)


@app.command()
def diff(
    a: Annotated[
        str, typer.Argument(help="A run directory, a config, or a file or folder of any miner's rows.", metavar="A")
    ],
    b: Annotated[str, typer.Argument(help="The same, to compare with A.", metavar="B")],
    columns: ColumnsOption = None,
    examples: Annotated[int, typer.Option(min=0, help="Anchors to show, most changed first.")] = 5,
    form: FormatOption = "table",
    as_json: Annotated[bool, typer.Option("--json", help="Short for --format json.")] = False,
    log_format: LogOption = "plain",
    debug: DebugOption = False,
) -> None:
    """Show how the negatives changed from A to B, in numbers and examples.

    Anchors and documents are matched by id, or by text if one side has no ids. --columns is about the side that is not
    a run, as in `negpipe audit`.

    Example: negpipe diff runs/scifact runs/scifact-margin --examples 3
    """

    from negpipe.cli import console, printed
    from negpipe.review.diff import compare, source_of

    console.set_up_logging(checked(log_format), debug=debug)
    found = compare(source_of(a), source_of(b), columns=by_field(columns), examples=examples)
    document = found.document()
    numbers = {name: value for name, value in document.items() if not isinstance(value, dict | list)}
    if not printed_as("json" if as_json else form, document, [numbers]):
        printed.show_difference(found)
