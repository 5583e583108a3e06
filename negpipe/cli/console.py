"""Console output: streams, log lines and progress. Raw texts never reach a terminal.

Logs and progress go to standard error, results to standard output.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from datetime import UTC, datetime
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment

from negpipe.engine.progress import Reporter
from negpipe.redaction import Redacting, redact
from negpipe.review.wording import duration, visible

LOG_SECONDS = 30
QUIET_SECONDS = 5.0  # between two looks at whether a job has said nothing for that long
_WIDE = 10_000  # characters: wider than any table


class _Visible(RenderHook):
    """Passes all console output through `visible`, so that the contents of files never control the terminal."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Shown(renderable) for renderable in renderables]


class _Shown:
    def __init__(self, renderable: ConsoleRenderable) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rendered = console.render(self._renderable, options)
        shown = (one if one.control else Segment(visible(one.text), one.style) for one in rendered)
        for line, ended in Segment.split_lines_terminator(shown):
            # Tables fill their last column with blanks.
            while ended and line and not line[-1].control and not line[-1].text.rstrip():
                line.pop()
            if ended and line and not line[-1].control:
                line[-1] = Segment(line[-1].text.rstrip(), line[-1].style)
            yield from line
            if ended:
                yield Segment.line()


def _out() -> Console:
    """Tables fit the width of a terminal; in a file or a pipe they are as wide as their contents, or as COLUMNS."""
    terminal = sys.stdout.isatty()
    width = None if terminal or "COLUMNS" in os.environ else _WIDE
    return Console(highlight=False, soft_wrap=not terminal, width=width)


out = _out()
err = Console(stderr=True, highlight=False)
for _console in (out, err):
    _console.push_render_hook(_Visible())
logger = logging.getLogger("negpipe")


class _Plain(Redacting):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


class _Json(logging.Formatter):
    """One JSON object per line, for schedulers."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": redact(record.getMessage()),
            **getattr(record, "fields", {}),
        }
        return json.dumps(entry, ensure_ascii=True)


def set_up_logging(log_format: str, *, debug: bool) -> None:
    """Log to standard error as plain lines or as JSON lines."""
    handler: logging.Handler
    if log_format == "json":
        handler = logging.StreamHandler()
        handler.setFormatter(_Json())
    elif err.is_terminal:
        handler = RichHandler(console=err, show_path=False, show_level=False, markup=False, log_time_format="%H:%M:%S")
        handler.setFormatter(_Plain("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(_Plain("%(asctime)s %(message)s", "%H:%M:%S"))
    # Library warnings become log lines too, as they would break JSON lines.
    logging.captureWarnings(True)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    # This library adds a handler when it is imported: every line would appear twice, and plain ones among JSON.
    logging.getLogger("huggingface_hub").addHandler = lambda hdlr: None  # type: ignore[method-assign]


def reporter(log_format: str) -> Reporter:
    """Progress bars on a terminal, else a log line every half minute."""
    return _Bars() if err.is_terminal and log_format != "json" else _Lines()


class _Bars:
    def __init__(self) -> None:
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
            console=err,
            transient=True,
        )
        self._progress.start()
        self._task = self._progress.add_task(stage, total=total or None, completed=done, note="")

    def advance(self, units: int, note: str) -> None:
        if self._progress:
            self._progress.advance(self._task, units)
            if note:  # the last note stays until there is another
                self._progress.update(self._task, note=note)

    def end(self) -> None:
        if self._progress:
            self._progress.stop()


class _Lines:
    """A line at most every half minute; also while nothing is finished, as when a source is read or a model loaded."""

    _first: tuple[float, int] | None
    """When the first units were finished, and how many: before, a model was loaded."""

    def begin(self, stage: str, total: int, done: int, unit: str) -> None:
        self._stage, self._total, self._done, self._unit = stage, total, done, unit
        self._begun = self._last = time.monotonic()
        self._first, self._ended = None, threading.Event()
        threading.Thread(target=self._watch, args=(self._ended,), daemon=True).start()

    def advance(self, units: int, note: str) -> None:
        self._done += units
        now = time.monotonic()
        if units:  # a note alone may come long before
            self._first = self._first or (now, self._done)
        if now - self._last < LOG_SECONDS:
            return
        left = ""
        if self._total and self._first and self._done > self._first[1]:
            started, before = self._first
            seconds = (self._total - self._done) * (now - started) / (self._done - before)
            left = f", about {duration(seconds)} left"
        self._say(left + (f" ({note})" if note else ""))

    def end(self) -> None:
        self._ended.set()

    def _watch(self, ended: threading.Event) -> None:
        while not ended.wait(QUIET_SECONDS):
            if time.monotonic() - self._last >= LOG_SECONDS:
                self._say(f" after {duration(time.monotonic() - self._begun)}")

    def _say(self, about: str) -> None:
        self._last = time.monotonic()
        of = f" of {self._total:,}" if self._total else ""
        logger.info("%s: %s%s %s%s", self._stage, f"{self._done:,}", of, self._unit, about)
