"""The command line: parse, call, exit code."""

from __future__ import annotations

import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer
from typer.exceptions import TyperException

from negpipe.errors import NegpipeError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Mine hard negatives for retrieval and reranking models: ingest, encode, index, search, triplets.\n\n"
    "Every stage restarts from what is on disk; after a failure run the same command again.\n\n"
    "Exit codes: 0 done, 1 failed, 2 usage or config, 3 bad input, 4 run directory in use, 5 damaged output,"
    " 130 and 143 interrupted.",
)
config_app = typer.Typer(no_args_is_help=True, help="Check a config, print its schema or its values.")
app.add_typer(config_app, name="config")

ConfigArgument = Annotated[str, typer.Argument(help="Config file, or its name in configs/.", metavar="CONFIG")]
SetOption = Annotated[
    list[str], typer.Option("--set", help="Override a setting: --set mining.num_negatives=5 (repeatable).")
]
LogOption = Annotated[str, typer.Option("--log-format", help="plain, or json for schedulers.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")]
RehashOption = Annotated[
    bool, typer.Option("--rehash", help="Read every source file again instead of trusting its modification time.")
]


class _Terminated(BaseException):
    """SIGTERM, raised where the program stands so that everything is let go of in order."""


def _terminate(_: int, __: FrameType | None) -> NoReturn:
    raise _Terminated


def main() -> None:
    """Run the command line and leave with the documented exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    arguments = sys.argv[1:]
    log_format = "json" if "json" in arguments or "--log-format=json" in arguments else "plain"
    debug = "--debug" in arguments
    try:
        code = app(standalone_mode=False)
    except NegpipeError as error:
        sys.exit(_fail(str(error), error.code, error.exit_code, log_format, trace=debug))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(_interrupted("Interrupted", 130))
    except _Terminated:
        sys.exit(_interrupted("Terminated", 143))
    except TyperException as error:
        # Without a message it has shown the help already.
        message = error.format_message()
        sys.exit(_fail(message, "usage", error.exit_code, log_format) if message else error.exit_code)
    except Exception as error:
        hint = "" if debug else " Run the same command with --debug for the trace."
        message = f"unexpected {type(error).__name__}: {error}. This is a bug; finished parts are kept.{hint}"
        sys.exit(_fail(message, "unexpected", 1, log_format, trace=debug))
    # Typer raises neither Ctrl-C nor an exit of its own: it returns their codes.
    sys.exit(_interrupted("Interrupted", code) if code == 130 else code)


def _fail(message: str, code: str, exit_code: int, log_format: str, *, trace: bool = False) -> int:
    from negpipe import console

    shown = traceback.format_exc() if trace else ""
    if log_format == "json":
        console.set_up_logging("json", debug=False)
        fields = {"error": code, "exit_code": exit_code} | ({"trace": shown} if shown else {})
        console.logger.error("%s", message, extra={"fields": fields})
    else:
        console.err.print(console.visible(shown), end="", markup=False, soft_wrap=True)
        console.err.print(console.visible(f"negpipe: {message}"), style="red", markup=False, soft_wrap=True)
    return exit_code


def _interrupted(what: str, code: int) -> int:
    from negpipe import console

    console.err.print(f"{what}. Finished parts are kept: run the same command to go on.", style="yellow")
    return code


def _checked(log_format: str) -> str:
    from negpipe.errors import ConfigError

    if log_format not in ("plain", "json"):
        raise ConfigError(f"--log-format {log_format}: expected plain or json")
    return log_format


def _mine(config: str, overrides: list[str], log_format: str, debug: bool, rehash: bool, only: str | None) -> None:
    from negpipe import console, pipeline
    from negpipe.config import load_config

    console.set_up_logging(_checked(log_format), debug=debug)
    settings = load_config(config, overrides)
    result = pipeline.mine(settings, only=only, reporter=console.reporter(log_format), rehash=rehash)
    if log_format == "json":
        console.logger.info("done", extra={"fields": {"ran": result.ran, "stats": result.stats}})
    elif "triplets" in result.stats and only in (None, "triplets"):
        console.show_result(result, config)


@app.command()
def mine(
    config: ConfigArgument,
    overrides: SetOption = [],  # noqa: B006 — typer copies it
    log_format: LogOption = "plain",
    rehash: RehashOption = False,
    debug: DebugOption = False,
) -> None:
    """Run every stage that is not up to date.

    Example: negpipe mine scifact.yaml --set data.path=my/folder --set mining.num_negatives=7
    """
    _mine(config, overrides, log_format, debug, rehash, None)


def _stage_command(name: str, help_text: str) -> None:
    @app.command(name, help=f"{help_text}\n\nExample: negpipe {name} quickstart.yaml")
    def command(
        config: ConfigArgument,
        overrides: SetOption = [],  # noqa: B006 — typer copies it
        log_format: LogOption = "plain",
        rehash: RehashOption = False,
        debug: DebugOption = False,
    ) -> None:
        _mine(config, overrides, log_format, debug, rehash, name)


_stage_command("ingest", "Read the source into corpus, anchor and positive tables.")
_stage_command("encode", "Turn texts into vectors.")
_stage_command("index", "Build the index and the id map.")
_stage_command("search", "Find the candidates of every anchor.")
_stage_command("triplets", "Choose negatives and write the training rows.")


@app.command()
def export(
    config: ConfigArgument,
    to: Annotated[
        str,
        typer.Option(
            help="flagembedding, nemo, tevatron, distillation, sentence-transformers, jsonl or hub.", metavar="LAYOUT"
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to make; or a file: NAME.jsonl, NAME.jsonl.gz, NAME.parquet.")],
    shard_rows: Annotated[int | None, typer.Option(help="Rows a file, at most; by default all in one.")] = None,
    compress: Annotated[bool, typer.Option("--gzip", help="Compress JSON.")] = False,
    run: Annotated[bool, typer.Option("--run", help="tevatron: write run.tsv, the stored ranking, too.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is at --out.")] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(help="hub: upload to this repository too; it is made private if it is new.", metavar="REPO"),
    ] = None,
    overrides: SetOption = [],  # noqa: B006 — typer copies it
    log_format: LogOption = "plain",
    debug: DebugOption = False,
) -> None:
    """Write the training rows in the exact layout that a trainer loads. Runs no stage, needs ingest and search.

    Example: negpipe export scifact.yaml --to flagembedding --out exports/scifact
    """
    from negpipe import console, pipeline
    from negpipe.config import load_config
    from negpipe.exports import Options

    console.set_up_logging(_checked(log_format), debug=debug)
    options = Options(
        to=to, out=out, shard_rows=shard_rows, compress=compress, run=run, force=force, push_to_hub=push_to_hub
    )
    pipeline.export(load_config(config, overrides), options, reporter=console.reporter(log_format))


@app.command()
def explain(
    config: ConfigArgument,
    anchor: Annotated[str, typer.Option(help="Id of the anchor.", metavar="ID")],
    limit: Annotated[int, typer.Option(min=1, help="Candidates to show.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    overrides: SetOption = [],  # noqa: B006 — typer copies it
    debug: DebugOption = False,
) -> None:
    """Show an anchor's candidates in order: score, rank, and why each was taken or not.

    Example: negpipe explain quickstart.yaml --anchor json.dumps --limit 20
    """
    import dataclasses
    import json

    from negpipe import console, pipeline
    from negpipe.config import load_config

    found = pipeline.explain_anchor(load_config(config, overrides), anchor)
    if as_json:
        units = [dataclasses.replace(unit, candidates=unit.candidates[:limit]) for unit in found.units]
        document = dataclasses.asdict(dataclasses.replace(found, units=units))
        typer.echo(json.dumps(document, allow_nan=False))
    else:
        console.show_explanation(found, limit)


@app.command()
def status(
    config: ConfigArgument,
    overrides: SetOption = [],  # noqa: B006 — typer copies it
    debug: DebugOption = False,
) -> None:
    """Say how every stage stands, and why what is not current is not.

    Example: negpipe status quickstart.yaml
    """
    from negpipe import console, pipeline
    from negpipe.config import load_config

    console.show_status(pipeline.status(load_config(config, overrides)))


@app.command()
def verify(
    config: ConfigArgument,
    overrides: SetOption = [],  # noqa: B006 — typer copies it
    debug: DebugOption = False,
) -> None:
    """Read every output file again and compare its digest. Exit code 5 when one differs.

    Example: negpipe verify quickstart.yaml
    """
    from negpipe import console, pipeline
    from negpipe.config import load_config
    from negpipe.errors import DamagedError

    run_dir = load_config(config, overrides).run_dir
    files, problems = pipeline.verify(run_dir)
    if problems:
        listed = "\n".join(problems[:20])
        raise DamagedError(f"{len(problems)} of {files} files in {run_dir} are damaged:\n{listed}")
    console.out.print(f"{files} files in {run_dir} are whole.", markup=False)


@app.command()
def clean(
    config: ConfigArgument,
    overrides: SetOption = [],  # noqa: B006 — typer copies it
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    debug: DebugOption = False,
) -> None:
    """Delete parts of settings that are no longer current. Asks first.

    Example: negpipe clean quickstart.yaml
    """
    from negpipe import console, pipeline
    from negpipe.config import load_config
    from negpipe.errors import ConfigError

    run_dir = load_config(config, overrides).run_dir
    listed = pipeline.superseded(run_dir)
    if not listed:
        console.out.print(f"Nothing to clean in {run_dir}.", markup=False)
        return
    folders: dict[str, tuple[int, int]] = {}
    for path, size in listed:
        folder = str(path.parent.relative_to(run_dir))
        files, total = folders.get(folder, (0, 0))
        folders[folder] = files + 1, total + size
    for folder, (files, total) in sorted(folders.items()):
        console.out.print(f"{folder:30} {files:6} files {console.size(total):>10}", markup=False)
    try:
        agreed = yes or typer.confirm(f"Delete {len(listed)} files from {run_dir}?")
    except typer.Abort:
        if sys.stdin.isatty():
            raise
        raise ConfigError("nobody is here to be asked: pass --yes to delete these files") from None
    if not agreed:
        console.out.print("Nothing was deleted.")
        return
    console.out.print(f"Freed {console.size(pipeline.clean(run_dir))}.")


@config_app.command("check")
def config_check(
    config: ConfigArgument,
    overrides: SetOption = [],  # noqa: B006 — typer copies it
    debug: DebugOption = False,
) -> None:
    """Validate a config; every problem with its place.

    Example: negpipe config check scifact.yaml
    """
    from negpipe import console
    from negpipe.config import find_config, load_config

    load_config(config, overrides)
    console.out.print(f"{find_config(config)} is valid.", markup=False)


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of configs, for editors.

    Example: negpipe config schema > negpipe.schema.json
    """
    import json

    from negpipe.config import schema

    typer.echo(json.dumps(schema(), indent=2))


@config_app.command("show")
def config_show(
    config: ConfigArgument,
    overrides: SetOption = [],  # noqa: B006 — typer copies it
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Numbers for what depends on other settings and on the data.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Print a config with every default filled in, those of mining.compat included.

    Example: negpipe config show quickstart.yaml --resolved --set mining.compat=sentence-transformers
    """
    import yaml

    from negpipe.config import load_config

    shown = load_config(config, overrides)
    if resolved:
        from negpipe import console, pipeline

        shown, whole = pipeline.resolved(shown)
        if not whole:
            console.err.print("mining.range_max or mining.depth depends on the data: run ingest first.", markup=False)
    typer.echo(yaml.safe_dump(shown.model_dump(mode="json"), sort_keys=False), nl=False)


if __name__ == "__main__":
    main()
