"""Human-readable numbers and texts, for the terminal and the report."""

from __future__ import annotations

import re


def duration(seconds: float) -> str:
    """Seconds as readable text: 45 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Bytes as readable text."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def filled_in(message: str, run: str) -> str:
    """The message, with `run` in place of the CONFIG of the commands that it suggests."""
    return re.sub(r"(?<=negpipe )(\w+(?: \w+)?) CONFIG\b", lambda found: f"{found[1]} {run}", message)


def visible(text: str) -> str:
    """Text with control characters escaped, except line breaks."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def clean_text(text: str, length: int | None = None) -> str:
    """One line without control characters, shortened to `length`."""
    text = text if length is None else text[: 10 * length]
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if length is None or len(line) <= length else line[: length - 1] + "…"
