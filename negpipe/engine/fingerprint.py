"""Identity: sha256 of canonical JSON, and cached content digests of files.

Equal values give equal digests on every machine; a value of an unknown type raises an error instead of being converted
to a string, so that nothing enters or leaves an identity by accident.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from negpipe.errors import NegpipeError
from negpipe.store.files import file_digest, publish, write_all

KEY_LENGTH = 16
logger = logging.getLogger(__name__)


def canonical(value: Any) -> Any:
    """Return `value` in plain JSON types.

    Raises:
        TypeError: a type without one obvious JSON form (a path, a set, a number that is not finite).
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        # 1 and 1.0 are the same setting.
        return int(value) if value.is_integer() else value
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("the keys of an identity must be strings")
        return {key: canonical(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [canonical(item) for item in value]
    raise TypeError(f"{type(value).__name__} is not allowed in an identity: {value!r}")


def digest(*values: Any) -> str:
    """sha256 (64 hex digits) of values in canonical JSON."""
    return hashlib.sha256(_json(values).encode()).hexdigest()


def key(*values: Any) -> str:
    """The short digest that names parts."""
    return digest(*values)[:KEY_LENGTH]


class Beginning:
    """The common first values of many keys, hashed once: `Beginning(a, b).key(c)` equals `key(a, b, c)`.

    At least one value on either side. For tasks that all depend on every part of a corpus: hashing it for each of them
    would make planning time grow with their product.
    """

    def __init__(self, *values: Any) -> None:
        self._digest = hashlib.sha256(_json(values).removesuffix("]").encode())

    def key(self, *values: Any) -> str:
        """The key of the first values followed by `values`."""
        whole = self._digest.copy()
        whole.update(f",{_json(values).removeprefix('[')}".encode())
        return whole.hexdigest()[:KEY_LENGTH]


def _json(values: Sequence[Any]) -> str:
    return json.dumps(canonical(values), sort_keys=True, separators=(",", ":"), ensure_ascii=True)


class DigestCache:
    """Content digests of files, remembered by path, inode, size and modification time.

    A change that keeps all four goes unnoticed (documented limit); `rehash` ignores the cache.
    Digests that took long to compute are saved at once, in case the process dies.
    """

    SECONDS = 30.0  # of work that a kill may lose
    LARGE = 2 * 2**30  # bytes that take long to read

    def __init__(self, path: Path, *, rehash: bool = False) -> None:
        self._path = path
        self._known: dict[str, list[Any]] = {}
        self._dirty, self._saved = False, time.monotonic()
        if not rehash:
            try:
                known = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError):
                known = {}
            self._known = known if isinstance(known, dict) else {}

    def __call__(self, path: Path) -> str:
        name = os.path.realpath(path)
        stat = os.stat(name)
        signature = [stat.st_ino, stat.st_size, stat.st_mtime_ns]
        entry = self._known.get(name)
        if isinstance(entry, list) and entry[:-1] == signature:
            return str(entry[-1])
        if stat.st_size >= self.LARGE:
            logger.info("reading %s for its digest, %.1f GiB", path, stat.st_size / 2**30)
        value = file_digest(Path(name))
        self._known[name] = [*signature, value]
        self._dirty = True
        if time.monotonic() - self._saved >= self.SECONDS:
            self.save()
        return value

    def save(self) -> None:
        """Save for the next run if the folder exists; best effort, a lost cache only costs time."""
        if not self._dirty:
            return
        if self._path.parent.is_dir():
            content = json.dumps(self._known).encode()  # ASCII: file names may not be valid text
            with suppress(OSError, NegpipeError):
                publish(self._path.parent, self._path.name, lambda file: write_all(file, content))
        self._dirty, self._saved = False, time.monotonic()
