"""Words that texts share: what a reviewer's eye should fall on, and how alike two texts look."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

_WORD = re.compile(r"\w+")
_COMMON = 0.2  # share of texts from which on a word says nothing

Pieces = list[tuple[str, str]]
"""A text in pieces, each with why it is marked: "anchor", "positive", or "" where it is not."""


def words(text: str) -> set[str]:
    """The words of a text, whatever their case."""
    return {word.casefold() for word in _WORD.findall(text)}


def common(texts: Iterable[set[str]]) -> set[str]:
    """Words that more than a fifth of the texts have."""
    every = list(texts)
    counts = Counter(word for one in every for word in one)
    return {word for word, count in counts.items() if count > max(1, _COMMON * len(every))}


def likeness(left: set[str], right: set[str]) -> float:
    """Shared words among all words of both (Jaccard)."""
    return len(left & right) / len(left | right) if left and right else 0.0


def marked(text: str, anchor: set[str], positive: set[str]) -> Pieces:
    """A text in which the words of the anchor are marked, and those of a positive alone."""
    pieces: Pieces = []
    end = 0
    for found in _WORD.finditer(text):
        word = found[0].casefold()
        kind = "anchor" if word in anchor else "positive" if word in positive else ""
        if kind:
            pieces += [(text[end : found.start()], ""), (found[0], kind)]
            end = found.end()
    return [*pieces, (text[end:], "")]
