"""Swapping a whole folder at once: people see `triplets/` of one setting, or of the one before.

New output grows in `.triplets-KEY/`. Publishing renames folders; a note written before the first rename
lets the next start finish a swap that was cut short at any point.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

from negpipe.manifest import BOOKS
from negpipe.storage import explained, sync_folder, write_json


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
    """Complete a swap that was begun; each step may already have happened."""
    note = _note(run_dir, stage, "swap")
    key = _read(note)
    if key is None:
        return
    final, growing, old = run_dir / stage, run_dir / staging(stage, key), run_dir / f".{stage}-old"
    while growing.exists():
        try:
            if final.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.rename(final, old)
            os.rename(growing, final)
        except OSError as error:
            # Where locks do not work, another process takes the same steps between ours.
            if error.errno not in (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY):
                raise
        sync_folder(run_dir)
    write_json(_note(run_dir, stage, "published"), {"key": key})
    shutil.rmtree(old, ignore_errors=True)
    note.unlink(missing_ok=True)


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
