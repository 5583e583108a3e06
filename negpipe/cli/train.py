"""The `train` command."""

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
def train(
    config: ConfigArgument,
    fail_on: Annotated[
        Literal["loss"] | None,
        typer.Option(help="loss: exit with code 1 if the model is worse than its base.", metavar="VERDICT"),
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
    """Train a model on the rows and compare it to its base. Runs mining stages that are not up to date first.

    The model is judged on the queries of train.eval_split, or those held out by train.split, against the entire corpus;
    a reranker orders the encoder's best documents. The last line is the result. The model is saved in RUN_DIR/model.

    Example: negpipe train scifact.yaml --set train.batch_size=64 --fail-on loss
    """
    from negpipe import graph
    from negpipe.cli import console, printed
    from negpipe.config.file import load_config
    from negpipe.errors import NegpipeError
    from negpipe.train.comparison import of_document

    console.set_up_logging(checked(log_format), debug=debug)
    settings = load_config(config, with_option(overrides, "data.max_bad_rows", max_bad_rows))
    made = graph.train(settings, reporter=console.reporter(log_format), rehash=rehash, repair=repair, rebuild=rebuild)
    stats = made.stats["train"]
    first = of_document(stats["compared"][0])
    model = made.run_dir / "model"
    document = {"model": str(model), "verdict": first.verdict, **stats}
    if not printed_as("json" if as_json else form, document, stats["compared"]):
        printed.show_training(stats, model)
    if fail_on and first.verdict == "LOSS":
        raise NegpipeError("the model is worse than its base (--fail-on loss)")
