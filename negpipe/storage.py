"""Publishing files: a final name never exists half-written, whatever is killed or fills up.

Unique dot-prefixed temporary sibling → write → flush → fsync → `os.replace` → fsync the folder.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from negpipe.errors import NegpipeError, StorageError
from negpipe.fingerprint import file_digest

TEMPORARY = ".tmp"
_REASONS = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission to write",
    errno.EPERM: "no permission to write",
    errno.ENOTDIR: "a folder of its path is a file",
    errno.EFBIG: "the file is larger than this file system or the process limit allows",
}


@dataclass(frozen=True)
class Published:
    """A file under its final name: name within its folder, bytes and sha256."""

    name: str
    bytes: int
    digest: str


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the file system's refusals into errors a person can act on."""
    try:
        yield
    except NegpipeError:
        raise
    except Exception as error:
        refused = _refusal(error)
        if refused is None:
            raise
        try:
            free = f"{shutil.disk_usage(path if path.is_dir() else path.parent).free:,} bytes are free there. "
        except OSError:
            free = ""
        raise StorageError(
            f"cannot write {path}: {_REASONS[refused]}. {free}"
            "Nothing finished was lost: make room, or mend path or permission, then run the same command again"
        ) from error


def _refusal(error: Exception) -> int | None:
    """The system's error number. Libraries that write files themselves give it as text only."""
    if isinstance(error, OSError) and error.errno in _REASONS:
        return error.errno
    return next((number for number in _REASONS if os.strerror(number) in str(error)), None)


def publish(folder: Path, name: Callable[[str], str], write: Callable[[BinaryIO], None]) -> Published:
    """Write a file and give it its final name, which may depend on its content.

    Args:
        folder: existing or new folder of the file.
        name: makes the final name from the sha256 of the content.
        write: writes the content to the binary file it is given.

    Raises:
        StorageError: the file system refused; no temporary file is left.
    """
    temporary = folder / f".{uuid.uuid4().hex}{TEMPORARY}"
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            digest = file_digest(temporary)
            size = temporary.stat().st_size
            final = name(digest)
            os.replace(temporary, folder / final)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(folder)
    return Published(final, size, digest)


def write_json(path: Path, value: Any) -> None:
    """Publish a JSON file."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    publish(path.parent, lambda _: path.name, lambda file: write_all(file, text.encode()))


def write_all(file: BinaryIO, data: bytes) -> None:
    """Write bytes that are there already, for `publish`."""
    file.write(data)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_temporaries(folder: Path) -> None:
    """Delete what killed writers left in a folder. Only under the run lock."""
    for path in folder.glob(f".*{TEMPORARY}"):
        path.unlink(missing_ok=True)
