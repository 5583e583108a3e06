"""What users look at: `triplets/`, `model/` and `rejected.jsonl` in the run directory, names that show parts of the
store.

A folder of parts is shown by a pointer, a relative symbolic link that changes atomically: at every moment, a reader
sees the rows of one setting. It leads to `.NAME/VERSION/`, a folder of links to the parts (hard links, or symbolic ones
if the store is on another disk). A single file is shown by a link. Files that users put into a shown folder belong to
them: they are moved to the next version. Ours are recognised by their name, `PART`, or by the list next to them.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath

from negpipe.errors import StorageError
from negpipe.store import unfinished
from negpipe.store.files import explained, json_bytes, publish, sync_folder, write_all

_ATTEMPTS = 20
_RACES = (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR)
_ASIDE = "old-"
Entries = Mapping[str, Path]
PART = re.compile(r"part-\d{5}(-\d{5})?\.parquet")
"""The names of entries in a shown folder of rows."""
_LIST = ".shown"
"""In a folder whose entries have other names: the list of these, in JSON."""


def show(
    run_dir: Path, name: str, what: Path | Entries | None, version: str, old: Callable[[], Collection[str]]
) -> None:
    """Make a name in the run directory show a file, a folder of files, or nothing.

    Args:
        run_dir: the run directory.
        name: the name.
        what: the file; the files by their shown names; None: the name is removed.
        version: identifies what is shown.
        old: returns the entries that are not the user's, in a folder that the pointer will replace.

    Raises:
        StorageError: it cannot be changed; the previous view stays.
    """
    place = run_dir / name
    with explained(run_dir):
        if what is None:
            if place.is_symlink() or not place.is_dir():
                place.unlink(missing_ok=True)
        elif isinstance(what, Path):
            if not _same(place, what):
                _link(what, place, symbolic=False)
                sync_folder(run_dir)
        else:
            _point(run_dir, name, _filled(run_dir / f".{name}" / version, what), old)


def shows(run_dir: Path, name: str, what: Path | Entries | None, version: str) -> bool:
    """Whether a name shows the right files."""
    place = run_dir / name
    if what is None:
        return not os.path.lexists(place) or (place.is_dir() and not place.is_symlink())  # the user's own
    if isinstance(what, Path):
        return _alike(place, what)
    pointed = place.is_symlink() and place.readlink() == Path(f".{name}", version)
    return pointed and all(_alike(place / entry, path) for entry, path in what.items())


def entries(folder: Path) -> list[Path]:
    """The files that a folder shows, in order; without files that users put there."""
    return sorted(path for path in folder.iterdir() if PART.fullmatch(path.name))


def is_entry(folder: Path, name: str) -> bool:
    """Whether a name in a shown folder, "1_Pooling/config.json", belongs to what it shows, and is not a user's."""
    return PART.fullmatch(name) is not None or name in _listed(folder)


def stale(run_dir: Path, name: str) -> Iterator[Path]:
    """Links to parts in folders that a name no longer shows, and leftovers of killed runs."""
    current = (run_dir / name).resolve()
    with suppress(OSError):
        for folder in sorted((run_dir / f".{name}").iterdir()):
            if folder.is_dir() and not folder.is_symlink() and folder.resolve() != current:
                listed = [folder / entry for entry in _listed(folder)]
                yield from (path for path in listed if path.is_file() and not _is_lone(path))
                yield from (path for path in folder.iterdir() if PART.fullmatch(path.name) and not _is_lone(path))
                if listed:
                    yield folder / _LIST


def drop_empty(run_dir: Path, name: str) -> None:
    """Remove empty folders."""
    with suppress(OSError):
        for folder in (run_dir / f".{name}").iterdir():
            within = sorted(path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink())
            for inner in [*reversed(within), folder]:
                with suppress(OSError):
                    inner.rmdir()


def _filled(folder: Path, entries: Entries) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for path in unfinished.left_over(folder):
        path.unlink(missing_ok=True)
    if not all(map(PART.fullmatch, entries)):
        names = json_bytes(sorted(entries))
        publish(folder, _LIST, lambda file: write_all(file, names), len(names))
    fill(folder, entries)
    sync_folder(folder)
    return folder


def fill(folder: Path, entries: Entries, *, symbolic: bool = True) -> None:
    """Create links to files in a folder, under the given names, such as "1_Pooling/config.json".

    Args:
        folder: created if it does not exist.
        entries: its files by name.
        symbolic: use symbolic links where hard links are impossible; else copies, for folders that nothing shows, in
            which a link that leads elsewhere would belong to nothing.
    """
    for name, path in entries.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not _same(folder / name, path):
            _link(path, folder / name, symbolic=symbolic)


def _listed(folder: Path) -> list[str]:
    """The entries of a folder that are not recognised by their names."""
    try:
        names = [PurePosixPath(name) for name in json.loads((folder / _LIST).read_bytes())]
        return [str(name) for name in names if not name.is_absolute() and ".." not in name.parts]
    except (OSError, TypeError, ValueError):
        return []


def _link(source: Path, name: Path, *, symbolic: bool) -> None:
    """Link a file under a second name, replacing what has that name."""
    temporary = unfinished.temporary(name.parent)
    try:
        try:
            os.link(source, temporary)
        except OSError:  # another disk, or a file system without hard links
            if symbolic:
                temporary.symlink_to(os.path.realpath(source))
            else:
                shutil.copyfile(source, temporary)
        os.replace(temporary, name)
    finally:
        temporary.unlink(missing_ok=True)  # a rename onto another name of the same file does nothing


def point(link: Path, target: Path) -> None:
    """Make a link point to another file or folder, atomically."""
    temporary = unfinished.temporary(link.parent)
    try:
        temporary.symlink_to(target)
        os.replace(temporary, link)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(link.parent)


def _point(run_dir: Path, name: str, folder: Path, old: Callable[[], Collection[str]]) -> None:
    """Move the pointer, then the user's files; each step may already have happened."""
    place, target = run_dir / name, Path(folder.parent.name, folder.name)
    for _ in range(_ATTEMPTS):
        if place.is_symlink() and place.readlink() == target:
            break
        try:
            if place.is_dir() and not place.is_symlink():
                os.rename(place, folder.parent / f"{_ASIDE}{uuid.uuid4().hex}")
            point(place, target)
        except OSError as error:
            # If locks do not work, another process may take the same steps in between.
            if error.errno not in _RACES:
                raise _stuck(place, folder, error.strerror) from error
    else:
        raise _stuck(place, folder, f"it exists again after {_ATTEMPTS} attempts")
    sync_folder(run_dir)
    for other in sorted(folder.parent.iterdir()):
        if other.is_dir() and not other.is_symlink() and other != folder:
            _move_on(other, folder, old() if other.name.startswith(_ASIDE) else ())


def _stuck(place: Path, folder: Path, why: str | None) -> StorageError:
    return StorageError(
        f"{place} cannot be replaced ({why}). Its new content is complete in {folder}: move {place} away, or grant the"
        " permission to rename it, then run the same command again"
    )


def _move_on(before: Path, folder: Path, ours: Collection[str]) -> None:
    """Move the user's files along. Files shown for an older setting, whoever made them, stay where they are."""
    shown = {_LIST, *(name.partition("/")[0] for name in _listed(before))}
    for path in sorted(before.iterdir()):
        with suppress(OSError):
            if path.name in ours or unfinished.is_unfinished(path.name):
                path.unlink()
            # On NFS, a file that is still being read has a system name and disappears by itself.
            elif not (PART.fullmatch(path.name) or path.name in shown or path.name.startswith(".nfs")):
                os.rename(path, _free(folder / path.name))
    with suppress(OSError):
        before.rmdir()


def _free(path: Path) -> Path:
    """The path, or the first numbered variant that is free."""
    taken, number = path, 0
    while os.path.lexists(taken):
        number += 1
        taken = path.with_name(f"{path.name}.{number}")
    return taken


def _same(place: Path, path: Path) -> bool:
    try:
        return place.samefile(path)
    except OSError:
        return False


def _alike(place: Path, path: Path) -> bool:
    """Whether a name is a file or a copy of it: in a copied run directory, links have become separate files."""
    try:
        return place.stat().st_size == path.stat().st_size
    except OSError:
        return False


def _is_lone(path: Path) -> bool:
    """Whether a file has no other name: then only a user can have put it there."""
    return not path.is_symlink() and path.stat().st_nlink == 1
