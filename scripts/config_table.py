"""Writes the tables of docs/reference/config/, one page per section, from the config itself.

`python scripts/config_table.py` rewrites the text between the markers of each page; the rest of a page is written by
hand. A section without a page gets one, which then needs a line under `nav` in mkdocs.yml.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator

from negpipe.config.schema import Config
from negpipe.config.section import Section

PAGES = Path(__file__).parents[1] / "docs" / "reference" / "config"
TOP = ""
FILES = {TOP: "index.md", "index": "index-section.md"}
"""Pages that are not called after their section: index.md is the folder's own, of the keys that are in no section."""
BEGIN, END = "<!-- config: made by scripts/config_table.py -->\n", "<!-- /config -->"


def rows(model: type[Section], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Key, type, default and description of every setting."""
    described = model.described()
    for name, field in model.model_fields.items():
        inner = next((part for part in (field.annotation, *get_args(field.annotation)) if _is_model(part)), None)
        if inner is not None and name not in described:
            yield from rows(inner, f"{prefix}{name}.")
            continue
        written = any(isinstance(part, BeforeValidator) for part in field.metadata)
        size = written and isinstance(field.default, int) and field.default >= 2**20  # others are durations, in seconds
        kind = "size" if size else _type(field.annotation)
        default = _size(field.default) if size else _yaml(field.default)
        cell = "required" if field.is_required() else f"`{default}`"
        yield f"{prefix}{name}", kind, cell, described.get(name, "")


def tables() -> dict[str, str]:
    """The table of each section in Markdown, by the section's name."""
    lines: dict[str, list[str]] = {}
    for key, kind, default, text in rows(Config):
        section = key.split(".")[0] if "." in key else TOP
        head = ["| key | type | default | what it does |", "|---|---|---|---|"]
        cells = f"| `{key}` | {kind} | {default} | " + text.replace("|", "\\|") + " |"
        lines.setdefault(section, head).append(cells)
    return {section: "\n".join(table) + "\n" for section, table in lines.items()}


def file_of(section: str) -> Path:
    return PAGES / FILES.get(section, f"{section}.md")


def page(section: str, table: str) -> str:
    """The section's page with the table between its markers."""
    file = file_of(section)
    text = file.read_text(encoding="utf-8") if file.exists() else f"# `{section}`\n\n{BEGIN}{END}\n"
    before, rest = text.split(BEGIN)
    return before + BEGIN + table + END + rest.split(END, 1)[1]


def _is_model(part: Any) -> bool:
    return isinstance(part, type) and issubclass(part, BaseModel)


def _type(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        inner = get_args(annotation)[0]
        if inner in (str, Path):
            return _type(inner)
        return "text, or path, subset and split" if _is_model(inner) else "text or integer"
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if origin in (Union, UnionType):
        return " or ".join(_type(part) for part in get_args(annotation) if part is not NoneType)
    if origin is tuple:
        return f"list of {_type(get_args(annotation)[0])}"
    if origin is dict:
        return "names, each with keys and values" if get_origin(get_args(annotation)[1]) is dict else "keys and values"
    if _is_model(annotation):
        return "keys and values"
    return {bool: "true, false", int: "integer", float: "number", str: "text", Path: "path"}.get(
        annotation, getattr(annotation, "__name__", str(annotation))
    )


def _size(value: int) -> str:
    """As a config has it: 2GiB."""
    return f"{value // 2**30}GiB" if value % 2**30 == 0 else f"{value // 2**20}MiB"


def _yaml(value: Any) -> str:
    if isinstance(value, BaseModel):
        return _yaml(value.model_dump(exclude_defaults=True))
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
    for section, table in tables().items():
        file_of(section).write_text(page(section, table), encoding="utf-8")
