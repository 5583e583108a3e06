"""Keeps credentials out of everything that is shown or stored.

Every log line, error, manifest and summary passes through `redact`, which keeps the location in a URL. The settings
themselves are unchanged, as they are needed to open the URL.
"""

from __future__ import annotations

import logging
import re
from typing import Any

HIDDEN = "***"
_USER = re.compile(r"(?<=://)[^/?#\s]*@")  # up to the last @ of the authority: a password may contain one
_QUERY = re.compile(r"(://[^\s?#]*[?#])\S+?(?=[])'\">,.;:]*(?:\s|$))")  # without the punctuation after it
_REDACTED = re.compile(r"://(\*\*\*@|[^\s?#]*[?#]\*\*\*)|\bhf_\*\*\*")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")


def redact(text: str) -> str:
    """The text without user names, passwords, queries and fragments of URLs, and without hub tokens."""
    if "://" in text:
        text = _QUERY.sub(rf"\1{HIDDEN}", _USER.sub(f"{HIDDEN}@", text))
    return _TOKEN.sub(f"hf_{HIDDEN}", text) if "hf_" in text else text


def is_redacted(text: str) -> bool:
    """Whether `redact` has removed something from the text."""
    return bool(_REDACTED.search(text))


def redacted(tree: Any) -> Any:
    """Settings with redacted texts."""
    if isinstance(tree, dict):
        return {name: redacted(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [redacted(value) for value in tree]
    return redact(tree) if isinstance(tree, str) else tree


class Redacting(logging.Formatter):
    """A formatter that redacts its lines, including tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))
