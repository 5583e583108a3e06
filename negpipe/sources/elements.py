"""The elements of a JSON text that is not JSON Lines: of a list, of an object's key, or consecutive objects.

Memory is bounded by the read-ahead and the longest element. Elements are yielded as their source text, like lines of
JSON.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import Any

from negpipe.errors import InputError

_READ = 2**20  # characters at a time
_NEAR = 16  # characters before the end of the buffer, where an error may be due to truncation
_BLANKS = re.compile(r"[ \t\r\n]*")


def elements(file: Any, path: str, inside: str | None = None) -> Iterator[tuple[str | None, str]]:
    """The elements of a file's only list, or all its objects.

    Args:
        file: a binary file.
        path: its name.
        inside: the key of the list or object with the elements, in the file's only object.

    Yields:
        the key of an element of an object, else None, and its text.

    Raises:
        InputError: the file is not JSON, or lacks `inside`.
    """
    text = _Text(file, path)
    if inside is not None:
        text.take("{", "an object")
        while (name := text.key()) != inside:
            if name is None:
                raise InputError("key not found", file=path, field=inside, remedy="Set data.format")
            text.value()
            text.passes(",")
    if inside is not None and text.sign() == "{":
        text.take("{", "an object")
        while (name := text.key()) is not None:
            yield name, text.value()
            text.passes(",")
    elif inside is not None:
        text.take("[", "a list or an object")
        yield from ((None, element) for element in _listed(text))
    else:
        while text.sign():
            if text.passes("["):
                yield from ((None, element) for element in _listed(text))
            else:
                yield None, text.value()


def keys(file: Any, path: str) -> list[str]:
    """The keys of a file's only object.

    Raises InputError: the file is not one object.
    """
    text, found = _Text(file, path), []
    text.take("{", "an object")
    while (name := text.key()) is not None:
        found.append(name)
        text.value()
        text.passes(",")
    if text.sign():
        raise text.broken("expected the end of the file")
    return found


def _listed(text: _Text) -> Iterator[str]:
    while not text.passes("]"):
        yield text.value()
        if not text.passes(","):
            text.take("]", "a comma or the end of the list")
            return


class _Text:
    """The text of a file, and a position in it."""

    def __init__(self, file: Any, path: str) -> None:
        self._file, self._path = io.TextIOWrapper(file, "utf-8-sig", newline=""), path
        self._held, self._at, self._line, self._ended = "", 0, 1, False
        self._decoder = json.JSONDecoder()

    def sign(self) -> str:
        """The next non-blank character, not consumed; an empty string at the end."""
        while True:
            blanks = _BLANKS.match(self._held, self._at)
            self._at = blanks.end() if blanks else self._at
            if self._at < len(self._held) or not self._more():
                return self._held[self._at : self._at + 1]

    def passes(self, sign: str) -> bool:
        """Whether this character is next; if so, consume it."""
        if self.sign() != sign:
            return False
        self._at += 1
        return True

    def take(self, sign: str, expected: str) -> None:
        """Raises InputError: another character is next."""
        if not self.passes(sign):
            raise self.broken(f"expected {expected}")

    def key(self) -> str | None:
        """The next key of an object; None at its end."""
        if self.passes("}"):
            return None
        name = json.loads(self.value())
        if not isinstance(name, str):
            raise self.broken("expected a key")
        self.take(":", "a colon")
        return name

    def value(self) -> str:
        """The text of the next value."""
        self.sign()
        while True:
            try:
                _, end = self._decoder.raw_decode(self._held, self._at)
            except (ValueError, RecursionError) as error:
                broken = f"broken JSON ({getattr(error, 'msg', error)})"
                # An open string may end in the next characters; other errors are reported where they occur.
                near = getattr(error, "pos", 0) > len(self._held) - _NEAR or "Unterminated" in broken
                if not (near and self._more()):
                    self._at = getattr(error, "pos", self._at)
                    raise self.broken(broken) from None
                continue
            if end == len(self._held) and self._more():  # a number may continue
                continue
            text, self._at = self._held[self._at : end], end
            return text

    def _more(self) -> bool:
        """Read on, doubling the buffer."""
        if self._ended:
            return False
        self._line += self._held.count("\n", 0, self._at)
        rest = self._held[self._at :]
        try:
            read = self._file.read(max(_READ, len(rest)))
        except UnicodeDecodeError:
            raise self.broken("invalid UTF-8", "Save the file as UTF-8") from None
        self._held, self._at, self._ended = rest + read, 0, not read
        return not self._ended

    def broken(self, problem: str, remedy: str = "Write it as JSON or JSON Lines") -> InputError:
        """An error at this position."""
        row = self._line + self._held.count("\n", 0, self._at)
        return InputError(problem, file=self._path, row=row, remedy=remedy)
