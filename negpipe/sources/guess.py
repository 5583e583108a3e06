"""Detects the layout of a source for `data.format: auto`, from names of files, configs of a repository, and columns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from negpipe.config import schema
from negpipe.errors import ConfigError, InputError
from negpipe.sources import hub, layouts
from negpipe.sources.places import EXTENSIONS, SourceTable, extension_of, locate, paths_of
from negpipe.sources.readers import column
from negpipe.sources.tables import column_names, keys_of, no_name, not_separated
from negpipe.sources.trec import refuse_run
from negpipe.store.files import BOOKS

_ROWS = (
    ("flagembedding", {"query", "pos"}),
    ("tevatron", {"positive_passages"}),
    ("tevatron", {"positive_document_ids"}),
    ("dpr", {"question", "positive_ctxs"}),
    ("ms-swift", {"messages", "positive_messages"}),
)
"""Columns that identify a layout of rows."""


_TABLES = {
    "corpus": r"corpus|collection|doc(ument)?s|passages",
    "queries": r"query|queries|questions|topics",
    "qrels": r"qrels|links|labels|relevan|judg",
}
"""How names of files begin that contain one of the three tables."""
_NO_FILES = f"Name the folder that contains files of rows ({', '.join(EXTENSIONS)}), or those files"
_SHOWN = 8  # files of a folder that a message names


def recognized(data: schema.Data) -> schema.Data:
    """The source with `auto` resolved.

    Raises:
        InputError: the source does not exist, or has no known layout.
        ConfigError: its layout does not match the other settings.
    """
    if data.format == "columns" and _is_one_object(data):
        return _with(data, {"format": "llama_index", "path": data.corpus and data.corpus.path})
    if data.format != "auto":
        return data
    found = _looked_at(data)
    return _with(data, found)


def _with(data: schema.Data, found: dict[str, Any]) -> schema.Data:
    try:
        return schema.Data.model_validate(data.model_dump() | found)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"data: {problem} (the source looks like data.format: {found['format']})") from None


def _is_one_object(data: schema.Data) -> bool:
    """Whether the three tables are in one JSON object."""
    named = {one.path for one in (data.corpus, data.queries, data.qrels) if one}
    [path] = named if len(named) == 1 else [None]
    return isinstance(path, str) and Path(path).is_file() and _object(path) == "llama_index"


def _looked_at(data: schema.Data) -> dict[str, Any]:
    if data.path is None:
        return {"format": "columns"}
    paths = paths_of(data.path)
    kind = locate(paths[0])
    refuse_run(paths[0], data.table)
    if kind == "folder" and len(paths) == 1:
        return _folder(data, Path(paths[0]))
    if kind == "hub":
        return _repository(data, paths[0])
    if kind == "file" and (whole := _object(paths[0])):
        return {"format": whole}
    return _rows(data, SourceTable(paths, data.subset, None, data.revision, data.table))


def _folder(data: schema.Data, folder: Path) -> dict[str, Any]:
    if layouts.is_beir(folder):
        return {"format": "beir"}
    if subsets := hub.subsets(str(folder), None):
        return _configs(data, str(folder), subsets)
    tables = {name: layouts.either(folder, name) for name in ("queries", "documents", "corpus", "train", data.split)}
    if tables["queries"] and tables["documents"] and tables["train"]:
        return {"format": "pylate"}
    rows = tables[data.split]
    if rows and _object(str(rows)) == "nemo":
        return {"format": "nemo", "path": str(rows)}
    if rows:
        found = {"path": str(rows)} | _rows(data, SourceTable((str(rows),), dialect=data.table))
        pool = {"corpus": {"path": str(tables["corpus"])}} if tables["corpus"] and data.corpus is None else {}
        return found | pool
    if Path(f"{str(folder).rstrip('/')}-qrels").is_dir():
        return {"format": "beir"}
    return _rows_of_folder(data, folder)


def _rows_of_folder(data: schema.Data, folder: Path) -> dict[str, Any]:
    """A folder of files with consecutive rows, or of a dataset without configs."""
    there = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith((".", "_")))
    files = [str(folder / name) for name in there if extension_of(name) in EXTENSIONS and (folder / name).is_file()]
    named = [name for name in there if re.match(r"(train|test|dev|valid)", name)]
    if named and len(files) == len(there):
        splits = sorted({name.partition(".")[0] for name in named})
        remedy = f"Available splits: {', '.join(splits)}. Set one in data.split"
        raise InputError(
            f"no rows of the split '{data.split}'",
            file=str(folder),
            field="split",
            remedy=remedy,
            there=splits,
        )
    try:
        if files and len(files) == len(there):
            found = _rows(data, SourceTable(tuple(files), dialect=data.table))
            _refuse_other_rows(data, files)
            return {"path": files} | found
        if {"README.md", "data", "state.json", "dataset_dict.json"} & {*there}:
            return _rows(data, SourceTable((str(folder),), data.subset, data.split))
    except InputError as error:
        # The files have rows, but something is wrong with them; or the error alone knows the columns of their dataset.
        if error.field != "data.format" or not files:
            raise
    if (folder / BOOKS).is_dir():
        remedy = f"`negpipe status {folder}` shows its state; its rows are in {folder}/triplets"
        raise InputError("this is a run directory, not a source", file=str(folder), field="data.path", remedy=remedy)
    shown = ", ".join(there[:_SHOWN]) + (" …" if len(there) > _SHOWN else "")
    columns = {file: names for file in files[:_SHOWN] if (names := _columns_if_readable(file, data))}
    raise InputError(
        f"this folder has no known layout. It contains {shown or 'nothing'}{_listed(columns)}",
        file=str(folder),
        field="data.format",
        remedy=_three_tables(data, files) or (_remedy(columns, data) if files else _NO_FILES),
    )


def _columns_if_readable(file: str, data: schema.Data) -> list[str]:
    try:
        return column_names(SourceTable((file,), dialect=data.table))
    except InputError:
        return []


def _listed(columns: Mapping[str, Sequence[str]]) -> str:
    """The columns of each of several files."""
    return "".join(f"; columns of {Path(file).name}: {', '.join(names)}" for file, names in columns.items())


def _remedy(columns: Mapping[str, Sequence[str]], data: schema.Data) -> str:
    """What to set to read files with these columns."""
    for file, names in columns.items():
        if unseparated := not_separated(names, file, SourceTable((file,), dialect=data.table)):
            return unseparated if len(columns) == 1 else f"{Path(file).name}: {unseparated}"
    if any(no_name(name) for names in columns.values() for name in names):
        return "The first line does not seem to be a header: set the columns in data.table.header"
    return (
        "For rows of an anchor and its positive, set data.format: pairs, data.columns.anchor and data.columns.positive;"
        " for tables of documents, queries and judgments, set data.format: columns, data.corpus, data.queries,"
        " data.qrels and, in data.columns, those of corpus_id, query_id, query_text, qrels_query_id, qrels_corpus_id"
        " and grade that differ (docs/reference/config/data.md). docs/how-to/data.md shows other layouts, and how"
        " nested fields are converted"
    )


def _refuse_other_rows(data: schema.Data, files: list[str]) -> None:
    """Raises InputError: a file beside rows of pairs has other rows, as an extra corpus has."""
    wanted = [column(data, key) for key in ("anchor", "positive")]
    rows = {
        file: all(one.among(column_names(SourceTable((file,), dialect=data.table))) for one in wanted) for file in files
    }
    pairs, others = ([file for file in files if rows[file] is kind] for kind in (True, False))
    if pairs and others:
        path = pairs[0] if len(pairs) == 1 else f"[{', '.join(pairs)}]"
        raise InputError(
            f"this file has no columns for anchor and positive, as {pairs[0]} has",
            file=others[0],
            field="data.path",
            remedy=f"If it is an extra corpus, set data.path: {path} and data.corpus: {others[0]}"
            f" (negpipe inspect {' '.join(pairs)} --set data.corpus={others[0]}); else name the files to read",
        )


def _three_tables(data: schema.Data, files: list[str]) -> str:
    """The settings that read a folder whose files are called like the three tables; empty if they are not."""
    found: dict[str, str] = {}
    for role, pattern in _TABLES.items():
        named = [file for file in files if re.match(pattern, Path(file).name, re.IGNORECASE)]
        named = [file for file in named if data.split in Path(file).name] or named
        if len(named) != 1:
            return ""
        found[role] = named[0]
    settings = " ".join(f"--set data.{role}={file}" for role, file in found.items())
    return f"If its files are the three tables, add --set data.format=columns {settings}, or the same to the config"


def _repository(data: schema.Data, path: str) -> dict[str, Any]:
    try:
        subsets = hub.subsets(path, data.revision)
    except InputError:
        return {"format": "beir"}  # its reader reports what is missing
    return _configs(data, path, subsets)


def _configs(data: schema.Data, path: str, subsets: list[str]) -> dict[str, Any]:
    """The layout of a repository, by its configs."""
    before = f"{data.subset}-" if data.subset else ""
    if {before + "corpus", before + "queries"} <= {*subsets}:
        judged = {before + "qrels", before + "default"} & {*subsets}
        return {"format": "mteb" if judged else "beir"}
    if {"queries", "documents", "train"} <= {*subsets}:
        return {"format": "pylate"}
    if {"train", "corpus"} <= {*subsets} and data.corpus is None and data.subset is None:  # rows with ids of documents
        table = SourceTable((path,), "train", data.split, data.revision)
        return {"subset": "train", "corpus": {"path": path, "subset": "corpus"}} | _rows(data, table)
    return _rows(data, SourceTable((path,), data.subset, data.split, data.revision))


@lru_cache(64)
def _stated(path: str, _: tuple[int, int]) -> tuple[str, ...]:
    return tuple(keys_of(path))


def _object(path: str) -> str | None:
    """The layout of a file with one JSON object that contains tables."""
    if extension_of(path) not in (".json", ".jsonl", ".ndjson") or not Path(path).is_file():
        return None
    about = Path(path).stat()
    keys = {*_stated(path, (about.st_size, about.st_mtime_ns))}
    if {"queries", "corpus", "relevant_docs"} <= keys:
        return "llama_index"
    return "nemo" if {"corpus", "data"} <= keys else None


def _rows(data: schema.Data, table: SourceTable) -> dict[str, Any]:
    """The layout of a table of rows, by its columns."""
    names = column_names(table)
    for layout, columns in _ROWS:
        if columns <= {*names}:
            return {"format": layout}
    wanted = (column(data, "anchor"), column(data, "positive"))
    if all(one.among(names) for one in wanted):
        own: dict[str, str] = {key: key for key in ("anchor_id", "positive_id", "label") if key in names}
        if any(name.startswith("negative") and name.endswith("_id") for name in names):
            own |= {"negative_id": "negative_id"}
        if "labels" in names:
            own |= {"label": "labels"}
        stated = {key: value for key, value in data.columns.model_dump().items() if value is not None}
        return {"format": "pairs", "columns": own | stated}
    by_file = {path: column_names(table._replace(paths=(path,))) for path in table.paths}
    same = all(there == names for there in by_file.values())
    shown = f"; columns: {', '.join(names) or 'none'}" if same else _listed(by_file)
    raise InputError(
        f"the rows have no known layout{shown}",
        file=table.path if same else table.name,
        field="data.format",
        remedy=_remedy(by_file, data),
    )
