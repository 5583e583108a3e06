"""Writes docs/reference/commands.md from the command line itself: `python scripts/command_page.py`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer

from negpipe import cli

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "commands.md"
SHARED = 5
"""An option that at least this many commands share, with the same help, is described once."""
HEAD = """# Commands

<!-- Made by scripts/command_page.py from the command line itself. -->

`negpipe COMMAND --help` prints the same text. All commands use the same [exit codes](exit-codes.md). CONFIG is a path,
the name of a file in `configs/`, or a run directory.
"""


def commands(group: Any = None, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every command with its full name, in the order of `--help`."""
    if group is None:
        group = typer.main.get_command(cli.app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def page() -> str:
    """The complete page in Markdown."""
    every = dict(commands())
    uses = Counter(row for command in every.values() for row in _options(command))
    shared = {row for row, count in uses.items() if count >= SHARED}
    names = " · ".join(f"[`{name}`](#{_anchor(name)})" for name in every)
    lines = [
        HEAD,
        f"{names}\n",
        "## Common options\n",
        *_table("option", (row for row in uses if row in shared)),
    ]
    for name, command in every.items():
        arguments = [parameter for parameter in command.params if not _is_option(parameter)]
        lines += [f"## `negpipe {name}` {{ #{_anchor(name)} }}\n", *_description(command.help)]
        lines += ["```text", " ".join(["negpipe", name, *map(_argument, arguments), "[OPTIONS]"]), "```\n"]
        explained = [(f"`{_argument(one)}`", one.help) for one in arguments if one.help and one.name != "config"]
        lines += _table("argument", explained)
        own = [row for row in _options(command) if row not in shared]
        lines += _table("option", own)
        others = [row[0] for row in _options(command) if row in shared]
        if others:
            lines.append(f"Also {', '.join(others)}.\n")
    return "\n".join(lines).rstrip() + "\n"


def _options(command: Any) -> list[tuple[str, str]]:
    """Each option as typed, and its help."""
    rows = []
    for option in command.params:
        if not _is_option(option) or option.hidden:
            continue
        value = "" if option.is_flag else f" {option.metavar or _value(option.type_descriptor.annotation)}"
        text = option.help or ""
        if option.show_default and option.default not in (None, False, ()) and not option.required:
            text += f" Default: `{option.default}`."
        if option.multiple and "repeatable" not in text:
            text += " Repeatable."
        rows.append((f"`{', '.join([*option.opts, *option.secondary_opts])}{value}`", text.strip()))
    return rows


def _is_option(parameter: Any) -> bool:
    return bool(parameter.opts and parameter.opts[0].startswith("-"))


def _argument(argument: Any) -> str:
    name = (argument.metavar or argument.name.upper()).strip("[]").removesuffix("...")
    several = f"{name} …" if argument.nargs != 1 else name
    return several if argument.required else f"[{several}]"


def _value(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    if get_origin(annotation) is list:
        return _value(get_args(annotation)[0])
    return {int: "N", float: "NUMBER", Path: "PATH"}.get(annotation, "TEXT")


def _description(text: str) -> list[str]:
    """The paragraphs of a help text, with its examples as code."""
    lines = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        items = [" ".join(item.split()).replace(r"\[", "[") for item in re.split(r"^- ", paragraph, flags=re.MULTILINE)]
        words = "\n- ".join(items).strip()  # brackets are escaped, as help is Rich markup
        if words.startswith("Example: "):
            lines += ["```bash", words.removeprefix("Example: "), "```\n"]
        else:
            lines.append(f"{words}\n")
    return lines


def _table(title: str, rows: Any) -> list[str]:
    cells = [f"| {name.replace('|', chr(92) + '|')} | {text.replace('|', chr(92) + '|')} |" for name, text in rows]
    return [f"| {title} | |", "|---|---|", *cells, ""] if cells else []


def _anchor(name: str) -> str:
    return name.replace(" ", "-")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
