"""The errors that negpipe raises on purpose, each with its exit code for schedulers.

A message says what is wrong, where (file, row, field), and how to fix it, in that order.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

from negpipe.redaction import redact


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that a mistyped one probably means, if any is similar enough; upper and lower case are alike."""
    names = {one.casefold(): one for one in known}
    near = difflib.get_close_matches(name.casefold(), names, n=1, cutoff=cutoff)
    return names[near[0]] if near else None


def count_of(count: int, one: str, many: str = "") -> str:
    """A number with its noun, in the plural but for 1; `many`: a plural that is not `one` with an s."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def beneath(path: str) -> str:
    """Where a relative local path starts, for a message that it leads nowhere; empty for others."""
    return "" if "://" in path or Path(path).is_absolute() else f" beneath {Path.cwd()}"


class NegpipeError(Exception):
    """Any error that negpipe can explain, without credentials. `exit_code` and `code` are stable, see the docs."""

    exit_code = 1
    code = "failed"

    def __init__(self, text: str = "") -> None:
        super().__init__(redact(text))


class ConfigError(NegpipeError, ValueError):
    """The config file, an override, the command line or an argument is wrong."""

    exit_code = 2
    code = "config"


class BudgetError(ConfigError):
    """A step needs more memory than available: bytes `needed`, bytes `there`, and a `remedy` other than more memory."""

    code = "memory"

    def __init__(self, text: str, *, needed: int = 0, there: int = 0, remedy: str = "") -> None:
        super().__init__(text)
        self.needed, self.there, self.remedy = needed, there, remedy


class VersionsError(ConfigError):
    """This machine has different library versions than the one that started the stage."""

    code = "versions"


class InputError(NegpipeError):
    """A source file, dataset, model or vector file is wrong or missing.

    `file`, `row` (1-based line of a text file, 0-based row of a binary one) and `field` precede the message if known;
    `remedy` follows it. `there`: the available alternatives.
    """

    exit_code = 3
    code = "input"

    def __init__(
        self,
        problem: str,
        *,
        file: str | None = None,
        row: int | None = None,
        field: str | None = None,
        remedy: str | None = None,
        there: Sequence[str] = (),
    ) -> None:
        self.there = list(there)
        file = redact(file) if file else file
        self.problem, self.file, self.row, self.field, self.remedy = redact(problem), file, row, field, remedy
        named = (file, None if row is None else f"row {row}", f"field '{field}'" if field else None)
        place = ", ".join(filter(None, named))
        text = f"{place}: {problem}" if place else problem
        super().__init__(f"{text}. {remedy}" if remedy else text)


class MissingStageError(NegpipeError):
    """A requested stage depends on a stage without output."""

    exit_code = 3
    code = "missing-stage"


class MissingPartsError(MissingStageError):
    """A stage to be committed lacks parts."""

    code = "missing-parts"


class TaskFailedError(NegpipeError):
    """A worker could not finish a task."""

    exit_code = 1
    code = "task-failed"


class RecallError(NegpipeError):
    """The recall of an approximate index is below `index.min_recall`."""

    exit_code = 1
    code = "recall"


class RowsError(NegpipeError):
    """There are fewer rows than `output.min_rows`."""

    exit_code = 1
    code = "rows"


class StorageError(NegpipeError):
    """The file system refused a write: no space, read-only, no permission."""

    exit_code = 1
    code = "storage"


class LockedError(NegpipeError):
    """Another process is using this run directory."""

    exit_code = 4
    code = "locked"


class DamagedError(NegpipeError):
    """A file written by negpipe is missing, truncated or modified."""

    exit_code = 5
    code = "damaged"


class VanishedError(DamagedError):
    """Output of this run disappeared while it was written: another process deletes files here, or ignores the lock."""

    code = "vanished"


_BY_CODE: dict[str, type[NegpipeError]] = {
    kind.code: kind
    for kind in (
        ConfigError,
        BudgetError,
        VersionsError,
        InputError,
        MissingStageError,
        MissingPartsError,
        TaskFailedError,
        RecallError,
        RowsError,
        StorageError,
        LockedError,
        DamagedError,
        VanishedError,
    )
}


def message_of(error: NegpipeError) -> dict[str, str]:
    """An error in the form that a worker reports."""
    return {"error": error.code, "text": str(error)}


def error_of(message: dict[str, str]) -> NegpipeError:
    """The error that a worker reported, with its original class."""
    return _BY_CODE.get(message["error"], NegpipeError)(message["text"])
