"""The Typer app, and the options that commands share."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Callable
from inspect import getdoc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from negpipe import __version__
from negpipe.errors import ConfigError
from negpipe.redaction import is_redacted, redact

if TYPE_CHECKING:
    from negpipe.config.schema import Config

Command = TypeVar("Command", bound=Callable[..., Any])


class _App(typer.Typer):
    def command(self, name: str | None = None, **settings: Any) -> Callable[[Command], Command]:
        """As Typer's, with each paragraph and list item on one line: Rich would break it where the source does."""

        def add(function: Command) -> Command:
            text = re.sub(r"(?<!\n)\n(?![\n-])", " ", settings.pop("help", None) or getdoc(function) or "")
            return super(_App, self).command(name, help=text, **settings)(function)

        return add


app = _App(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Mine hard negatives for retrieval and reranking models: ingest, encode, index, search, triplets.\n\n"
    "Every stage resumes from the output on disk: after a failure, run the same command again.\n\n"
    "Exit codes: 0 done, 1 failed, 2 usage or config, 3 bad input, 4 run directory in use, 5 damaged output,"
    " 130 and 143 interrupted.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"negpipe {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


config_app = _App(no_args_is_help=True, help="Check a config, or print its values or the schema.")
app.add_typer(config_app, name="config")


_typed: dict[str, Any] = {}


def keep(parameter: typer.CallbackParam, value: Any) -> Any:
    """Remember an argument for `typed`."""
    _typed[str(parameter.name)] = value
    return value


def typed() -> str:
    """The config and the overrides of this command, quoted for a shell."""
    overrides = (word for override in _typed.get("overrides") or () for word in ("--set", redact(override)))
    return shlex.join([_typed.get("config") or "CONFIG", *overrides])


def program() -> str:
    """The command that runs this program."""
    if shutil.which("negpipe"):
        return "negpipe"
    called = Path(sys.argv[0])
    return str(called) if called.name == "negpipe" else "python -m negpipe"


def named(config: Config) -> str:
    """How the next command refers to this run: by its run directory if that stores this config and needs no further
    settings, else by the arguments as typed."""
    from negpipe.config import kept

    try:
        content = kept.path_in(config.run_dir).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return typed()
    whole = content == kept.text(config) and not is_redacted(content)
    return shlex.quote(str(config.run_dir)) if whole else typed()


def with_option(overrides: list[str] | None, key: str, value: object) -> list[str]:
    """The overrides of this command, plus that of an option that is short for one."""
    every = [*(overrides or []), *([] if value is None else [f"{key}={value}"])]
    _typed["overrides"] = every
    return every


ConfigArgument = Annotated[
    str, typer.Argument(help="Config file, its name in configs/, or a run directory.", metavar="CONFIG", callback=keep)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Override a setting: --set mining.num_negatives=5 (repeatable). Quote values with spaces or braces:"
        " --set 'data.text={title} {text}'.",
        callback=keep,
    ),
]
LogOption = Annotated[str, typer.Option("--log-format", help="Log format: plain, or json for schedulers.")]
BadRowsOption = Annotated[
    int | None,
    typer.Option(
        "--max-bad-rows",
        min=0,
        help="Maximum number of bad source rows: they are rejected and listed in RUN_DIR/rejected.jsonl. Short for"
        " --set data.max_bad_rows=N.",
        metavar="N",
        show_default=False,
    ),
]
ColumnsOption = Annotated[
    str | None, typer.Option(help="Column of each field.", metavar="FIELD=COLUMN,…", show_default=False)
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
RehashOption = Annotated[
    bool, typer.Option("--rehash", help="Reread every source file instead of trusting its modification time.")
]
RepairOption = Annotated[bool, typer.Option("--repair", help="Check every output file, and rebuild damaged parts.")]
RebuildOption = Annotated[
    bool,
    typer.Option(
        "--rebuild",
        help="Rebuild parts made with library versions other than those installed; parts without recorded versions"
        " are kept.",
    ),
]


def checked(log_format: str) -> str:
    """The log format, if it is valid."""
    if log_format not in ("plain", "json"):
        raise ConfigError(f"--log-format {log_format}: expected plain or json")
    return log_format


def by_field(text: str | None) -> dict[str, str]:
    """The columns of --columns."""
    mapping: dict[str, str] = {}
    for item in text.split(",") if text else []:
        field, equals, column = (part.strip() for part in item.partition("="))
        if not equals or not column or not field:
            raise ConfigError(f"--columns {text}: expected FIELD=COLUMN, for example anchor=query,negative=neg")
        if field in mapping:
            raise ConfigError(f"--columns {text}: '{field}' is given twice; negative_# means negative_1, negative_2 …")
        mapping[field] = column
    return mapping
