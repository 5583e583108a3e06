"""A cache of vectors of encoded texts, shared between runs: one SQLite file in a folder, of bounded size.

Guarantees: a returned vector was stored under exactly that key, and is complete. Every entry is sealed with a digest of
its key and its numbers; an entry that does not match its seal counts as absent. Problems with the folder cost time and
are reported in `troubles`, but never stop a run: a read-only file is read, a damaged file is deleted and recreated. Any
number of processes may use a folder concurrently, and be killed at any time.
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

from negpipe.data.arrays import Floats

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
_PATIENCE = 60.0  # seconds to wait for another process that uses the file
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class VectorCache:
    """Vectors by key, for one thread of one process.

    The least recently used vectors are evicted, except those used by this process: with more texts than fit, some are
    kept, which would otherwise evict each other before they are requested again.

    Args:
        folder: created if missing, accessible to the user only.
        size: maximum bytes of the file, without the journal of running writes.

    Attributes:
        troubles: problems as sentences, each once.
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
            self._tell(f"the folder cannot be used ({error.strerror}), so the cache is off")
        except sqlite3.Error as error:
            self._failed(error)

    @staticmethod
    def key(space: str, text: str) -> bytes:
        """The key of a text's vector.

        Args:
            space: digest, of at most 64 characters, of everything that the vector depends on except the text.
            text: the text.
        """
        return blake2b(text.encode(), digest_size=_DIGEST, key=space.encode()).digest()

    def known(self, keys: Sequence[bytes]) -> Iterator[tuple[npt.NDArray[np.intp], Floats]]:
        """Offsets in `keys` of the cached ones, and their vectors, (m, d) float32, some at a time."""
        for start in range(0, len(keys), _READ):
            asked = keys[start : start + _READ]
            found: dict[bytes, object] = self._do(partial(_read, asked), {})
            vectors = {key: vector for key, entry in found.items() if (vector := _unsealed(key, entry)) is not None}
            if len(vectors) < len(found):
                self._tell("damaged entries are ignored")
            if rows := [row for row, key in enumerate(asked) if key in vectors]:
                self._write(partial(self._touch, [*vectors]))
                yield start + np.array(rows), np.stack([vectors[asked[row]] for row in rows])

    def put(self, keys: Sequence[bytes], vectors: Floats) -> None:
        """Store vectors, (m, d) float32, by their keys, as far as there is room; all of them or, if killed, none."""
        self._write(partial(self._put, keys, np.ascontiguousarray(vectors, "<f4")))

    def _put(self, keys: Sequence[bytes], vectors: Floats, db: sqlite3.Connection) -> None:
        for start in range(0, len(keys), _WRITTEN):
            few = zip(keys[start : start + _WRITTEN], vectors[start : start + _WRITTEN], strict=True)
            entries = [(key, _sealed(key, vector.tobytes()), self._now) for key, vector in few]
            # At worst, half of a page is used; an entry larger than a page wastes less than a page.
            if not self._make_room(db, sum(len(entry) + min(len(entry), _PAGE) + 256 for _, entry, _ in entries)):
                self._tell("it is full of vectors used by this run, so not all are kept: raise encoder.cache_size")
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
        """Write in one transaction; never again once a write failed."""

        def transaction(db: sqlite3.Connection) -> None:
            db.execute("BEGIN IMMEDIATE")
            work(db)

        if self._writes:
            self._do(transaction, None, writes=True)

    def _do(self, work: Callable[[sqlite3.Connection], T], otherwise: T, *, writes: bool = False) -> T:
        """The result of some work, or a default if the file fails."""
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
            self._tell(f"the file is damaged ({error}), so it was deleted and recreated")
            self._renewed = True
            self.close()
            self._number += 1
            try:
                self._open()
            except sqlite3.Error as another:
                self._failed(another)
        elif writes:
            self._tell(f"it cannot be written ({error}), so new vectors are not kept")
            self._writes = False
        else:
            self._tell(f"the file cannot be used ({error}), so the cache is off")
            self.close()

    def _open(self) -> None:
        """Open the file of the current number, and delete earlier ones.

        A damaged file is replaced by one with another name, since processes that have it open must not see the journal
        of a new one.
        """
        path = self._folder / f"vectors-{self._number}.sqlite"
        self._db = sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None)
        self._db.text_factory = bytes  # invalid entries may be invalid text
        if not self._db.execute("PRAGMA page_count").fetchone()[0]:
            self._db.execute("PRAGMA auto_vacuum = FULL")  # the file shrinks with a smaller limit
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.executescript(_TABLE)
        # Counted, as clocks jump: entries used by this process are newer than all others.
        self._now = self._db.execute("SELECT coalesce(max(used), 0) + 1 FROM vectors").fetchone()[0]
        with suppress(OSError):
            for number, older in self._files():
                if number < self._number:
                    older.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file; afterwards nothing is found or stored."""
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
    """The vector of an entry; None if the entry was changed."""
    if not isinstance(entry, bytes) or entry != _sealed(key, entry[_DIGEST:]):
        return None
    return np.frombuffer(entry, "<f4", offset=_DIGEST)
