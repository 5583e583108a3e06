"""The single protocol for access to parts, records and pointers, and its implementation for local disks.

Files are named by a folder and a name in it, "search/0f3a…-9c1d….parquet", and are immutable once they exist; mutable
files (manifests) are written conditionally, so that of two writers, one learns that it came late.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from negpipe.store import files, unfinished, view
from negpipe.store.cache import OF_CONTENT
from negpipe.store.lock import held

CHANGES = ".negpipe/changes.lock"
"""Held while a small file is replaced."""
_PATIENCE = 30.0  # seconds that another process may take to write a few kilobytes
_READS = 5


Shown = str | Mapping[str, str] | None
"""What a name shows to users: a file of a store, files by their names in a folder, or nothing."""


class Store(Protocol):
    """Files by name."""

    @property
    def scratch(self) -> Path:
        """A folder for unfinished work to resume, and for files that no other machine needs."""

    @property
    def verifies(self) -> bool:
        """Whether files are verified against the digest in their name before `path` returns them."""

    def put(
        self, folder: str, name: Callable[[str], str], write: Callable[[BinaryIO], None], needed: int | None = None
    ) -> files.Published:
        """Write a file under its final name, which may depend on the sha256 of its content; it appears complete.

        Raises:
            StorageError: it cannot be written; nothing is left behind.
            VanishedError: the file was removed while being written.
        """

    def path(self, name: str) -> Path:
        """Path where this machine reads the file, possibly memory-mapped."""

    def size(self, name: str) -> int | None:
        """Size of a file in bytes; None if it does not exist."""

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Sizes of many files in bytes, by name; missing files are left out."""

    def digest(self, name: str) -> str | None:
        """sha256 of a file's bytes, all read from the store itself; None if it does not exist."""

    def names(self, folder: str) -> list[str]:
        """Names of the files in a folder, as accepted by the other methods, sorted."""

    def strays(self, folder: str, known: Collection[str]) -> list[str]:
        """Files of a folder that nobody but negpipe can have left there, apart from the known ones."""

    def read(self, name: str) -> bytes | None:
        """A small file's current content; None if it does not exist."""

    def reads(self, names: Iterable[str]) -> dict[str, bytes]:
        """The contents of many small files, by name; missing or unreadable files are left out."""

    def replace(self, name: str, content: bytes, expected: bytes | None) -> bool:
        """Write a small file completely if it still holds `expected` (None: if missing); returns whether it did."""

    def delete(self, name: str) -> None:
        """Delete a file, if it exists."""

    def lock(self, name: str, patience: float = 0.0) -> AbstractContextManager[None]:
        """Lock a name against other processes, waiting up to `patience` seconds for it.

        Raises:
            LockedError: another process holds it.
        """

    def check_room(self, needed: Mapping[str, int], what: str, remedy: str) -> None:
        """Check that each folder has room for the bytes needed.

        Raises:
            StorageError: there is not enough room.
        """

    def show(self, name: str, what: Shown, version: str, parts: Store, old: Callable[[], Collection[str]]) -> None:
        """Make a name show files of the store `parts`, atomically; see `view.show`."""

    def shows(self, name: str, what: Shown, version: str, parts: Store) -> bool:
        """Whether a name shows the right files."""

    def entries(self, name: str) -> list[str]:
        """The files in a shown folder, in order, as accepted by `path`; without files that users put there."""

    def folder(self, name: str) -> Path:
        """The local folder with the files that a name shows, under their shown names."""

    def place(self, name: str) -> str:
        """Where users find what a name shows."""


@dataclass(frozen=True)
class LocalStore:
    """A `Store` in a folder. Its folders may be links to other disks."""

    root: Path

    verifies = False

    def __str__(self) -> str:
        return str(self.root)

    @property
    def scratch(self) -> Path:
        return self.root

    def put(
        self, folder: str, name: Callable[[str], str], write: Callable[[BinaryIO], None], needed: int | None = None
    ) -> files.Published:
        return files.publish(self.root / folder, name, write, needed)

    def path(self, name: str) -> Path:
        return self.root / name

    def size(self, name: str) -> int | None:
        try:  # not via `path`: for ten thousand parts, creating Paths would take longer than the system calls
            found = os.stat(f"{self.root}/{name}")
        except OSError:
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        return {name: size for name in names if (size := self.size(name)) is not None}

    def digest(self, name: str) -> str | None:
        try:
            return files.file_digest(self.path(name))
        except FileNotFoundError:
            return None

    def names(self, folder: str) -> list[str]:
        try:
            with os.scandir(self.root / folder) as entries:
                return sorted(f"{folder}/{entry.name}" for entry in entries if entry.is_file())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def strays(self, folder: str, known: Collection[str]) -> list[str]:
        place = self.root / folder
        left = [f"{folder}/{path.name}" for path in unfinished.left_over(place)]
        if place.is_symlink():  # other stores may link to the same folder
            return left
        return left + [name for name in self.names(folder) if name not in known and self._carries_digest(name)]

    def _carries_digest(self, name: str) -> bool:
        """Whether a file's name ends in the digest of its content."""
        named = OF_CONTENT.fullmatch(name)
        return named is not None and (self.digest(name) or "").startswith(named[1])

    def read(self, name: str) -> bytes | None:
        for attempt in range(_READS):
            try:
                with open(f"{self.root}/{name}", "rb", buffering=0) as file:  # noqa: PTH123 — as for `size`
                    return file.read()
            except FileNotFoundError:
                return None
            except OSError as error:  # on NFS, another machine replaced the file after it was opened
                if error.errno != errno.ESTALE or attempt == _READS - 1:
                    raise
        raise AssertionError

    def reads(self, names: Iterable[str]) -> dict[str, bytes]:
        found = {}
        for name in names:
            with suppress(OSError):
                if (content := self.read(name)) is not None:
                    found[name] = content
        return found

    def replace(self, name: str, content: bytes, expected: bytes | None) -> bool:
        with self.lock(CHANGES, _PATIENCE):
            if self.read(name) != expected:
                return False
            path = self.path(name)
            files.publish(path.parent, path.name, lambda file: files.write_all(file, content), len(content))
            return True

    def delete(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)

    def lock(self, name: str, patience: float = 0.0) -> AbstractContextManager[None]:
        return held(self.path(name), patience)

    def check_room(self, needed: Mapping[str, int], what: str, remedy: str) -> None:
        files.check_room({self.root / folder: count for folder, count in needed.items()}, what, remedy)

    def show(self, name: str, what: Shown, version: str, parts: Store, old: Callable[[], Collection[str]]) -> None:
        view.show(self.root, name, _local(what, parts), version, old)

    def shows(self, name: str, what: Shown, version: str, parts: Store) -> bool:
        return view.shows(self.root, name, _local(what, parts), version)

    def entries(self, name: str) -> list[str]:
        return [f"{name}/{path.name}" for path in view.entries(self.root / name)]

    def folder(self, name: str) -> Path:
        return self.root / name

    def place(self, name: str) -> str:
        return str(self.root / name)


def _local(what: Shown, parts: Store) -> Path | dict[str, Path] | None:
    if isinstance(what, str):
        return parts.path(what)
    return {name: parts.path(path) for name, path in what.items()} if isinstance(what, Mapping) else None
