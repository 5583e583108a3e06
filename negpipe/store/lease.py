"""Leases for stores without operating system locks: claims that are kept alive.

The holder gives signs of life; a process that wants the lease watches for them, by its own clock. A lease of a dead
holder thus passes on after `patience` seconds, and nothing depends on the time of any machine.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from negpipe.errors import LockedError
from negpipe.store.claims import SUFFIX, Claims
from negpipe.store.files import BOOKS
from negpipe.store.store import Store

logger = logging.getLogger(__name__)
FOLDER = f"{BOOKS}/locks"
PATIENCE = 60.0
"""Seconds without a sign of life until a holder counts as dead; it gives twelve in that time."""


@contextmanager
def held(
    store: Store, name: str, *, shared: bool = False, patience: float = PATIENCE, wait: float = 0.0
) -> Iterator[None]:
    """Hold a lease on a name.

    Args:
        store: the store.
        name: a word.
        shared: other processes that share it may hold it at the same time.
        patience: see above.
        wait: seconds to wait for a live holder.

    Raises:
        LockedError: another process holds it.
    """
    claims = Claims(store, FOLDER, patience, strict=True)
    own = f"{name}-{uuid.uuid4().hex}" if shared else name
    with claims.kept():
        if shared:
            if not claims.take(own):
                raise LockedError(f"cannot lock {store}: run the command again")
        else:
            _take(claims, own, store, wait)
        # Each claims first, then checks for the other kind: of two simultaneous ones, at least one sees the other.
        for other in [name] if shared else _sharing(store, name):
            _outlive(claims, other, store, wait)
            if not shared:
                claims.drop(other)
        yield


def _sharing(store: Store, name: str) -> list[str]:
    keys = (path.rpartition("/")[2].removesuffix(SUFFIX) for path in store.names(FOLDER))
    return [key for key in keys if key.startswith(f"{name}-")]


def _take(claims: Claims, key: str, store: Store, wait: float) -> None:
    while not claims.take(key):
        _outlive(claims, key, store, wait)


def _outlive(claims: Claims, key: str, store: Store, wait: float) -> None:
    """Return once a key is free.

    Raises:
        LockedError: a live process holds it.
    """
    began, (first, free) = time.monotonic(), claims.seen(key)
    last, told = first, False
    while not free:
        who = claims.owner(key) or "another negpipe process"
        if last != first and time.monotonic() - began >= wait:
            raise LockedError(f"{store} is in use by {who}: wait for it or stop it")
        if not told:
            logger.info("%s is held by %s: checking whether it is alive, for up to %.0f s", store, who, claims.patience)
            told = True
        time.sleep(claims.patience / 24)
        last, free = claims.seen(key)
