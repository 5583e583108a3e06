"""Console output: streams, log lines and progress. Raw texts never reach a terminal.

Logs and progress go to standard error, results to standard output.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.logging import RichHandler
from rich.segment import Segment

from negpipe.engine.progress import Reporter
from negpipe.redaction import Redacting, redact
from negpipe.review import progress
from negpipe.review.wording import visible

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
    return progress.Bars(err) if err.is_terminal and log_format != "json" else progress.Lines()
