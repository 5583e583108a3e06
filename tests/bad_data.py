"""Bad data of every kind for every kind of source: what is wrong, and what the error must say of it.

A `Source` is a small sound source as rows of files, with the places where a document, a query and a judgment stand.
A `Fault` is one bad row for it: it is appended, so that sound rows keep their places.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

DOCUMENTS, QUERIES = 6, 3
LONG = "x" * 50_000_000


@dataclass(frozen=True)
class Place:
    """Where rows of a kind stand: the file, and what its columns are called here."""

    file: str
    columns: dict[str, str]


@dataclass(frozen=True)
class Source:
    """A source of one format; `settings` are those of `data`, with FOLDER for where its files are written."""

    settings: dict[str, Any]
    files: dict[str, list[Any]]
    places: dict[str, Place]
    readme: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the files; returns the settings of `data`."""
        for name, rows in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_parquet(rows) if path.suffix == ".parquet" else b"".join(_lines(path.suffix, rows)))
        for name, text in self.readme.items():
            (folder / name).write_text(text, encoding="utf-8")
        placed = json.dumps(self.settings).replace("FOLDER", str(folder))
        settings: dict[str, Any] = json.loads(placed)
        return settings

    def row_of(self, file: str, at: int) -> int:
        """How an error counts the row `at` of a file: lines from 1, a header among them; rows of a table from 0."""
        if file.endswith(".parquet") or self.readme:
            return at
        return at + (2 if file.endswith((".csv", ".tsv")) else 1)


def _lines(suffix: str, rows: list[Any]) -> Iterator[bytes]:
    columns = list(rows[0]) if rows and isinstance(rows[0], dict) else []
    if suffix in (".csv", ".tsv") and columns:
        rows = [dict(zip(columns, columns, strict=True)), *rows]
    for row in rows:
        if isinstance(row, bytes):
            yield row + b"\n"
        elif suffix in (".csv", ".tsv"):
            out = io.StringIO()
            sign = "," if suffix == ".csv" else "\t"
            csv.writer(out, delimiter=sign, lineterminator="\n").writerow([row.get(name, "") for name in columns])
            yield out.getvalue().encode()
        else:
            yield (json.dumps(row) + "\n").encode()


def _parquet(rows: list[Any]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


# --- sound sources ----------------------------------------------------------------------------------------


def _three(ending: str, judged: str, **names: str) -> tuple[dict[str, list[Any]], dict[str, Place]]:
    """Three tables, and where their rows stand."""
    corpus, queries, qrels = (names.get(name, name) + ending for name in ("corpus", "queries", "qrels"))
    qrels = judged or qrels
    files: dict[str, list[Any]] = {
        corpus: [{"_id": f"d{i}", "title": f"t{i}", "text": f"document {i}"} for i in range(DOCUMENTS)],
        queries: [{"_id": f"q{i}", "text": f"query {i}"} for i in range(QUERIES)],
        qrels: [{"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 1} for i in range(QUERIES)],
    }
    places = {
        "document": Place(corpus, {"id": "_id", "text": "text", "title": "title"}),
        "query": Place(queries, {"id": "_id", "text": "text"}),
        "judgment": Place(qrels, {"query": "query-id", "document": "corpus-id", "grade": "score"}),
    }
    return files, places


def _columns(ending: str) -> Source:
    files, places = _three(ending, "")
    named = {name: f"FOLDER/{name}{ending}" for name in ("corpus", "queries", "qrels")}
    return Source({"format": "columns", **named}, files, places)


def _beir() -> Source:
    files, places = _three(".jsonl", "qrels/train.tsv")
    return Source({"format": "beir", "path": "FOLDER"}, files, places)


def _repository() -> Source:
    """As on the hub: a repository of texts, one of judgments beside it."""
    files, places = _three(".jsonl", "repo-qrels/train.tsv", corpus="repo/corpus", queries="repo/queries")
    subsets = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: {name}\n    path: {name}.jsonl\n"
        for name in ("corpus", "queries")
    )
    split = "- config_name: default\n  data_files:\n  - split: train\n    path: train.tsv\n"
    readme = {
        f"{name}/README.md": f"---\nconfigs:\n{configs}---\n"
        for name, configs in (("repo", subsets), ("repo-qrels", split))
    }
    return Source({"format": "beir", "path": "FOLDER/repo"}, files, places, readme)


def _pairs(ending: str, *, ids: bool) -> Source:
    rows = [{"anchor": f"query {i}", "positive": f"document {i}"} for i in range(DOCUMENTS)]
    named = [{"qid": f"q{i}", "did": f"d{i}"} if ids else {} for i in range(DOCUMENTS)]
    columns = {"anchor_id": "qid", "positive_id": "did"} if ids else {}
    files: dict[str, list[Any]] = {f"p{ending}": [a | b for a, b in zip(rows, named, strict=True)]}
    places = {
        "document": Place(f"p{ending}", {"text": "positive"} | ({"id": "did"} if ids else {})),
        "query": Place(f"p{ending}", {"text": "anchor"} | ({"id": "qid"} if ids else {})),
    }
    return Source({"format": "pairs", "path": f"FOLDER/p{ending}", "columns": columns}, files, places)


def _flagembedding(*, pool: bool) -> Source:
    files: dict[str, list[Any]] = {
        "f.jsonl": [{"query": f"query {i}", "pos": [f"document {i}"], "neg": [f"other {i}"]} for i in range(DOCUMENTS)]
    }
    places = {"list": Place("f.jsonl", {"pos": "pos", "neg": "neg"}), "query": Place("f.jsonl", {"text": "query"})}
    settings: dict[str, Any] = {"format": "flagembedding", "path": "FOLDER/f.jsonl"}
    if pool:
        files = {"pool.jsonl": [{"text": f"candidate {i}"} for i in range(DOCUMENTS)], **files}
        places["document"] = Place("pool.jsonl", {"text": "text"})
        settings |= {"corpus": "FOLDER/pool.jsonl", "text": "{text}"}
    return Source(settings, files, places)


def sources() -> dict[str, Source]:
    """A sound source of every format."""
    return {
        "beir": _beir(),
        "jsonl": _columns(".jsonl"),
        "csv": _columns(".csv"),
        "parquet": _columns(".parquet"),
        "pairs": _pairs(".jsonl", ids=False),
        "pairs with ids": _pairs(".jsonl", ids=True),
        "pairs of csv": _pairs(".csv", ids=True),
        "flagembedding": _flagembedding(pool=False),
        "candidate pool": _flagembedding(pool=True),
        "repository": _repository(),
    }


# --- bad rows ---------------------------------------------------------------------------------------------

EMPTY = "data.on_empty: skip"
BAD_ID = "Write ids as strings or integers"


@dataclass(frozen=True)
class Fault:
    """One bad row: the file it is appended to, what the error names, and words that must be in it."""

    format: str
    about: str
    file: str
    row: Any
    field: str | None
    words: tuple[str, ...]
    kind: str

    def __str__(self) -> str:
        return f"{self.format}: {self.about}"


_TEXTS: list[tuple[str, Any, str, str, str]] = [
    ("null", None, "null or absent", EMPTY, "empty_text"),
    ("empty", "", "empty", EMPTY, "empty_text"),
    ("only white space", " \t\u3000\u00a0", "empty", EMPTY, "empty_text"),
    ("a number", 5, "expected a text, got 5", "Write a string", "type"),
    ("a boolean", True, "a boolean", "Write a string", "type"),
    ("a float", 1.5, "a float", "Write a string", "type"),
    ("not a number", float("nan"), "a float (nan)", "Write a string", "type"),
    ("a list", ["x"], "a list", "Write a string", "type"),
    ("an object", {"a": "b"}, "an object", "Write a string", "type"),
]
_IDS: list[tuple[str, Any, str, str, str]] = [
    ("null", None, "there is no id", "Give every row an id", "missing"),
    ("empty", "", "there is no id", "Give every row an id", "missing"),
    ("a float", 1.5, "a float", BAD_ID, "type"),
    ("a whole float", 2.0, "a float", BAD_ID, "type"),
    ("a boolean", False, "a boolean", BAD_ID, "type"),
    ("a list", ["d"], "a list", BAD_ID, "type"),
    ("an object", {}, "an object", BAD_ID, "type"),
]
_GRADES: list[tuple[str, Any, str, str, str]] = [
    ("a word", "high", "a grade must be a finite number, not ", "for example 1 or 0", "type"),
    ("nan", "nan", "a grade must be a finite number, not ", "for example 1 or 0", "type"),
    ("infinite", "-inf", "a grade must be a finite number, not ", "for example 1 or 0", "type"),
    ("too large", "1e999", "a grade must be a finite number, not ", "for example 1 or 0", "type"),
    ("a list", [1], "a grade must be a finite number, not ", "for example 1 or 0", "type"),
    ("a boolean", True, "a grade must be a finite number, not ", "for example 1 or 0", "type"),
]
_LISTS: list[tuple[str, Any, str, str, str]] = [
    ("a number", 7, "expected a text, got 7", "Write a string", "type"),
    ("an object", {"a": "b"}, "expected a text, got an object", "Write a string", "type"),
    ("of a number", [7], "expected a text, got 7", "Write a string", "type"),
    ("of a list", [["x"]], "a list", "Write a string", "type"),
    ("of null", [None], "null or absent", EMPTY, "empty_text"),
    ("of white space", ["\n "], "empty", EMPTY, "empty_text"),
]
_LINES: list[tuple[str, bytes, str]] = [
    ("cut off", b'{"_id": ', "broken JSON"),
    ("a bare word", b"null and void", "broken JSON"),
    ("two objects", b'{"a": 1} {"b": 2}', "broken JSON"),
    ("single quotes", b"{'_id': 'x'}", "broken JSON"),
    ("a control character in a string", b'{"_id": "a\x01b"}', "broken JSON"),
    ("a terminal escape", b"\x1b[31mred\x1b[0m", "broken JSON"),
    ("nothing but a NUL", b"\x00", "broken JSON"),
    ("nested too deeply", b"[" * 100_000, "broken JSON"),
    ("too long a number", b'{"_id": ' + b"9" * 5000 + b"}", "broken JSON"),
    ("a list", b'["d9", "text"]', "not a JSON object"),
    ("null", b"null", "not a JSON object"),
    ("a number", b"12", "not a JSON object"),
    ("invalid UTF-8", b'{"_id": "x\xff"}', "invalid UTF-8 at byte 10"),
    ("a cut character", b'{"_id": "\xe2\x82"}', "invalid UTF-8 at byte 9"),
    ("UTF-16", '{"_id": "x"}'.encode("utf-16"), "invalid UTF-8 at byte 0"),
    ("half a surrogate pair", b'{"_id": "x", "text": "a \\ud800 b"}', "half a surrogate pair"),
    ("the other half, in a list", b'{"_id": "x", "pos": ["\\uDC00"]}', "half a surrogate pair"),
    ("a surrogate in a name", b'{"_id": "x", "\\udfff": 1}', "half a surrogate pair"),
]


def faults() -> Iterator[Fault]:
    """Every bad row that a format can hold."""
    for name, source in sources().items():
        yield from _of_values(name, source)
        if not source.readme:  # the rows of a repository are read by another library, file by file
            yield from _of_lines(name, source)


def _of_values(name: str, source: Source) -> Iterator[Fault]:
    for kind, place in source.places.items():
        for what, column in place.columns.items():
            values = {"id": _IDS, "text": _TEXTS, "title": _TEXTS[3:], "grade": _GRADES, "pos": _LISTS}.get(what, [])
            if what == "neg":
                values = _LISTS if "document" not in source.places else []  # beside a pool, nobody reads them
            if kind == "judgment" and what in ("query", "document"):
                values = _IDS
            for about, value, *words, reason in values:
                if source.settings["format"] == "pairs" and kind == "document" and isinstance(value, list):
                    continue  # several positives, and as many ids
                if not _holds(source, place.file, value, words):
                    continue
                row = _sound(source, place.file) | {column: value}
                if kind == "document" and what == "text" and "title" in place.columns and reason == "empty_text":
                    row |= {"title": ""}
                    words[0] = "null or absent" if value is None and not place.file.endswith(".csv") else "empty"
                yield Fault(name, f"{kind} {what} {about}", place.file, row, column, tuple(words), reason)
    if (judged := source.places.get("judgment")) is not None:
        for side, column in (("query", "query-id"), ("document", "corpus-id")):
            row = _sound(source, judged.file) | {column: "nobody"}
            unknown = (f"names an unknown {side} id 'nobody'", "data.on_unknown_id: skip")
            yield Fault(name, f"unknown {side}", judged.file, row, None, unknown, "unknown_id")


def _holds(source: Source, file: str, value: Any, words: list[str]) -> bool:
    """Whether a file of this kind can hold such a value in one row and another kind in the others."""
    if file.endswith((".csv", ".tsv")) and not source.readme:
        return isinstance(value, str) or (value is None and "id" in words[0])
    if file.endswith(".parquet"):
        return value is None or (isinstance(value, str) and "number" not in words[0])
    return not source.readme or value is None or (isinstance(value, str) and file.endswith(".jsonl"))


def _sound(source: Source, file: str) -> dict[str, Any]:
    """A further row for a file, like its others."""
    row: dict[str, Any] = source.files[file][-1]
    return row | {key: "fresh" for key in ("_id", "text") if key in row}


def _of_lines(name: str, source: Source) -> Iterator[Fault]:
    for file, rows in source.files.items():
        if file.endswith(".jsonl"):
            for about, line, problem in _LINES:
                remedy = {"not a": "Write {", "invalid": "Save the file as UTF-8", "half a": "complete character"}
                words = next((text for start, text in remedy.items() if problem.startswith(start)), "one JSON object")
                column = {"half a surrogate pair": "text", "the other half, in a list": "pos"}.get(about)
                yield Fault(name, f"{file} {about}", file, line, column, (problem, words), "broken")
        elif file.endswith((".csv", ".tsv")):
            sign = b"," if file.endswith(".csv") else b"\t"
            for about, cells in (("too few fields", 1), ("too many fields", len(rows[0]) + 1)):
                words2 = (
                    f"{cells} field{'s' * (cells > 1)}, but the header names {len(rows[0])}",
                    "Check delimiters and quotes",
                )
                yield Fault(name, f"{file} {about}", file, sign.join([b"x"] * cells), None, words2, "broken")
            yield Fault(
                name,
                f"{file} another separator",
                file,
                b";".join([b"x"] * len(rows[0])),
                None,
                (f"1 field, but the header names {len(rows[0])}", "Check delimiters and quotes"),
                "broken",
            )
