"""Copies of immutable files on a local disk, as many as its share of the disk holds.

Those that were asked for longest ago make room for others. Times are this machine's own, of its own disk.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)
OF_CONTENT = re.compile(r"(?:.*/)?[0-9a-f]{16}-([0-9a-f]{12})(?:\.[^/]*)?")
"""Names that say what a file holds: they end in the first twelve digits of its sha256."""
_IN_USE = 600.0  # seconds after it was asked for in which somebody may be about to open a file
_SLACK = 16  # a look at the whole folder for every so many-th of the room that is filled


class Cache:
    """A folder of such files, in folders of a store. Several processes may have one.

    Args:
        folder: of the files.
        room: bytes they may take. What is asked for at about the same time stays, also where that takes more.
        in_use: seconds for which a file stays that was asked for.
    """

    def __init__(self, folder: Path, room: int, in_use: float = _IN_USE) -> None:
        self.folder, self._room, self._in_use = folder, room, in_use
        self._new = room  # so the first file makes it look
        self._told = False
        self._counting = threading.Lock()

    def find(self, name: str) -> Path | None:
        """The copy of a file, None: there is none."""
        path = self.folder / name
        try:
            os.utime(path)
        except FileNotFoundError:
            return None
        return path

    def added(self, size: int) -> None:
        """Take notice of a file of so many bytes, and make room where need be."""
        with self._counting:
            self._new += size
            if self._new * _SLACK < self._room:
                return
            self._new = 0
        self._evict()

    def _evict(self) -> None:
        copies = []
        for path in self.folder.glob("*/*"):
            with suppress(OSError):
                if OF_CONTENT.fullmatch(path.name) and path.is_file():
                    stat = path.stat()
                    copies.append((stat.st_mtime, stat.st_size, path))
        total, now = sum(size for _, size, _ in copies), time.time()
        for used, size, path in sorted(copies):
            if total <= self._room:
                return
            if now - used < self._in_use:
                break
            with suppress(OSError):
                if path.stat().st_mtime == used:  # nobody has asked for it since
                    path.unlink()
                    total -= size
        if total > self._room and not self._told:
            self._told = True
            said = "resources.cache_size: %s bytes in %s are in use at once, %s are allowed"
            logger.warning(said, f"{total:,}", self.folder, f"{self._room:,}")
