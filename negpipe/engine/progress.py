"""Progress of long jobs, and where it is reported."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Where progress goes: a terminal or a log. `total` (0: unknown) and `done` count `unit`: "texts", "anchors"."""

    def begin(self, stage: str, total: int, done: int, unit: str) -> None: ...
    def advance(self, units: int, note: str) -> None: ...
    def end(self) -> None: ...


class Silent:
    """A reporter for callers that only want the result."""

    def begin(self, stage: str, total: int, done: int, unit: str) -> None: ...
    def advance(self, units: int, note: str) -> None: ...
    def end(self) -> None: ...
