"""Commands that run stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    named,
    program,
    with_option,
)

if TYPE_CHECKING:
    from negpipe.config.schema import Config
    from negpipe.graph import Result


def _mine(
    config: str,
    overrides: list[str] | None,
    log_format: str,
    debug: bool,
    rehash: bool,
    only: str | None = None,
    repair: bool = False,
    rebuild: bool = False,
) -> None:
    from negpipe import graph
    from negpipe.cli import console
    from negpipe.config.file import load_config

    console.set_up_logging(checked(log_format), debug=debug)
    settings = load_config(config, overrides, tell=False)
    result = graph.mine(
        settings,
        only=only,
        reporter=console.reporter(log_format),
        rehash=rehash,
        repair=repair,
        rebuild=rebuild,
    )
    if result.ran and only is None and settings.output.report:
        from negpipe.review import report

        report.after_mining(settings, named(settings))
    elif "triplets" in result.ran and settings.url is None and (page := settings.run_dir / "report.html").is_file():
        console.logger.warning("%s shows earlier rows: %s report %s makes it again", page, program(), named(settings))
    tell(result, settings, log_format, only)


def tell(result: Result, settings: Config, log_format: str, only: str | None, command: str = "") -> None:
    """Print the result of a run, of all stages or of one, and the next command; `command`: its first word, if there is
    one before the stage's name."""
    from negpipe import graph
    from negpipe.cli import console, summary

    if log_format == "json":
        console.logger.info("done", extra={"fields": {"ran": result.ran, "stats": result.stats}})
    elif "triplets" in result.stats and only in (None, "triplets"):
        summary.show_result(result, named(settings), settings.mining)
    elif only:
        summary.show_following(only, graph.mining(settings), command, named(settings))


@app.command()
def mine(
    config: ConfigArgument,
    overrides: SetOption = None,
    log_format: LogOption = "plain",
    rehash: RehashOption = False,
    max_bad_rows: BadRowsOption = None,
    repair: RepairOption = False,
    rebuild: RebuildOption = False,
    debug: DebugOption = False,
) -> None:
    """Run every stage that is not up to date.

    Example: negpipe mine scifact.yaml
    """
    overrides = with_option(overrides, "data.max_bad_rows", max_bad_rows)
    _mine(config, overrides, log_format, debug, rehash, repair=repair, rebuild=rebuild)


@app.command()
def ingest(
    config: ConfigArgument,
    overrides: SetOption = None,
    log_format: LogOption = "plain",
    rehash: RehashOption = False,
    max_bad_rows: BadRowsOption = None,
    rebuild: RebuildOption = False,
    debug: DebugOption = False,
) -> None:
    """Read the source into corpus, anchor and positive tables. Next: encode.

    Example: negpipe ingest quickstart.yaml
    """
    _mine(
        config,
        with_option(overrides, "data.max_bad_rows", max_bad_rows),
        log_format,
        debug,
        rehash,
        "ingest",
        rebuild=rebuild,
    )


def _stage_command(name: str, help_text: str, options: str = "") -> None:
    @app.command(name, help=f"{help_text}\n\nExample: negpipe {name} quickstart.yaml{options}")
    def command(
        config: ConfigArgument,
        overrides: SetOption = None,
        log_format: LogOption = "plain",
        rehash: RehashOption = False,
        rebuild: RebuildOption = False,
        debug: DebugOption = False,
    ) -> None:
        _mine(config, overrides, log_format, debug, rehash, name, rebuild=rebuild)


_stage_command("encode", "Encode texts into vectors. Requires ingest; next: index.")
_stage_command(
    "index", "Build the index and the id map. Requires encode; next: search (slices, if search.slice_documents is set)."
)
_stage_command(
    "slices",
    "Find the nearest documents in each slice of the corpus (search.slice_documents). Requires index; next: search.",
    " --set search.slice_documents=1000",
)
_stage_command("search", "Find the candidates of every anchor. Requires index (or slices); next: triplets.")
_stage_command("triplets", "Choose negatives and write the training rows. Requires search; next: audit, or train.")
