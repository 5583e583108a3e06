"""Copies of immutable files on a local disk, up to a size limit.

The least recently requested copies make room for others. Times are those of this machine and its disk.
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
"""Names that identify a file's content: they end in the first twelve digits of its sha256."""
_IN_USE = 600.0  # seconds after a request in which a file may still be about to be opened
_SLACK = 16  # the folder is scanned whenever 1/_SLACK of the room has been filled


class FileCache:
    """A folder of such files, laid out like the store. Several processes may share it.

    Args:
        folder: the folder of the files.
        room: bytes they may take. Files requested at about the same time stay, even if they take more.
        in_use: seconds for which a requested file stays.
    """

    def __init__(self, folder: Path, room: int, in_use: float = _IN_USE) -> None:
        self.folder, self._room, self._in_use = folder, room, in_use
        self._new = room  # so that the first file triggers a scan
        self._told = False
        self._counting = threading.Lock()

    def find(self, name: str) -> Path | None:
        """The copy of a file, or None."""
        path = self.folder / name
        try:
            os.utime(path)
        except FileNotFoundError:
            return None
        return path

    def added(self, size: int) -> None:
        """Account for a new file of `size` bytes, and make room if necessary."""
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
                if path.stat().st_mtime == used:  # not requested since
                    path.unlink()
                    total -= size
        if total > self._room and not self._told:
            self._told = True
            said = "resources.cache_size: %s bytes in %s are in use at once, %s are allowed"
            logger.warning(said, f"{total:,}", self.folder, f"{self._room:,}")
