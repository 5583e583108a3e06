"""Publishing files: a final name never exists half-written, whatever is killed or fills up.

A unique dot-prefixed temporary sibling → write → flush → fsync → `os.replace` → fsync the folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from negpipe.errors import NegpipeError, StorageError, VanishedError
from negpipe.store import unfinished

_REASONS = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is exceeded",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission to write",
    errno.EPERM: "no permission to write",
    errno.ENOTDIR: "part of its path is a file",
    errno.EFBIG: "the file is larger than this file system or the process limit allows",
}
_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OF_PLACES = (errno.EACCES, errno.EPERM, errno.ENOTDIR)  # reading raises them as well


BOOKS = ".negpipe"
"""The folder of a run directory that holds records and everything else not meant for users."""


@dataclass(frozen=True)
class Published:
    """A file under its final name: name within its folder, bytes, and sha256 if the name depends on it."""

    name: str
    bytes: int
    digest: str


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def explained(path: Path, needed: Callable[[], int] | None = None, *, least: bool = False) -> Iterator[None]:
    """Turn write errors of the file system into errors that a user can act on.

    Args:
        path: the folder or file being written.
        needed: called on failure: the bytes needed there.
        least: these are only the bytes so far, a lower bound.

    Raises:
        StorageError: no space, quota exceeded, read-only, no permission, too large.
    """
    try:
        yield
    except NegpipeError:
        raise
    except Exception as error:
        refused = _refusal(error, path)
        if refused is None:
            raise
        free = ""
        with suppress(OSError):
            if refused in _OF_SPACE:
                free = f"{shutil.disk_usage(path if path.is_dir() else path.parent).free:,} bytes are free there. "
        count = needed() if needed else 0
        need = f"{'More than ' * least}{count:,} bytes are needed. " if count else ""
        raise StorageError(
            f"cannot write {path}: {_REASONS[refused]}. {need}{free}"
            "No finished work was lost: free some space, or fix path or permissions, then run the same command again"
        ) from error


def _refusal(error: Exception, path: Path) -> int | None:
    """The system's error number. Libraries that write files themselves report it only as text."""
    if isinstance(error, OSError) and error.errno in _REASONS:
        named = error.filename if isinstance(error.filename, str | os.PathLike) else path
        inside = Path(named).absolute().is_relative_to(path.absolute())
        return error.errno if inside or error.errno not in _OF_PLACES else None
    return next((n for n in _REASONS if n not in _OF_PLACES and os.strerror(n) in str(error)), None)


def publish(
    folder: Path,
    name: str | Callable[[str], str],
    write: Callable[[BinaryIO], None],
    needed: int | None = None,
    ready: Callable[[Path, str], None] = lambda _, __: None,
) -> Published:
    """Write a file and give it its final name, which may depend on its content.

    Args:
        folder: the file's folder, existing or new.
        name: the final name, or a function that makes it from the sha256 of the content.
        write: writes the content to the given binary file.
        needed: its size in bytes, if known: without room for it, nothing is written.
        ready: called with the complete temporary file and the final name, before the rename.

    Raises:
        StorageError: the file system refused the write; no temporary file is left.
        VanishedError: another process removed the temporary file.
    """
    temporary = unfinished.temporary(folder)
    size = 0
    with explained(folder, lambda: size if needed is None else needed, least=needed is None):
        folder.mkdir(parents=True, exist_ok=True)
        if needed is not None:
            fits(folder, needed)
        try:
            with temporary.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            digest = "" if isinstance(name, str) else file_digest(temporary)
            size = bytes_in(temporary)
            final = name if isinstance(name, str) else name(digest)
            ready(temporary, final)
            os.replace(temporary, folder / final)
        except FileNotFoundError as error:
            if temporary.exists():
                raise
            raise VanishedError(
                f"{temporary} vanished while being written: another process uses this run directory, or files"
                " in it are being deleted. Stop it, then run the same command again"
            ) from error
        finally:
            size = size or bytes_in(temporary)
            temporary.unlink(missing_ok=True)
        sync_folder(folder)
    return Published(final, size, digest)


def fits(folder: Path, needed: int) -> None:
    """Raises OSError: a folder has no room for `needed` bytes."""
    if needed > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def growing(out: Path, *, single: bool) -> Iterator[Path]:
    """A temporary folder next to `out`; on success it takes that name, or with `single`, its only file does.

    Raises:
        StorageError: the file system refused the write; the previous content stays.
    """
    folder, old = unfinished.temporary(out.parent), out.with_name(f".{out.name}.{uuid.uuid4().hex}.old")
    size = 0
    with explained(out, lambda: size, least=True):
        folder.mkdir(parents=True)
        try:
            yield folder
            made = next(folder.iterdir()) if single else folder
            sync_tree(made)
            if out.exists():
                os.rename(out, old)
            os.rename(made, out)
            sync_folder(out.parent)
        finally:
            size = bytes_in(folder)
            if old.exists() and not out.exists():
                os.rename(old, out)
            for path in (folder, old):
                remove(path)


def remove(path: Path) -> None:
    """Delete a file, a link, or a folder with everything in it, as far as possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync_tree(root: Path) -> None:
    """Make a file, or a folder with everything in it, survive a power cut."""
    for path in [root, *root.rglob("*")]:
        if path.is_dir():
            sync_folder(path)
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())


def check_room(needed: Mapping[Path, int], what: str, remedy: str) -> None:
    """Check that there is room for the bytes needed in each folder; a folder may be a link to another disk.

    Raises:
        StorageError: a disk has less room than its folders need together.
    """
    folders: dict[int, list[Path]] = {}
    for folder in needed:
        folders.setdefault((folder if folder.is_dir() else folder.parent).stat().st_dev, []).append(folder)
    for own in folders.values():
        place = own[0] if own[0].is_dir() else own[0].parent
        total, free = sum(needed[folder] for folder in own), shutil.disk_usage(place).free
        if total > free:
            raise StorageError(
                f"{what} {total:,} bytes in {place}, {free:,} bytes are free there. No finished work was lost: free"
                f" some space, or {remedy}, then run the same command again"
            )


def bytes_in(path: Path) -> int:
    """The size of a file, or of the files in a folder; 0 if it does not exist."""
    try:
        files = [inner for inner in path.rglob("*") if inner.is_file()] if path.is_dir() else [path]
        return sum(file.stat().st_size for file in files)
    except OSError:
        return 0


def write_json(path: Path, value: Any) -> None:
    """Publish a JSON file."""
    data = json_bytes(value)
    publish(path.parent, path.name, lambda file: write_all(file, data), len(data))


def json_bytes(value: Any) -> bytes:
    """A value as the content of a JSON file."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write existing bytes, for `publish`."""
    file.write(data)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_temporaries(folder: Path, *, own: bool = True) -> None:
    """Delete temporary files of killed writers, see `unfinished.left_over`. Only under the run lock."""
    for path in unfinished.left_over(folder, own=own):
        remove(path)
