"""Vectors of texts that were encoded before, shared between runs: one SQLite file in a folder, of bounded size.

Guarantees: what is handed out was put under that very key, whole. Every entry is sealed with a digest over its key and
its numbers; what does not fit its seal counts as absent. Whatever is wrong with the folder costs time and is told in
`troubles`, it ends no run: one that cannot be written is read, a damaged file is deleted and begun again. Any number of
processes may use a folder at once, and be killed at any moment.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
T = TypeVar("T")

_FILE = re.compile(r"vectors-(\d+)\.sqlite(-journal)?")
_TABLE = """
CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, entry BLOB NOT NULL, used INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS vectors_used ON vectors (used);
"""
_OLDEST = "DELETE FROM vectors WHERE rowid IN (SELECT rowid FROM vectors WHERE used < ? ORDER BY used LIMIT ?)"
_BYTES = "SELECT (count.page_count - free.freelist_count) * size.page_size FROM"
_BYTES += " pragma_page_count() AS count, pragma_freelist_count() AS free, pragma_page_size() AS size"
_PAGE = 4096  # bytes, SQLite's default
_DIGEST = 16  # bytes, of keys and of seals
_READ, _WRITTEN = 1024, 32  # vectors at a time
_PATIENCE = 60.0  # seconds that another process may take with the file
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class Cache:
    """Vectors by key, for one thread of one process.

    Those that were used longest ago make room for new ones, but none that this process has used: of more texts than
    fit, some are kept, which would otherwise push each other out before they are asked for again.

    Args:
        folder: made where it is not there, for the user alone.
        size: bytes that the file may take, beside the journal of what is being written.

    Attributes:
        troubles: what went wrong, in sentences, each once.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.troubles: list[str] = []
        self._folder, self._size, self._number = folder, size, 0
        self._db: sqlite3.Connection | None = None
        self._writes, self._renewed = True, False
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._number = max((number for number, _ in self._files()), default=0)
            self._open()
        except OSError as error:
            self._tell(f"the folder cannot be used ({error.strerror}), so it is done without")
        except sqlite3.Error as error:
            self._failed(error)

    @staticmethod
    def key(space: str, text: str) -> bytes:
        """What a text's vector is kept under.

        Args:
            space: digest, of at most 64 characters, of all that the vector depends on beside the text.
            text: the text.
        """
        return blake2b(text.encode(), digest_size=_DIGEST, key=space.encode()).digest()

    def known(self, keys: Sequence[bytes]) -> Iterator[tuple[npt.NDArray[np.intp], Floats]]:
        """Offsets in `keys` of those that are there, and their vectors, (m, d) float32, some at a time."""
        for start in range(0, len(keys), _READ):
            asked = keys[start : start + _READ]
            found: dict[bytes, object] = self._do(partial(_read, asked), {})
            vectors = {key: vector for key, entry in found.items() if (vector := _unsealed(key, entry)) is not None}
            if len(vectors) < len(found):
                self._tell("entries that are damaged count as absent")
            if rows := [row for row, key in enumerate(asked) if key in vectors]:
                self._write(partial(self._touch, [*vectors]))
                yield start + np.array(rows), np.stack([vectors[asked[row]] for row in rows])

    def put(self, keys: Sequence[bytes], vectors: Floats) -> None:
        """Keep vectors, (m, d) float32, by their keys, as far as there is room; all of them or, if killed, none."""
        self._write(partial(self._put, keys, np.ascontiguousarray(vectors, "<f4")))

    def _put(self, keys: Sequence[bytes], vectors: Floats, db: sqlite3.Connection) -> None:
        for start in range(0, len(keys), _WRITTEN):
            few = zip(keys[start : start + _WRITTEN], vectors[start : start + _WRITTEN], strict=True)
            entries = [(key, _sealed(key, vector.tobytes()), self._now) for key, vector in few]
            # At worst a page is filled by half; what is larger than one leaves less than one over.
            if not self._make_room(db, sum(len(entry) + min(len(entry), _PAGE) + 256 for _, entry, _ in entries)):
                self._tell("it is full of vectors that this run uses, so not all are kept: raise encoder.cache_size")
                return
            db.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)", entries)

    def _make_room(self, db: sqlite3.Connection, needed: int) -> bool:
        while db.execute(_BYTES).fetchone()[0] + needed > self._size:
            if not db.execute(_OLDEST, (self._now, _WRITTEN)).rowcount:
                return False
        return True

    def _touch(self, keys: Sequence[bytes], db: sqlite3.Connection) -> None:
        db.execute(
            f"UPDATE vectors SET used = ? WHERE used < ? AND key IN ({_marks(keys)})", (self._now, self._now, *keys)
        )

    def _write(self, work: Callable[[sqlite3.Connection], None]) -> None:
        """Do what writes, in one transaction; never again once the file refused."""

        def transaction(db: sqlite3.Connection) -> None:
            db.execute("BEGIN IMMEDIATE")
            work(db)

        if self._writes:
            self._do(transaction, None, writes=True)

    def _do(self, work: Callable[[sqlite3.Connection], T], otherwise: T, *, writes: bool = False) -> T:
        """What some work returns, or something else where the file does not let it."""
        if self._db is None:
            return otherwise
        try:
            with self._db:  # commits, or rolls back
                return work(self._db)
        except sqlite3.Error as error:
            self._failed(error, writes=writes)
            return otherwise

    def _failed(self, error: sqlite3.Error, *, writes: bool = False) -> None:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED and not self._renewed:
            self._tell(f"the file is damaged ({error}), so it was deleted and is begun again")
            self._renewed = True
            self.close()
            self._number += 1
            try:
                self._open()
            except sqlite3.Error as another:
                self._failed(another)
        elif writes:
            self._tell(f"it cannot be written ({error}), so vectors that are made are not kept")
            self._writes = False
        else:
            self._tell(f"the file cannot be used ({error}), so it is done without")
            self.close()

    def _open(self) -> None:
        """Open the file of the present number, and delete those before it.

        A damaged one makes way for one of another name, since who still has it open must not meet the journal of a new
        one.
        """
        path = self._folder / f"vectors-{self._number}.sqlite"
        self._db = sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None)
        self._db.text_factory = bytes  # what is no entry may be no text either
        if not self._db.execute("PRAGMA page_count").fetchone()[0]:
            self._db.execute("PRAGMA auto_vacuum = FULL")  # with a smaller size the file becomes smaller
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.executescript(_TABLE)
        # By counting, as clocks jump: what this process uses is newer than all that is there.
        self._now = self._db.execute("SELECT coalesce(max(used), 0) + 1 FROM vectors").fetchone()[0]
        with suppress(OSError):
            for number, older in self._files():
                if number < self._number:
                    older.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the file; afterwards nothing is known, and nothing kept."""
        if self._db is not None:
            self._db.close()
            self._db = None

    def _files(self) -> list[tuple[int, Path]]:
        named = ((_FILE.fullmatch(path.name), path) for path in self._folder.iterdir())
        return [(int(match[1]), path) for match, path in named if match]

    def _tell(self, trouble: str) -> None:
        sentence = f"the vector cache {self._folder}: {trouble}"
        if sentence not in self.troubles:
            self.troubles.append(sentence)


def _read(keys: Sequence[bytes], db: sqlite3.Connection) -> dict[bytes, object]:
    return dict(db.execute(f"SELECT key, entry FROM vectors WHERE key IN ({_marks(keys)})", keys))


def _marks(keys: Sequence[bytes]) -> str:
    return ", ".join("?" * len(keys))


def _sealed(key: bytes, numbers: bytes) -> bytes:
    return blake2b(numbers, digest_size=_DIGEST, key=key).digest() + numbers


def _unsealed(key: bytes, entry: object) -> Floats | None:
    """The vector of an entry; None where it is not as it was put there."""
    if not isinstance(entry, bytes) or entry != _sealed(key, entry[_DIGEST:]):
        return None
    return np.frombuffer(entry, "<f4", offset=_DIGEST)
