"""What a long job tells of its progress, and to whom it matters."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Where progress goes: a terminal or a log."""

    def begin(self, stage: str, total: int, done: int) -> None: ...
    def advance(self, units: int, note: str) -> None: ...
    def end(self) -> None: ...


class Silent:
    """A reporter for callers who only want the result."""

    def begin(self, stage: str, total: int, done: int) -> None: ...
    def advance(self, units: int, note: str) -> None: ...
    def end(self) -> None: ...
