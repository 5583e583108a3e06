"""The command line: parse, call, exit code."""

from __future__ import annotations

import sys
import traceback

import typer
from typer.exceptions import TyperException

from negpipe.cli import run  # isort: split

from negpipe.cli import shards  # isort: split

from negpipe.cli import inspect  # isort: split

from negpipe.cli import planning  # isort: split

from negpipe.cli import results  # isort: split

from negpipe.cli import audit  # isort: split

from negpipe.cli import calibrate  # isort: split

from negpipe.cli import report  # isort: split

from negpipe.cli import train  # isort: split

from negpipe.cli import ablate  # isort: split

from negpipe.cli import refresh  # isort: split

from negpipe.cli import doctor  # isort: split

from negpipe.cli import config, maintenance
from negpipe.cli.app import app, typed
from negpipe.cli.signals import Terminated, prompt_end
from negpipe.config import machine
from negpipe.errors import NegpipeError
from negpipe.redaction import redact
from negpipe.review.wording import filled_in

__all__ = [
    "ablate",
    "app",
    "audit",
    "calibrate",
    "config",
    "doctor",
    "inspect",
    "main",
    "maintenance",
    "planning",
    "refresh",
    "report",
    "results",
    "run",
    "shards",
    "train",
]


def main() -> None:
    """Run the command line and exit with the documented code."""
    if sys.platform == "win32":
        sys.exit("negpipe: Windows is not supported: use Linux, for example in WSL")
    machine.share_freed_memory()
    arguments = sys.argv[1:]
    log_format = "json" if "json" in arguments or "--log-format=json" in arguments else "plain"
    debug = "--debug" in arguments
    try:
        with prompt_end():
            code = app(standalone_mode=False)
    except NegpipeError as error:
        sys.exit(_fail(filled_in(str(error), typed()), error.code, error.exit_code, log_format, trace=debug))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(_interrupted("Interrupted", 130))
    except Terminated:
        sys.exit(_interrupted("Terminated", 143))
    except TyperException as error:
        # Without a message, Typer has already shown the help.
        message, context = error.format_message(), getattr(error, "ctx", None)
        if "extra argument" in message and "--set" in arguments:
            message += f". {_about_set(arguments)}"
        _, example, words = ((context.command.help if context else None) or "").rpartition("Example: ")
        if "Missing argument" in message and example:
            message += f" {example}{words}"
        sys.exit(_fail(message, "usage", error.exit_code, log_format) if message else error.exit_code)
    except Exception as error:
        hint = "" if debug else " Run the same command with --debug for the traceback."
        message = f"unexpected {type(error).__name__}: {error}. This is a bug; finished parts are kept.{hint}"
        sys.exit(_fail(message, "unexpected", 1, log_format, trace=debug))
    # Typer does not raise on Ctrl-C or typer.Exit: it returns their exit codes.
    sys.exit(_interrupted("Interrupted", code) if code == 130 else code)


def _about_set(arguments: list[str]) -> str:
    """Why a word after --set may be left over."""
    for option, key, value in zip(arguments, arguments[1:], arguments[2:], strict=False):
        if option == "--set" and "=" not in key:
            return f"The value follows an equals sign: --set {key}={value.removeprefix('=')}"
    return "Quote values with spaces or braces: --set 'data.text={title} {text}'"


def _fail(message: str, code: str, exit_code: int, log_format: str, *, trace: bool = False) -> int:
    from negpipe.cli import console
    from negpipe.review import wording

    message, shown = redact(message), redact(traceback.format_exc()) if trace else ""
    if log_format == "json":
        console.set_up_logging("json", debug=False)
        fields = {"error": code, "exit_code": exit_code} | ({"trace": shown} if shown else {})
        console.logger.error("%s", message, extra={"fields": fields})
    else:
        console.err.print(wording.visible(shown), end="", markup=False, soft_wrap=True)
        console.err.print(wording.visible(f"negpipe: {message}"), style="red", markup=False, soft_wrap=True)
    return exit_code


def _interrupted(what: str, code: int) -> int:
    from negpipe.cli import console

    console.err.print(f"{what}. Finished parts are kept: run the same command again to resume.", style="yellow")
    return code
