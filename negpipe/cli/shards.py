"""The commands `work` and `commit`: run a stage on several machines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

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
    named,
    program,
)
from negpipe.errors import count_of

if TYPE_CHECKING:
    from negpipe.config.schema import Config

StageArgument = Annotated[str, typer.Argument(help="encode, index, slices, search or triplets.", metavar="STAGE")]


def _has_no_part_in(stage: str, config: Config) -> bool:
    """Whether the config does without a stage, so that scripts can name all of them for every config."""
    from negpipe.cli import console

    if stage != "slices" or config.search.slice_documents:
        return False
    console.logger.info("slices: nothing to do, search.slice_documents is not set")
    return True


@app.command()
def work(
    stage: StageArgument,
    config: ConfigArgument,
    shard: Annotated[
        str, typer.Option(help="Shard number, from 0, and number of shards: $SLURM_ARRAY_TASK_ID/16.", metavar="I/N")
    ] = "0/1",
    overrides: SetOption = None,
    log_format: LogOption = "plain",
    rehash: RehashOption = False,
    debug: DebugOption = False,
) -> None:
    """Compute one shard of a stage, in parallel with other machines. Requires the previous stages; then run commit.

    After an interruption, run the same command again: it computes only missing parts. It ends when all its parts exist.

    Example: negpipe work encode scifact.yaml --shard 3/16
    """
    from negpipe import graph
    from negpipe.cli import console
    from negpipe.config.file import load_config

    console.set_up_logging(checked(log_format), debug=debug)
    chosen = graph.Shard.parse(shard)
    settings = load_config(config, overrides)
    if _has_no_part_in(stage, settings):
        return
    worked = graph.work(settings, stage, chosen, reporter=console.reporter(log_format), rehash=rehash)
    fields = {"stage": stage, "shard": shard, "made": worked.made, "found": worked.found, "others": worked.others}
    console.logger.info(
        "%s: shard %s done: %s made, %d already existed, %d made by others meanwhile; after the last shard:"
        " %s commit %s %s",
        stage,
        shard,
        count_of(worked.made, "part"),
        worked.found,
        worked.others,
        program(),
        stage,
        named(settings),
        extra={"fields": fields},
    )


@app.command()
def commit(
    stage: StageArgument,
    config: ConfigArgument,
    shards: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of shards, to list those with missing parts.", metavar="N", show_default=False
        ),
    ] = None,
    overrides: SetOption = None,
    log_format: LogOption = "plain",
    rehash: RehashOption = False,
    rebuild: RebuildOption = False,
    debug: DebugOption = False,
) -> None:
    """Complete a stage computed in shards, or list its missing parts. Computes nothing.

    Example: negpipe commit encode scifact.yaml --shards 16
    """
    from negpipe import graph
    from negpipe.cli import console
    from negpipe.cli.run import tell
    from negpipe.config.file import load_config

    console.set_up_logging(checked(log_format), debug=debug)
    settings = load_config(config, overrides)
    if _has_no_part_in(stage, settings):
        return
    done = graph.commit(settings, stage, shards=shards, rehash=rehash, rebuild=rebuild)
    tell(done, settings, log_format, stage, "work ")
