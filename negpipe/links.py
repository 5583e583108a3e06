"""Nothing that a run writes or deletes lies outside of its directory."""

from __future__ import annotations

import os
from pathlib import Path

from negpipe.errors import StorageError


def stay_inside(folder: str | os.PathLike[str]) -> None:
    """Refuse a run directory in which a link leads out of it. The directory itself may be one.

    Raises:
        StorageError: there is such a link; nothing was written or deleted.
    """
    home = os.path.realpath(folder)
    inside = home.rstrip(os.sep) + os.sep
    waiting = [home] if Path(home).is_dir() else []
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_symlink() and not os.path.realpath(entry.path).startswith(inside):
                    raise StorageError(
                        f"{entry.path} is a link that leads out of the run directory, and nothing is written or deleted"
                        " there. Put a folder or file in its place, or keep the whole run_dir where it leads"
                    )
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
