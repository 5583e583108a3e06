"""Swapping a whole folder at once: people see `triplets/` of one setting, or of the one before.

New output grows in `.triplets-KEY/`. Publishing renames folders; a note written before the first rename
lets the next start finish a swap that was cut short at any point. The old folder goes aside under a name of its own,
so that one that cannot be deleted stays in nobody's way. Only files that records name are deleted: what else lies in
a folder is the user's, and is moved to the new one.
"""

from __future__ import annotations

import errno
import json
import os
import re
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from negpipe.engine.manifest import Books
from negpipe.errors import StorageError
from negpipe.store import unfinished
from negpipe.store.files import BOOKS, explained, sync_folder, write_json

_ATTEMPTS = 20
_RACES = (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY)
PART = re.compile(r"part-\d{5}(-\d{5})?\.parquet")
"""What the files of a folder that is swapped are called."""


def staging(stage: str, key: str) -> str:
    """The folder, relative to the run directory, in which a stage's output grows."""
    return f".{stage}-{key}"


def prepare(run_dir: Path, stage: str, key: str) -> None:
    """Make ready to grow the output of `key`: what is published under that key is resumed, not made again."""
    finish_swap(run_dir, stage)
    final, growing = run_dir / stage, run_dir / staging(stage, key)
    if not growing.exists() and final.exists() and _read(_note(run_dir, stage, "published")) == key:
        os.rename(final, growing)
        sync_folder(run_dir)


def swap(run_dir: Path, stage: str, key: str) -> None:
    """Publish the complete output of `key`."""
    with explained(run_dir):
        write_json(_note(run_dir, stage, "swap"), {"key": key})
        finish_swap(run_dir, stage)


def finish_swap(run_dir: Path, stage: str) -> None:
    """Complete a swap that was begun, each step may already have happened; then clear what older ones left.

    Raises:
        StorageError: the folders cannot be renamed; the new output stays whole where it is.
    """
    note = _note(run_dir, stage, "swap")
    key = _read(note)
    if key is not None:
        _rename(run_dir, stage, key)
        write_json(_note(run_dir, stage, "published"), {"key": key})
        note.unlink(missing_ok=True)
    final = run_dir / stage
    if final.is_dir():
        _clear(run_dir, stage, final)


def _rename(run_dir: Path, stage: str, key: str) -> None:
    final, growing = run_dir / stage, run_dir / staging(stage, key)
    for _ in range(_ATTEMPTS):
        if not growing.exists():
            return
        try:
            if final.exists():
                os.rename(final, run_dir / f"{_old(stage)}-{uuid.uuid4().hex}")
            os.rename(growing, final)
        except OSError as error:
            # Where locks do not work, another process takes the same steps between ours.
            if error.errno not in _RACES:
                raise _stuck(final, growing, error.strerror) from error
        sync_folder(run_dir)
    if growing.exists():
        raise _stuck(final, growing, f"something is there again after {_ATTEMPTS} attempts")


def _stuck(final: Path, growing: Path, why: str | None) -> StorageError:
    return StorageError(
        f"{final} cannot be replaced ({why}). Its new content is complete in {growing}: free {final}, or give the right"
        " to rename it, then run the same command again"
    )


def _clear(run_dir: Path, stage: str, final: Path) -> None:
    """Move what is not ours from old folders to the new one, and delete the old ones as far as they can be."""
    old = {path for path in run_dir.glob(f"{_old(stage)}*") if path.is_dir() and not path.is_symlink()}
    growing = {path for path in run_dir.glob(f".{stage}-*") if path.is_dir() and not path.is_symlink()} - old
    if not old and not growing:
        return
    books = Books(run_dir, stage)
    recorded = {
        Path(file.path).name
        for path in books.sidecars()
        if (part := books.record(path.stem))
        for file in part.files
        if Path(file.path).parent.name.startswith(f".{stage}-")
    }
    for folder in old | growing:
        for path in sorted(folder.iterdir()):
            if path.name in recorded or unfinished.is_unfinished(path.name):
                if folder in old:
                    with suppress(OSError):
                        path.unlink()
            # Rows of an older setting must not stand among the new ones, whoever made them: they stay where they are.
            # A file that somebody on NFS still reads has a name of the system's and goes by itself.
            elif not PART.fullmatch(path.name) and not path.name.startswith(".nfs"):
                with suppress(OSError):
                    os.rename(path, _free(final / path.name))
        if folder in old:
            with suppress(OSError):
                folder.rmdir()
    sync_folder(final)


def _free(path: Path) -> Path:
    """The path, or the first numbered one that nothing has."""
    taken, number = path, 0
    while os.path.lexists(taken):
        number += 1
        taken = path.with_name(f"{path.name}.{number}")
    return taken


def _old(stage: str) -> str:
    return f".{stage}-old"


def published(run_dir: Path, stage: str) -> str | None:
    """The key of the output that the stage's folder shows, complete or not; None where it shows none."""
    return _read(_note(run_dir, stage, "published")) if (run_dir / stage).exists() else None


def _note(run_dir: Path, stage: str, name: str) -> Path:
    return run_dir / BOOKS / stage / f"{name}.note"


def _read(path: Path) -> str | None:
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return str(value["key"]) if isinstance(value, dict) and "key" in value else None
