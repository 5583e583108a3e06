"""Progress of long jobs for people: a bar on a terminal or in a notebook, else lines."""

from __future__ import annotations

import importlib.util
import logging
import threading
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from negpipe.engine.progress import Reporter, Silent
from negpipe.review.wording import duration, visible

LOG_SECONDS = 30
QUIET_SECONDS = 5.0  # between two looks at whether a job has said nothing for that long
logger = logging.getLogger("negpipe")


def reporter(progress: bool | None) -> Reporter:
    """Where a Python program shows progress.

    Args:
        progress: True: a bar on a terminal or in a notebook (if ipywidgets is installed), else lines on standard error.
            None: a bar on a terminal, else lines in the log, which appear where logging is set up. False: nowhere.
    """
    if progress is False:
        return Silent()
    console = Console(stderr=True, highlight=False)
    notebook = console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
    if console.is_terminal or (progress and notebook):
        return Bars(console)
    return Lines(lambda line: console.print(visible(line), markup=False, soft_wrap=True)) if progress else Lines()


class Bars:
    """A bar on a console."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def begin(self, stage: str, total: int, done: int, unit: str) -> None:
        self._progress = Progress(
            SpinnerColumn(),  # moves while nothing is finished
            TextColumn("{task.description:8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            transient=True,
        )
        self._progress.start()
        self._task = self._progress.add_task(stage, total=total or None, completed=done, note="")

    def advance(self, units: int, note: str) -> None:
        if self._progress:
            self._progress.advance(self._task, units)
            if note:  # the last note stays until there is another
                self._progress.update(self._task, note=visible(note))

    def end(self) -> None:
        if self._progress:
            self._progress.stop()


class Lines:
    """A line at most every half minute; also while nothing is finished, as when a source is read or a model loaded."""

    def __init__(self, say: Callable[[str], None] = logger.info) -> None:
        self._write = say

    _first: tuple[float, int] | None
    """When the first units were finished, and how many: before, a model was loaded."""

    def begin(self, stage: str, total: int, done: int, unit: str) -> None:
        self._stage, self._total, self._done, self._unit = stage, total, done, unit
        self._begun = self._last = time.monotonic()
        self._first, self._note, self._moved, self._ended = None, "", False, threading.Event()
        threading.Thread(target=self._watch, args=(self._ended,), daemon=True).start()

    def advance(self, units: int, note: str) -> None:
        self._done, self._note, self._moved = self._done + units, note, True
        if units:  # a note alone may come long before
            self._first = self._first or (time.monotonic(), self._done)
        if time.monotonic() - self._last >= LOG_SECONDS:
            self._say()

    def end(self) -> None:
        self._ended.set()

    def _watch(self, ended: threading.Event) -> None:
        while not ended.wait(QUIET_SECONDS):
            if time.monotonic() - self._last >= LOG_SECONDS:
                self._say()

    def _say(self) -> None:
        """What is finished, and the time left, or if nothing came since the last line, how long it has run."""
        self._last, moved, self._moved = time.monotonic(), self._moved, False
        about = f" after {duration(self._last - self._begun)}"
        if moved:
            about = f" ({self._note})" if self._note else ""
            if self._total and self._first and self._done > self._first[1]:
                started, before = self._first
                seconds = (self._total - self._done) * (self._last - started) / (self._done - before)
                about = f", about {duration(seconds)} left{about}"
        of = f" of {self._total:,}" if self._total else ""
        self._write(f"{self._stage}: {self._done:,}{of} {self._unit}{about}")
