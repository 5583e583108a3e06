"""The `config` commands."""

from __future__ import annotations

from typing import Annotated

import typer

from negpipe.cli.app import ConfigArgument, DebugOption, LogOption, SetOption, checked, config_app


@config_app.command("check")
def config_check(
    config: ConfigArgument,
    overrides: SetOption = None,
    log_format: LogOption = "plain",
    debug: DebugOption = False,
) -> None:
    """Validate a config, and list every problem with its location.

    Example: negpipe config check scifact.yaml
    """
    from negpipe.cli import console
    from negpipe.config.file import find_config, load_config
    from negpipe.select import conditions

    console.set_up_logging(checked(log_format), debug=debug)
    conditions.check(load_config(config, overrides))
    console.out.print(f"{find_config(config)} is valid.", markup=False)


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of the config, for editors.

    Example: negpipe config schema > negpipe.schema.json
    """
    import json

    from negpipe.config.file import schema

    typer.echo(json.dumps(schema(), indent=2))


@config_app.command("show")
def config_show(
    config: ConfigArgument,
    overrides: SetOption = None,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Fill in values that depend on other settings or the data.")
    ] = False,
    log_format: LogOption = "plain",
    debug: DebugOption = False,
) -> None:
    """Print a config with all defaults filled in, including those of mining.compat.

    Example: negpipe config show quickstart.yaml --resolved --set mining.compat=sentence-transformers
    """
    import yaml

    from negpipe.cli import console
    from negpipe.config.file import load_config

    console.set_up_logging(checked(log_format), debug=debug)
    shown = load_config(config, overrides)
    if resolved:
        from negpipe import graph

        shown, whole = graph.resolved(shown)
        if not whole:
            console.err.print("mining.range_max or mining.depth depends on the data: run ingest first.", markup=False)
    typer.echo(yaml.safe_dump(shown.model_dump(mode="json"), sort_keys=False), nl=False)
