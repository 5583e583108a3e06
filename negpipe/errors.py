"""The errors negpipe raises on purpose, each with the exit code a scheduler sees.

A message says what happened, where (file, row, field) and what to do about it, in that order.
"""

from __future__ import annotations

from collections.abc import Sequence

from negpipe.redaction import redact


class NegpipeError(Exception):
    """Anything negpipe can explain, without credentials. `exit_code` and `code` are stable: see docs, Exit codes."""

    exit_code = 1
    code = "failed"

    def __init__(self, text: str = "") -> None:
        super().__init__(redact(text))


class ConfigError(NegpipeError, ValueError):
    """The config file, an override, the command line or an argument is wrong."""

    exit_code = 2
    code = "config"


class BudgetError(ConfigError):
    """Something takes more memory than there is: bytes `needed`, bytes `there`, and what helps beside more memory."""

    code = "memory"

    def __init__(self, text: str, *, needed: int = 0, there: int = 0, remedy: str = "") -> None:
        super().__init__(text)
        self.needed, self.there, self.remedy = needed, there, remedy


class VersionsError(ConfigError):
    """This machine has other versions of libraries than those that began the stage."""

    code = "versions"


class InputError(NegpipeError):
    """A source file, dataset, model or vector file is wrong or missing.

    `file`, `row` (1-based line of a text file, 0-based row of a binary one) and `field` are put in
    front of the message where they are known; `remedy` goes behind it. `there`: what there is instead, to choose from.
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
        place = ", ".join(
            part
            for part in (
                file or "",
                f"row {row}" if row is not None else "",
                f"field '{field}'" if field else "",
            )
            if part
        )
        text = f"{place}: {problem}" if place else problem
        super().__init__(f"{text}. {remedy}" if remedy else text)


class MissingStageError(NegpipeError):
    """A stage was asked for whose input stage has not been made yet."""

    exit_code = 3
    code = "missing-stage"


class MissingPartsError(MissingStageError):
    """A stage was to be committed of which parts are missing."""

    code = "missing-parts"


class TaskFailedError(NegpipeError):
    """A worker could not finish a task."""

    exit_code = 1
    code = "task-failed"


class RecallError(NegpipeError):
    """An approximate index does not find what `index.min_recall` asks for."""

    exit_code = 1
    code = "recall"


class RowsError(NegpipeError):
    """There are fewer rows than `output.min_rows` asks for."""

    exit_code = 1
    code = "rows"


class StorageError(NegpipeError):
    """The file system refused a write: no space, read-only, no permission."""

    exit_code = 1
    code = "storage"


class LockedError(NegpipeError):
    """Another process works on this run directory."""

    exit_code = 4
    code = "locked"


class DamagedError(NegpipeError):
    """A file that negpipe made is missing, cut off or changed."""

    exit_code = 5
    code = "damaged"


class VanishedError(DamagedError):
    """What this run was writing was taken away: somebody deletes here, or works here although it is locked."""

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
    """An error as a worker reports it."""
    return {"error": error.code, "text": str(error)}


def error_of(message: dict[str, str]) -> NegpipeError:
    """The error a worker reported, of the class it had there."""
    return _BY_CODE.get(message["error"], NegpipeError)(message["text"])
