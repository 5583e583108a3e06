"""Finds the columns of a file: by the names that trainers and miners use, or as specified by the caller."""

from __future__ import annotations

import re
import shutil
from codecs import BOM_UTF8
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from negpipe import sources
from negpipe.errors import ConfigError, InputError
from negpipe.review.audit import foreign, runs

if TYPE_CHECKING:
    import duckdb

# The fields of a row, and the usual names of their columns. `#` stands for a number: negative_1, negative_2, …
FIELDS: Mapping[str, tuple[str, ...]] = {
    "anchor": ("anchor", "query"),
    "positive": ("positive", "pos"),
    "negative": ("negative", "neg", "negative_#"),
    "label": ("label", "labels"),
    "anchor_id": ("anchor_id", "query_id"),
    "positive_id": ("positive_id", "positive_ids", "pos_id", "pos_ids"),
    "negative_id": ("negative_id", "negative_ids", "neg_id", "neg_ids", "negative_#_id"),
    "positive_score": ("positive_score", "pos_scores"),
    "negative_score": ("negative_score", "neg_scores"),
    "score": ("score", "scores"),
    "negative_rank": ("negative_rank",),
    "rank": ("rank", "ranks"),
}
_COPIED = 2**22  # bytes at a time
_LISTED = 12  # columns listed in a message


@dataclass(frozen=True)
class RowLayout:
    """A file and the columns of each field: none, one (of texts or of lists), or one per document.

    Attributes:
        files: Parquet files, in order; other files are copied into one.
        columns: field → its columns in SQL, each with whether it contains lists.
    """

    files: Sequence[Path]
    columns: Mapping[str, Sequence[tuple[str, bool]]]

    def has(self, field: str) -> bool:
        """Whether the file has the field."""
        return bool(self.columns.get(field))

    @property
    def labelled(self) -> bool:
        """Whether documents of both kinds are in `positive`, distinguished by `label`."""
        return self.has("label")

    @property
    def pairs(self) -> bool:
        """Whether a row has one labelled document: an anchor's rows belong together."""
        return self.labelled and not self.columns["positive"][0][1]

    @property
    def ranked(self) -> bool:
        """Whether rows only name candidates: positives come from elsewhere, and have no scores."""
        return not self.has("positive")

    @property
    def scored(self) -> bool:
        """Whether documents have scores."""
        return any(map(self.has, ("score", "positive_score", "negative_score")))

    def list_of(self, field: str, kind: str) -> str:
        """The field as an SQL list."""
        columns = self.columns.get(field, ())
        if not columns:
            return f"null::{kind}[]"
        if len(columns) == 1 and columns[0][1]:
            return f"{columns[0][0]}::{kind}[]"
        return f"[{', '.join(f'{value}::{kind}' for value, _ in columns)}]"

    def value_of(self, field: str) -> str:
        """The field as SQL text."""
        columns = self.columns.get(field, ())
        return f"{columns[0][0]}::varchar" if columns else "null::varchar"


def layout_of(
    database: duckdb.DuckDBPyConnection,
    source: Path,
    mapping: Mapping[str, str],
    scratch: Path,
    texts: runs.TextTables | None = None,
) -> RowLayout:
    """Find the columns of a file.

    Args:
        database: reads the file.
        source: the file, or a folder of Parquet files, or a format of `foreign`, or a run.
        mapping: field → column, for fields without a usual name; `#` stands for a number, a dot leads into an
            object or a list of them.
        scratch: folder for the copy of a file that is not Parquet.
        texts: the texts of a run's ids.

    Raises:
        ConfigError: the mapping contains an unknown field.
        InputError: the file cannot be read, or a column is missing or of the wrong type.
    """
    import duckdb

    for field in mapping:
        if field not in FIELDS:
            raise ConfigError(f"--columns {field}=…: '{field}' is not one of {', '.join(FIELDS)}")
    plain = scratch / "rows.parquet"
    if not mapping and source.exists() and (run := sources.run_of(source)):
        runs.flatten(database, run, texts, plain)
        return RowLayout([plain], {name: [(name, False)] for name in runs.COLUMNS})
    foreign_rows = None if mapping else foreign.recognized(source)
    files = [plain] if foreign_rows else _files(source)
    try:
        if foreign_rows:
            foreign.flatten(database, foreign_rows, plain)
        elif files[0].suffix != ".parquet":
            table, files = _text_table(source, scratch), [plain]
            database.execute(f"copy (select * from {table}) to '{quoted_path(plain)}' (compression lz4)")
        described = database.execute(f"describe select * from '{quoted_path(files[0])}'").fetchall()
        nested = {name: _nested(database, files[0], name) for name in mapping.values() if "." in name}
    except duckdb.OutOfMemoryException:
        raise
    except duckdb.Error as error:
        raise InputError(f"cannot be read: {str(error).splitlines()[0]}", file=str(source)) from None
    types = {row[0]: row[1] for row in described}
    inside = {name: found for name, found in nested.items() if found and name not in types}
    for name, kind in types.items():
        if kind == "JSON":  # text in some rows, lists in others
            value = quoted(name)
            inside[name] = (
                f"if(json_type({value}) = 'ARRAY', {value}::varchar[], if({value} is null, null, [{value}->>'$']))",
                "VARCHAR[]",
            )
    types |= {name: kind for name, (_, kind) in inside.items()}
    columns = {
        field: [
            (inside[name][0] if name in inside else quoted(name), is_list)
            for name, is_list in _found(field, mapping.get(field), types, source)
        ]
        for field in FIELDS
    }
    _check_texts(columns, list(types), source)
    if columns["label"] and columns["negative"]:
        columns["label"] = []
    return RowLayout(files, columns)


def _check_texts(columns: Mapping[str, Sequence[tuple[str, bool]]], there: list[str], source: Path) -> None:
    missing = [field for field in ("anchor", "positive") if not columns[field]]
    if not columns["negative"] and not columns["label"]:
        missing.append("negative")
    if not missing:
        return
    listed = ", ".join(there[:_LISTED]) + (", …" if len(there) > _LISTED else "")
    example = ",".join(f"{field}=COLUMN" for field in missing)
    remedy = f"Name them: --columns {example} (for a file of labelled documents: positive=COLUMN,label=COLUMN)"
    if any(columns[f"{field}_id"] for field in missing):
        remedy = (
            "Ids alone cannot be audited, as texts are compared: add columns with the texts, or write the negatives"
            " as a TREC run (query Q0 document rank score tag), which gets its texts from CONFIG"
        )
    raise InputError(
        f"no column is known to hold the {' or the '.join(missing)}; columns: {listed}",
        file=str(source),
        remedy=remedy,
    )


def quoted(name: str) -> str:
    """A quoted SQL name."""
    return '"' + name.replace('"', '""') + '"'


def quoted_path(path: Path) -> str:
    """A path for single quotes in SQL, with its wildcards escaped."""
    return re.sub(r"([*?\[])", r"[\1]", str(path)).replace("'", "''")


def _nested(database: duckdb.DuckDBPyConnection, file: Path, name: str) -> tuple[str, str] | None:
    """The SQL value and type for a name with dots; None if there is none."""
    import duckdb

    first, *keys = name.split(".")
    value, kind = quoted(first), ""
    with suppress(duckdb.BinderException):
        for key in [None, *keys]:
            if key is not None:
                of_list = kind.endswith("[]")
                value = f"[entry.{quoted(key)} for entry in {value}]" if of_list else f"{value}.{quoted(key)}"
            described = database.execute(f"describe select {value} as v from '{quoted_path(file)}'").fetchone()
            kind = str(described[1]) if described else ""
        return value, kind
    return None


def _files(source: Path) -> list[Path]:
    if not source.exists():
        raise InputError("the file does not exist", file=str(source), remedy="Fix the path")
    files = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
    if not files:
        raise InputError("the folder contains no .parquet file", file=str(source), remedy="Name a file, or mine first")
    return files


def _text_table(source: Path, scratch: Path) -> str:
    extension = sources.extension_of(str(source))
    if extension not in (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt"):
        raise InputError("expected .parquet, .jsonl, .json, .csv or .tsv, compressed or not", file=str(source))
    # As ingest opens it: decompressed, and in UTF-8 without a byte order mark.
    plain = scratch / f"plain{extension}"
    with sources.opened(str(source)) as file, plain.open("wb") as copy:
        try:
            copy.write(file.read(len(BOM_UTF8)).removeprefix(BOM_UTF8))
            shutil.copyfileobj(file, copy, _COPIED)
        except (EOFError, OSError, ValueError) as error:
            raise InputError(f"cannot be read: {error}", file=str(source)) from None
    if extension in (".csv", ".tsv", ".txt"):
        return f"read_csv('{quoted_path(plain)}', header=true, max_line_size=67108864)"
    lines = extension != ".json" and not sources.is_whole(str(plain))
    return f"read_json('{quoted_path(plain)}', format='{'newline_delimited' if lines else 'auto'}')"


def _found(field: str, wanted: str | None, types: Mapping[str, str], source: Path) -> list[tuple[str, bool]]:
    names = (wanted,) if wanted is not None else FIELDS[field]
    for name in names:
        pattern = re.compile("(\\d+)".join(map(re.escape, name.split("#"))))
        numbered = [(match, column) for column in types if (match := pattern.fullmatch(column))]
        numbered.sort(key=lambda item: [int(number) for number in item[0].groups()])
        if numbered:
            return [(column, _is_list(field, column, types[column], source)) for _, column in numbered]
    if wanted is not None:
        raise InputError(
            f"column '{wanted}' for the {field} does not exist; columns: {', '.join(list(types)[:_LISTED])}",
            file=str(source),
            field=f"--columns {field}",
        )
    return []


def _is_list(field: str, column: str, kind: str, source: Path) -> bool:
    one = field in ("anchor", "anchor_id")
    if kind.startswith(("STRUCT", "MAP")) or kind.endswith("[][]") or ("STRUCT" in kind) or (one and "[]" in kind):
        wanted = "a text" if one else "texts, numbers, or lists of them"
        raise InputError(
            f"holds {kind}, expected {wanted} for the {field}",
            file=str(source),
            field=column,
            remedy="Flatten it, or name another column with --columns",
        )
    return kind.endswith("]")
