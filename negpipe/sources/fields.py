"""Turns the values of a row into ids, texts, grades and extra values, or says what is wrong with them."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from negpipe.errors import ConfigError
from negpipe.sources.records import Place, RowError
from negpipe.sources.tables import Column

OPTIONAL = "title"  # the one template column that may be null or absent: corpora without titles are common


def text_of(value: Any, place: Place, field: str) -> str:
    """The stripped text. Raises RowError: null, empty or not a string."""
    if isinstance(value, str):
        if text := value.strip():
            return text
    elif value is not None:
        raise RowError("type", f"expected a text, got {_shown(value)}", place, field, "Write a string")
    raise RowError(
        "empty_text", f"the text is {'null or absent' if value is None else 'empty'}", place, field, _EMPTY_REMEDY
    )


def id_of(value: Any, place: Place, field: str) -> str:
    """The id as a string. Raises RowError: missing, or neither a string nor an integer."""
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is None or value == "":
        raise RowError("missing", "there is no id", place, field, "Give every row an id")
    remedy = "Write ids as strings or integers (a column with a missing id is often read as floats)"
    raise RowError("type", f"an id cannot be {_shown(value)}", place, field, remedy)


def grade_of(value: Any, place: Place, field: str) -> float:
    """The finite grade, 1 where there is none. Raises RowError: not a number."""
    if value is None or value == "":
        return 1.0
    try:
        grade = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        grade = math.nan
    if not math.isfinite(grade):
        raise RowError("type", f"the grade {_shown(value)} is not a number", place, field, "Write for example 1 or 0")
    return grade


def extra_of(values: Sequence[Any], names: Sequence[str], place: Place) -> tuple[str | None, ...]:
    """The values of `data.extra` columns as strings: texts as they are, numbers and booleans as JSON writes them.

    Raises RowError: a list, an object, or a number that JSON cannot write.
    """
    return tuple(_extra_of(value, place, name) for value, name in zip(values, names, strict=True))


def _extra_of(value: Any, place: Place, field: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    remedy = "Write a text, a number, true, false or null, or leave the column out of data.extra"
    raise RowError("type", f"an extra column cannot hold {_shown(value)}", place, field, remedy)


@dataclass(frozen=True, slots=True)
class Template:
    """`data.text`, compiled: a document's columns and how they make its text."""

    names: tuple[str, ...]
    pattern: str
    source: str

    @classmethod
    def compile(cls, source: str) -> Template:
        """Raises ConfigError: anything but plain {column} fields, or none of them."""
        names: list[str] = []
        pattern = ""
        try:
            parsed = list(string.Formatter().parse(source))
        except ValueError as error:
            raise ConfigError(f"data.text: '{source}' is not a template ({error}). {_TEMPLATE_REMEDY}") from None
        for literal, name, spec, conversion in parsed:
            pattern += literal.replace("{", "{{").replace("}", "}}")
            if name is None:
                continue
            if not name or spec or conversion or any(sign in name for sign in ".[]{}"):
                raise ConfigError(f"data.text: '{source}' must hold plain column names. {_TEMPLATE_REMEDY}")
            if name not in names:
                names.append(name)
            pattern += f"{{{names.index(name)}}}"
        if not names:
            raise ConfigError(f"data.text: '{source}' names no column. {_TEMPLATE_REMEDY}")
        return cls(tuple(names), pattern, source)

    def columns(self) -> list[Column]:
        return [Column(name, "data.text", required=name != OPTIONAL) for name in self.names]

    def render(self, values: Sequence[Any], place: Place) -> str:
        """The text of a document from the values of `names`. Raises RowError: empty, null or not strings."""
        for name, value in zip(self.names, values, strict=True):
            if not isinstance(value, str):
                if value is None and name == OPTIONAL:
                    values = ["" if v is None and n == OPTIONAL else v for n, v in zip(self.names, values, strict=True)]
                else:
                    text_of(value, place, name)
        text = self.pattern.format(*values).strip()
        if not text:
            field = self.names[-1] if len(self.names) > 1 else self.names[0]
            raise RowError("empty_text", f"the text made by '{self.source}' is empty", place, field, _EMPTY_REMEDY)
        return text


_EMPTY_REMEDY = "Fill it in, or set data.on_empty: skip to leave such rows out"
_TEMPLATE_REMEDY = "Write for example '{title} {text}'; {{ and }} are braces"


def _shown(value: Any) -> str:
    kind = {list: "a list", dict: "an object", bool: "a boolean", float: "a float"}.get(type(value))
    shown = repr(value)
    shown = shown if len(shown) <= 40 else shown[:37] + "..."
    return f"{kind} ({shown})" if kind else shown
