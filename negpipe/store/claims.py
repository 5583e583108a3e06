"""Claims: which process works on what, among processes that share a folder of a store.

A claim is a small file of the store, named by a key, with the owner's name and a counter that a thread of the owner
increments. Another process may take it once the owner is known to be dead, or has not incremented it for `patience`
seconds on the watching process's clock: clocks of two machines are never compared, nor any times noted by the store.
If an owner was merely slow, two processes do the same work. A claim saves work; results stay correct because parts are
immutable.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

from negpipe.errors import LockedError, NegpipeError
from negpipe.store import unfinished
from negpipe.store.files import write_all
from negpipe.store.store import Store

logger = logging.getLogger(__name__)
PATIENCE = 120.0
"""Seconds without a sign of life until a claim may be taken: twelve signs, and longer than NFS caches names."""
SUFFIX = ".claim"
_SIGNS = count()


@dataclass
class Claims:
    """This process's claims in one folder of a store, and what it has seen of other processes' claims.

    Attributes:
        store: the store of the claims.
        folder: their folder in it.
        patience: seconds, see above; the owner gives twelve signs of life in that time.
        strict: give a sign of life only if no other process has taken the claim; on a disk, that would mean waiting for
            whichever process is changing something there, and a waiting process seems dead.
    """

    store: Store
    folder: str
    patience: float = PATIENCE
    strict: bool = False
    _held: dict[str, bytes] = field(default_factory=dict, init=False)
    _watched: dict[str, tuple[bytes, float]] = field(default_factory=dict, init=False)
    _changing: threading.Lock = field(default_factory=threading.Lock, init=False)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep claims alive within the block; release them at its end."""
        over = threading.Event()
        thread = threading.Thread(target=self._beat, args=(over,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            for key in [*self._held]:
                try:
                    self.release(key)
                except (OSError, NegpipeError) as error:  # the exception that ended the block matters more
                    logger.warning("%s: cannot release its claim, which expires by itself: %s", key, error)

    def take(self, key: str) -> bool:
        """Claim a key that no process is known to work on; returns whether it is ours."""
        there = self.store.read(self._name(key))
        if there is not None and not self._is_free(key, there):
            return False
        if there is not None:
            logger.info("%s: taken over from %s, which shows no sign of life", key, _owner(there))
        content = _sign()
        try:
            if not self.store.replace(self._name(key), content, there):
                return False
        except LockedError:  # too much contention to get to it
            return False
        with self._changing:
            self._held[key] = content
        return True

    def release(self, key: str) -> None:
        """Release a claim if it is still ours."""
        with self._changing:
            mine = self._held.pop(key, None)
            if mine is not None and self.store.read(self._name(key)) == mine:
                self.store.delete(self._name(key))

    def owner(self, key: str) -> str | None:
        """The owner of a key's claim, as named by `unfinished.owner`; None if unclaimed."""
        there = self.store.read(self._name(key))
        return None if there is None else _owner(there)

    def seen(self, key: str) -> tuple[bytes | None, bool]:
        """The last sign of life for a key (None if unclaimed), and whether it may be taken."""
        there = self.store.read(self._name(key))
        return there, there is None or self._is_free(key, there)

    def drop(self, key: str) -> None:
        """Delete a claim that may be taken."""
        self.store.delete(self._name(key))

    def _is_free(self, key: str, there: bytes) -> bool:
        if unfinished.is_gone(_owner(there)):
            return True
        now = time.monotonic()
        content, since = self._watched.get(key, (b"", now))
        if content != there:
            since = now
        self._watched[key] = there, since
        return now - since >= self.patience

    def _beat(self, over: threading.Event) -> None:
        while not over.wait(self.patience / 12):
            for key in [*self._held]:
                with self._changing:
                    if key in self._held and not over.is_set():
                        self._live(key, _sign())

    def _live(self, key: str, content: bytes) -> None:
        """Give a sign of life; a claim taken by another process in the meantime stays theirs."""
        try:
            if self._signed(key, content):
                self._held[key] = content
            else:
                del self._held[key]
                logger.warning("%s: another process has taken this claim, so the work may be done twice", key)
        except (OSError, NegpipeError) as error:
            logger.warning("%s: cannot keep its claim alive: %s", key, error)

    def _signed(self, key: str, content: bytes) -> bool:
        if self.strict:
            return self.store.replace(self._name(key), content, self._held[key])
        if self.store.read(self._name(key)) != self._held[key]:
            return False
        name = f"{key}{SUFFIX}"
        self.store.put(self.folder, lambda _: name, lambda file: write_all(file, content), len(content))
        return True

    def _name(self, key: str) -> str:
        return f"{self.folder}/{key}{SUFFIX}"


def drop(store: Store, folder: str, keys: Iterable[str]) -> None:
    """Delete the claims on some keys, whoever owned them: no process works on them any more."""
    there = {*store.names(folder)}
    for name in (f"{folder}/{key}{SUFFIX}" for key in keys):
        if name in there:
            store.delete(name)


def _sign() -> bytes:
    """Content that no claim had before."""
    return f"{unfinished.owner()} {next(_SIGNS)}\n".encode()


def _owner(content: bytes) -> str:
    return content.decode(errors="replace").partition(" ")[0].strip()
