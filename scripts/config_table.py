"""Writes the README's table of config keys from the config itself: `python scripts/config_table.py README.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from negpipe.config.schema import Config

BEGIN, END = "<!-- config: made by scripts/config_table.py -->\n", "<!-- /config -->"


def rows(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Key, type, default and description of every setting."""
    for name, field in model.model_fields.items():
        inner = next((part for part in (field.annotation, *get_args(field.annotation)) if _is_model(part)), None)
        if inner is not None and not field.description:
            yield from rows(inner, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else f"`{_yaml(field.default)}`"
        yield f"{prefix}{name}", _type(field.annotation), default, field.description or ""


def table() -> str:
    """The whole table in Markdown."""
    lines = ["| key | type | default | what it does |", "|---|---|---|---|"]
    for key, kind, default, text in rows(Config):
        lines.append(f"| `{key}` | {kind} | {default} | " + text.replace("|", "\\|") + " |")
    return "\n".join(lines) + "\n"


def insert(readme: str) -> str:
    """The README with the table between its markers."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END, 1)[1]


def _is_model(part: Any) -> bool:
    return isinstance(part, type) and issubclass(part, BaseModel)


def _type(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        inner = get_args(annotation)[0]
        return "text, or path, subset and split" if _is_model(inner) else "text" if inner is str else "text or integer"
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if origin in (Union, UnionType):
        return " or ".join(_type(part) for part in get_args(annotation) if part is not NoneType)
    if origin is tuple:
        return f"list of {_type(get_args(annotation)[0])}"
    if origin is dict:
        return "names, each with keys and values" if get_origin(get_args(annotation)[1]) is dict else "keys and values"
    return {bool: "true, false", int: "integer", float: "number", str: "text", Path: "path"}.get(
        annotation, getattr(annotation, "__name__", str(annotation))
    )


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, dict):
        return "{}"
    return str(value) if value != "" else '""'


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(insert(path.read_text(encoding="utf-8")), encoding="utf-8")
