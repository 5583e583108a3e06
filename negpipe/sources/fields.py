"""Converts the values of a row to ids, texts, grades and extra values, or reports what is wrong with them."""

from __future__ import annotations

import json
import math
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from negpipe.errors import ConfigError
from negpipe.sources.chunks import Column, Values
from negpipe.sources.records import Place, RowError

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


def ids_of(column: Values) -> pa.Array | None:
    """`id_of` of a column. None: it would raise for some value."""
    if column.array.null_count or column.kind not in ("text", "integer"):
        return None
    ids = column.array.cast(pa.string())
    return None if _has_empty(ids) else ids


def texts_of(column: Values) -> pa.Array | None:
    """`text_of` of a column. None: it would raise for some value."""
    return None if column.kind != "text" or column.array.null_count else _stripped(column.array)


def extras_of(columns: Sequence[Values]) -> list[pa.Array] | None:
    """`extra_of` of columns. None: they have values other than texts, which must be checked."""
    if any(one.kind not in ("text", "null") for one in columns):
        return None
    return [one.array.cast(pa.string()) for one in columns]


def grades_of(column: Values) -> list[float] | None:
    """`grade_of` of a column. None: it would raise for some value."""
    try:
        grades = [1.0 if value is None or value == "" else float(value) for value in column.array.to_pylist()]
    except (ValueError, OverflowError):
        return None
    return grades if all(map(math.isfinite, grades)) else None


def _has_empty(texts: pa.Array) -> bool:
    return bool(pc.any(pc.equal(pc.binary_length(texts), 0)).as_py())


def _stripped(texts: pa.Array) -> pa.Array | None:
    """Texts stripped like `str.strip`. None: one would be empty."""
    if _has_empty(texts):
        return None
    texts = texts.cast(pa.large_string())
    offsets = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset :][: len(texts) + 1]
    content = np.frombuffer(texts.buffers()[2] or b"", np.uint8)
    ends = np.stack([content[offsets[:-1]], content[offsets[1:] - 1]])
    # Python's whitespace is control characters, spaces, or non-ASCII characters.
    unsure = ((ends <= 0x20) | (ends >= 0x80)).any(axis=0)
    if unsure.any():
        stripped = [text.strip() for text in texts.filter(pa.array(unsure)).to_pylist()]
        if "" in stripped:
            return None
        texts = pc.replace_with_mask(texts, pa.array(unsure), pa.array(stripped, pa.large_string()))
    return texts


def grade_of(value: Any, place: Place, field: str) -> float:
    """The finite grade, 1 if there is none. Raises RowError: not a number."""
    if value is None or value == "":
        return 1.0
    try:
        grade = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        grade = math.nan
    if not math.isfinite(grade):
        problem = f"a grade must be a finite number, not {_shown(value)}"
        raise RowError("type", problem, place, field, "Use for example 1 or 0")
    return grade


def extra_of(values: Sequence[Any], names: Sequence[str], place: Place) -> tuple[str | None, ...]:
    """The values of `data.extra` columns as strings: texts unchanged, numbers and booleans as JSON.

    Raises RowError: a list, an object, or a number that JSON cannot represent.
    """
    return tuple(_extra_of(value, place, name) for value, name in zip(values, names, strict=True))


def _extra_of(value: Any, place: Place, field: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    remedy = "Use a text, a number, true, false or null, or remove the column from data.extra"
    raise RowError("type", f"an extra column cannot hold {_shown(value)}", place, field, remedy)


@dataclass(frozen=True, slots=True)
class Template:
    """`data.text`, compiled: a document's columns and the template of its text."""

    names: tuple[str, ...]
    pattern: str
    source: str

    @classmethod
    def compile(cls, source: str) -> Template:
        """Raises ConfigError: anything other than plain {column} fields, or none."""
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
                raise ConfigError(f"data.text: '{source}' must contain plain column names only. {_TEMPLATE_REMEDY}")
            if name not in names:
                names.append(name)
            pattern += f"{{{names.index(name)}}}"
        if not names:
            raise ConfigError(f"data.text: '{source}' contains no column. {_TEMPLATE_REMEDY}")
        return cls(tuple(names), pattern, source)

    def columns(self) -> list[Column]:
        return [Column(name, "data.text", required=name != OPTIONAL) for name in self.names]

    def _spares(self, name: str) -> bool:
        """Whether a column may be null: a title, or one of several, as the others provide a text."""
        return name == OPTIONAL or len(self.names) > 1

    def render_all(self, columns: Sequence[Values]) -> pa.Array | None:
        """`render` of columns. None: it would raise for some value."""
        named: dict[str, pa.Array] = {}
        for name, column in zip(self.names, columns, strict=True):
            if column.kind not in ("text", "null") or (column.array.null_count and not self._spares(name)):
                return None
            named[name] = pc.fill_null(column.array.cast(pa.large_string()), "")
        pieces: list[Any] = []
        for literal, field, *_ in string.Formatter().parse(self.source):
            pieces += [pa.scalar(literal, pa.large_string())] if literal else []
            pieces += [named[field]] if field else []
        return _stripped(pc.binary_join_element_wise(*pieces, pa.scalar("", pa.large_string())))

    def render(self, values: Sequence[Any], place: Place) -> str:
        """The text of a document from the values of `names`. Raises RowError: empty, null or not strings."""
        for name, value in zip(self.names, values, strict=True):
            if not isinstance(value, str) and not (value is None and self._spares(name)):
                text_of(value, place, name)
        text = self.pattern.format(*(value or "" for value in values)).strip()
        if not text:
            for name, value in zip(self.names, values, strict=True):
                if value is None and name != OPTIONAL:
                    text_of(value, place, name)
            field = self.names[-1] if len(self.names) > 1 else self.names[0]
            raise RowError("empty_text", f"the text made by '{self.source}' is empty", place, field, _EMPTY_REMEDY)
        return text


_EMPTY_REMEDY = "Fill it in, or set data.on_empty: skip to reject such rows"
_TEMPLATE_REMEDY = "Use for example '{title} {text}'; {{ and }} are literal braces"


def _shown(value: Any) -> str:
    kind = {list: "a list", dict: "an object", bool: "a boolean", float: "a float"}.get(type(value))
    shown = repr(value)
    shown = shown if len(shown) <= 40 else shown[:37] + "..."
    return f"{kind} ({shown})" if kind else shown


def about_unknown(name: str) -> str:
    """What an unknown id looks like, if it looks like a known mistake; else empty."""
    if re.fullmatch(r"\d+\.0", name):
        return "It looks like an id that pandas made a float: read and write ids as text (dtype=str)"
    return "Several ids in one cell? Write one judgment per line" if re.search(r"[|,;]", name) else ""
