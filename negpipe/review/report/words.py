"""Words shared by texts: for highlighting in the review, and for the similarity of two texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

_WORD = re.compile(r"\w+")
_COMMON = 0.2  # share of texts above which a word is uninformative

Pieces = list[tuple[str, str]]
"""A text in pieces, each with its mark: "anchor", "positive", or ""."""


def words(text: str) -> set[str]:
    """The words of a text, ignoring case."""
    return {word.casefold() for word in _WORD.findall(text)}


def common(texts: Iterable[set[str]]) -> set[str]:
    """Words that occur in more than a fifth of the texts."""
    every = list(texts)
    counts = Counter(word for one in every for word in one)
    return {word for word, count in counts.items() if count > max(1, _COMMON * len(every))}


def likeness(left: set[str], right: set[str]) -> float:
    """Shared words among all words of both (Jaccard)."""
    return len(left & right) / len(left | right) if left and right else 0.0


def marked(text: str, anchor: set[str], positive: set[str]) -> Pieces:
    """A text with the words of the anchor marked, and those only in a positive."""
    pieces: Pieces = []
    end = 0
    for found in _WORD.finditer(text):
        word = found[0].casefold()
        kind = "anchor" if word in anchor else "positive" if word in positive else ""
        if kind:
            pieces += [(text[end : found.start()], ""), (found[0], kind)]
            end = found.end()
    return [*pieces, (text[end:], "")]
