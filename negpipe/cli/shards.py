"""Commands that make a stage on several machines: `work` and `commit`."""

from __future__ import annotations

from typing import Annotated

import typer

from negpipe.cli.app import (
    ConfigArgument,
    DebugOption,
    LogOption,
    RebuildOption,
    RehashOption,
    SetOption,
    app,
    checked,
)

StageArgument = Annotated[str, typer.Argument(help="encode, index, search or triplets.", metavar="STAGE")]


@app.command()
def work(
    stage: StageArgument,
    config: ConfigArgument,
    shard: Annotated[
        str, typer.Option(help="Which shard of how many, from 0: $SLURM_ARRAY_TASK_ID/16.", metavar="I/N")
    ] = "0/1",
    overrides: SetOption = None,
    log_format: LogOption = "plain",
    rehash: RehashOption = False,
    debug: DebugOption = False,
) -> None:
    """Make one shard of a stage, beside others on other machines. The stages before it must be there, commit follows.

    Killed or run again, it makes what is missing and nothing else. It ends when all of its parts are there.

    Example: negpipe work encode scifact.yaml --shard 3/16
    """
    from negpipe import graph
    from negpipe.cli import console
    from negpipe.config.file import load_config

    console.set_up_logging(checked(log_format), debug=debug)
    chosen = graph.Shard.parse(shard)
    settings = load_config(config, overrides)
    worked = graph.work(settings, stage, chosen, reporter=console.reporter(log_format), rehash=rehash)
    fields = {"stage": stage, "shard": shard, "made": worked.made, "found": worked.found, "others": worked.others}
    console.logger.info(
        "%s: shard %s is done: %d parts made, %d were there, %d made by others meanwhile",
        *fields.values(),
        extra={"fields": fields},
    )


@app.command()
def commit(
    stage: StageArgument,
    config: ConfigArgument,
    shards: Annotated[
        int | None,
        typer.Option(
            min=1, help="How many there were, to name those that lack parts.", metavar="N", show_default=False
        ),
    ] = None,
    overrides: SetOption = None,
    log_format: LogOption = "plain",
    rehash: RehashOption = False,
    rebuild: RebuildOption = False,
    debug: DebugOption = False,
) -> None:
    """Complete a stage that shards have made, once all its parts are there; names those missing. Computes nothing.

    Example: negpipe commit encode scifact.yaml --shards 16
    """
    from negpipe import graph
    from negpipe.cli import console
    from negpipe.cli.run import tell
    from negpipe.config.file import load_config

    console.set_up_logging(checked(log_format), debug=debug)
    settings = load_config(config, overrides)
    tell(graph.commit(settings, stage, shards=shards, rehash=rehash, rebuild=rebuild), settings, log_format, stage)
