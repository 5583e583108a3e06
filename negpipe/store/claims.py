"""Who works on what, among processes that share a folder of a store.

A claim is a small file of the store, named by a key, that holds the owner's name and a number which a thread of the
owner raises. Another process may take it once the owner is known to be dead, or has not raised it for `patience`
seconds by the clock of who watches: clocks of two machines are never compared, nor is any time that the store notes.
Where an owner was only slow, two processes come to do the same work. A claim spares work; what keeps results whole is
that parts are immutable.
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
"""Seconds without a sign of life after which a claim may be taken: twelve signs, and longer than NFS caches names."""
SUFFIX = ".claim"
_SIGNS = count()


@dataclass
class Claims:
    """This process's claims in one folder of a store, and what it has seen of others'.

    Attributes:
        store: where they are.
        folder: of the store.
        patience: seconds, see above; the owner gives a sign of life twelve times as often.
        strict: a sign of life is given only if nobody has taken the claim since; on a disk that would mean to wait for
            whoever changes something there, and who waits seems dead.
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
        """Within it, claims are kept alive; behind it, none is held."""
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
                except (OSError, NegpipeError) as error:  # what ended the block matters more
                    logger.warning("%s: cannot release its claim, which expires by itself: %s", key, error)

    def take(self, key: str) -> bool:
        """Claim a key that nobody works on, as far as is known by now; returns whether it is ours."""
        there = self.store.read(self._name(key))
        if there is not None and not self._is_free(key, there):
            return False
        if there is not None:
            logger.info("%s: taken over from %s, which shows no sign of life", key, _owner(there))
        content = _sign()
        try:
            if not self.store.replace(self._name(key), content, there):
                return False
        except LockedError:  # so many claim something that we did not get to it
            return False
        with self._changing:
            self._held[key] = content
        return True

    def release(self, key: str) -> None:
        """Give up a claim, where it is still ours."""
        with self._changing:
            mine = self._held.pop(key, None)
            if mine is not None and self.store.read(self._name(key)) == mine:
                self.store.delete(self._name(key))

    def owner(self, key: str) -> str | None:
        """Who has claimed a key, as `unfinished.owner` names it; None: nobody."""
        there = self.store.read(self._name(key))
        return None if there is None else _owner(there)

    def seen(self, key: str) -> tuple[bytes | None, bool]:
        """The last sign of life that was given for a key, None where nobody claims it; and whether it may be taken."""
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
        """Show that we live; a claim that another has taken meanwhile is theirs."""
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
    """Delete the claims on some keys, whoever had them: nobody works on these any more."""
    there = {*store.names(folder)}
    for name in (f"{folder}/{key}{SUFFIX}" for key in keys):
        if name in there:
            store.delete(name)


def _sign() -> bytes:
    """Content that no claim had before."""
    return f"{unfinished.owner()} {next(_SIGNS)}\n".encode()


def _owner(content: bytes) -> str:
    return content.decode(errors="replace").partition(" ")[0].strip()
