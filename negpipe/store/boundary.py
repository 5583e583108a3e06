"""Keeps everything that a run writes or deletes in its directory, except for folders that the user links to a disk."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from negpipe.errors import StorageError
from negpipe.store.view import is_entry


def _shows_a_part(link: Path, home: str) -> bool:
    """A link in a shown folder, see `view`: it is deleted and replaced, never followed.

    In the run directory of a job with rounds, those of the rounds are deeper.
    """
    inside = link.relative_to(home)
    versions = [folder for folder in inside.parents if folder.parent.name.startswith(".")]
    return any(is_entry(home / folder, inside.relative_to(folder).as_posix()) for folder in versions)


def stay_inside(folder: str | os.PathLike[str], linkable: Collection[str]) -> None:
    """Refuse a run directory that contains a link that leads out of it.

    The directory itself may be a link, and so may a folder in it: `encode` on a scratch disk. Within that folder, no
    link may lead elsewhere.

    Args:
        folder: the run directory.
        linkable: folders in it that may be links.

    Raises:
        StorageError: such a link exists; nothing was written or deleted.
    """
    home = os.path.realpath(folder)
    waiting = [(home, home)] if Path(home).is_dir() else []
    while waiting:
        place, inside = waiting.pop()
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.is_symlink() and not (inside == home and _shows_a_part(Path(entry.path), home)):
                    target = os.path.realpath(entry.path)
                    if target.startswith(inside.rstrip(os.sep) + os.sep):
                        continue
                    around = home.startswith(target.rstrip(os.sep) + os.sep)
                    if place == home and entry.name in linkable and entry.is_dir() and not around:
                        waiting.append((target, target))
                        continue
                    raise StorageError(
                        f"{entry.path} is a link that leads out of the run directory, where nothing is written or"
                        " deleted. Replace it with a folder or file; in the run directory only these may be links"
                        f" to folders: {', '.join(sorted(linkable))}"
                    )
                # A linked folder may hold other things: a run writes directly into it and no deeper.
                if entry.is_dir(follow_symlinks=False) and inside == home:
                    waiting.append((entry.path, home))
