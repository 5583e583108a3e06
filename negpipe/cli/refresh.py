"""The `refresh` command: mine and train in rounds."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from negpipe.cli.app import (
    BadRowsOption,
    ConfigArgument,
    DebugOption,
    LogOption,
    RebuildOption,
    RehashOption,
    RepairOption,
    SetOption,
    app,
    checked,
    with_option,
)
from negpipe.cli.formats import FormatOption, printed_as


@app.command()
def refresh(
    config: ConfigArgument,
    rounds: Annotated[int, typer.Option(min=1, help="Maximum number of rounds of mining and training.")] = 3,
    fail_on: Annotated[
        Literal["loss"] | None,
        typer.Option(help="loss: exit with code 1 if the best model is worse than its base.", metavar="VERDICT"),
    ] = None,
    form: FormatOption = "table",
    as_json: Annotated[bool, typer.Option("--json", help="Short for --format json.")] = False,
    overrides: SetOption = None,
    log_format: LogOption = "plain",
    rehash: RehashOption = False,
    max_bad_rows: BadRowsOption = None,
    repair: RepairOption = False,
    rebuild: RebuildOption = False,
    debug: DebugOption = False,
) -> None:
    """Mine with the current model, train it and mine again with the new one, until the held-out score stops rising.

    Every round is a run in RUN_DIR/rounds/NUMBER, with its config in RUN_DIR/rounds/NUMBER.yaml; the best model is in
    RUN_DIR/rounds/best/model. To resume or to add rounds, run the same command again: finished work is not repeated.

    Example: negpipe refresh scifact.yaml --rounds 3 --set train.batch_size=64
    """
    from negpipe.cli import console, printed
    from negpipe.config.file import load_config
    from negpipe.errors import NegpipeError
    from negpipe.train.refresh import refresh

    console.set_up_logging(checked(log_format), debug=debug)
    settings = load_config(config, with_option(overrides, "data.max_bad_rows", max_bad_rows))
    made = refresh(
        settings, rounds, reporter=console.reporter(log_format), rehash=rehash, repair=repair, rebuild=rebuild
    )
    rows = (one.document() | one.compared[0].document() for one in made.rounds)
    if not printed_as("json" if as_json else form, made.document(), rows):
        printed.show_rounds(made)
    if fail_on and made.compared[0].verdict == "LOSS":
        raise NegpipeError("the best model is worse than its base (--fail-on loss)")
