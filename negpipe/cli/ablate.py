"""The `ablate` command: compare settings by the models trained with them."""

from __future__ import annotations

from typing import Annotated

import typer

from negpipe.cli.app import (
    ConfigArgument,
    DebugOption,
    LogOption,
    RebuildOption,
    RehashOption,
    RepairOption,
    SetOption,
    app,
    checked,
)
from negpipe.cli.formats import FormatOption, printed_as
from negpipe.errors import count_of


@app.command()
def ablate(
    config: ConfigArgument,
    form: FormatOption = "table",
    as_json: Annotated[bool, typer.Option("--json", help="Short for --format json.")] = False,
    overrides: SetOption = None,
    log_format: LogOption = "plain",
    rehash: RehashOption = False,
    repair: RepairOption = False,
    rebuild: RebuildOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a model for each mining setting and seed, and show which setting gives the best model.

    The config section ablate lists the settings. Texts are encoded once, and candidates are searched once per depth.
    Finished work is reused, so an interrupted run resumes. All output is in RUN_DIR/ablation.

    Example: negpipe ablate scifact.yaml --set 'ablate.sets=\\[default, margins]' --set 'ablate.seeds=\\[1, 2]'
    """
    from negpipe.cli import console, printed
    from negpipe.config.file import load_config
    from negpipe.errors import NegpipeError
    from negpipe.train import ablation

    console.set_up_logging(checked(log_format), debug=debug)
    made = ablation.ablate(
        load_config(config, overrides),
        reporter=console.reporter(log_format),
        rehash=rehash,
        repair=repair,
        rebuild=rebuild,
    )
    rows = (row | {f"{name}_base": score for name, score in made.bases[row["arm"]].items()} for row in made.rows())
    if not printed_as("json" if as_json else form, made.document(), rows):
        printed.show_ablation(made)
    if made.failed:
        raise NegpipeError(
            f"{count_of(len(made.failed), 'cell has', 'cells have')} no result (see the log): {', '.join(made.failed)}"
        )
