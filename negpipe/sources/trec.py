"""TREC formats of evaluators and retrievers: relevance judgments, and runs.

A run is a ranking: it lists candidates but no positives. It is therefore not a source, and is judged with one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from negpipe.config.schema import Dialect
from negpipe.errors import InputError, count_of
from negpipe.sources.chunks import Check, Column
from negpipe.sources.places import SourceTable, locate
from negpipe.sources.tables import CUT, Chunks, chunks, decoded_lines, gathered, opened

Run: TypeAlias = Literal["trec", "tevatron"]

RUNS: dict[Run, str] = {
    "trec": "a TREC run: query Q0 document rank score tag",
    "tevatron": "a Tevatron run: query, document and score separated by tabs",
}
"""Descriptions of the kinds of runs."""
_LINE_BYTES = 4096  # of the first line, to detect a layout
_JUDGED, _RANKED, _SCORED = 4, 6, 3  # fields
_GRADE = re.compile(rb"-?\d+")
_log = logging.getLogger(__name__)


class Ranked(NamedTuple):
    """A line of a run; the score is NaN if it is not a number."""

    anchor: str
    document: str
    score: float


def run_of(path: str | Path) -> tuple[Run, list[str]] | None:
    """The kind of a run, by its first line, and its files: one, or those of a folder that contains nothing else."""
    source = Path(path)
    files = [source]
    if source.is_dir():
        files = sorted(file for file in source.iterdir() if file.name[0] != ".")
    kind = _kind(files[0]) if files else None
    return (kind, [*map(str, files)]) if kind and all(_kind(file) == kind for file in files) else None


def refuse_run(path: str, dialect: Dialect) -> None:
    """Raises InputError: the path is a run, but a source with positives is required."""
    run = run_of(path) if Path(path).exists() and not dialect.header else None
    if run:
        raise _refused(path, run[0], "Use data with positives; audit --file judges a run with a config of such data")


def ranked(path: str, kind: Run) -> Iterator[Ranked]:
    """The lines of a run's file.

    Raises:
        InputError: a line has other fields, or the file cannot be read.
    """
    count, document = (_RANKED, 2) if kind == "trec" else (_SCORED, 1)
    for number, line in enumerate(decoded_lines(path), 1):
        fields = line.split() if kind == "trec" else line.rstrip("\r\n").split("\t")
        if not line.strip():
            continue
        if len(fields) != count:
            remedy = f"Every line of such a run has {count} fields: fix it, or remove it"
            raise InputError(
                f"{count_of(len(fields), 'field')}, not a line of {RUNS[kind]}", file=path, row=number, remedy=remedy
            )
        yield Ranked(fields[0], fields[document], _number(fields[-1 if kind == "tevatron" else -2]))


def judgments(table: SourceTable, columns: Sequence[Column]) -> Chunks:
    """The rows of a table of relevance judgments.

    Also in TREC's format: query, 0, document, grade, and without the second field; neither has a header.
    """
    for path in table.paths:
        first = _first_line(path) if locate(path) in ("file", "url") else b""
        fields, kind = first.split(), _kind_of(first)
        if kind == "trec" or (kind and not table.dialect.header):
            raise _refused(path, kind, "Use relevance judgments: query, 0, document, grade")
        iteration = len(fields) == _JUDGED and fields[1] in (b"0", b"Q0")
        # The last name of a header is no number.
        if iteration or (len(fields) == _JUDGED - 1 and _GRADE.fullmatch(fields[2]) and not table.dialect.header):
            _log.info("reading %s, relevance judgments in TREC format", path)
            yield from _judged(path, columns, iteration)
        else:
            yield from chunks(table._replace(paths=(path,)), columns)


def _judged(path: str, columns: Sequence[Column], iteration: bool) -> Chunks:
    query, document, grade = (column.name for column in columns)
    header = [query, *([""] if iteration else []), document, grade]
    lines = ((number, line.split()) for number, line in enumerate(decoded_lines(path), 1))
    return gathered((row for row in lines if row[1]), header, Check(columns, path)(header))


def _refused(path: str, kind: Run, remedy: str) -> InputError:
    problem = f"this is {RUNS[kind]}. It is a ranking, which lists candidates but no positives"
    return InputError(problem, file=path, row=1, remedy=remedy)


def _kind(file: Path) -> Run | None:
    return _kind_of(_first_line(str(file))) if file.is_file() else None


def _kind_of(line: bytes) -> Run | None:
    fields = line.split()
    if len(fields) == _RANKED and (fields[1] == b"Q0" or (fields[1] == b"0" and _is_decimal(fields[4]))):
        return "trec"
    # Spaces would indicate texts.
    between_tabs = len(fields) == _SCORED == len(line.split(b"\t"))
    return "tevatron" if between_tabs and _is_decimal(fields[2]) else None


def _is_decimal(field: bytes) -> bool:
    """Whether it is a number like a score; grades and ranks are integers."""
    try:
        float(field)
    except ValueError:
        return False
    return b"." in field or b"e" in field.lower()


def _first_line(path: str) -> bytes:
    with opened(path) as file:
        try:
            line: bytes = file.readline(_LINE_BYTES)
        except CUT:
            return b""
    return line.removeprefix(b"\xef\xbb\xbf")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
