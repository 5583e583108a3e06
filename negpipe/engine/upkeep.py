"""Looking after a run directory: are its files whole, and what may go."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from negpipe.engine import publication
from negpipe.engine.manifest import Books, File
from negpipe.engine.repair import damaged
from negpipe.engine.stage import Graph, linkable
from negpipe.errors import DamagedError, MissingStageError
from negpipe.store import unfinished
from negpipe.store.boundary import stay_inside
from negpipe.store.files import file_digest
from negpipe.store.lock import run_lock

_PUBLISHED = re.compile(r"[0-9a-f]{16}-([0-9a-f]{12})\.[a-z]+")
_STAGING = re.compile(r"\.[a-z]+-[0-9a-f]{16}")


@dataclass(frozen=True)
class Inventory:
    """What a run directory has on record.

    Attributes:
        files: those of complete stages, and of parts that are kept for a setting to come back to.
        unreadable: manifests and parts' records that are not what was written, a line each.
    """

    files: tuple[File, ...]
    unreadable: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


def inventory(run_dir: Path, graph: Graph) -> Inventory:
    """Read every manifest and every part's record.

    Raises:
        MissingStageError: there is none.
    """
    files: dict[str, File] = {}
    unreadable: list[str] = []
    for name in graph:
        books = Books(run_dir, name)
        try:
            manifest = books.manifest()
        except DamagedError as error:
            unreadable.append(str(error))
            manifest = None
        for path in books.sidecars():
            part = books.record(path.stem)
            if part is None:
                unreadable.append(f"{path} is not the record of a part")
            # What is gone was cleaned, or stands elsewhere since it was published.
            files |= {file.path: file for file in (part.files if part else ()) if (run_dir / file.path).exists()}
        files |= {file.path: file for part in (manifest.parts if manifest else ()) for file in part.files}
    if not files and not unreadable:
        raise MissingStageError(f"no stage has made anything in {run_dir}: run `negpipe mine CONFIG` first")
    return Inventory(tuple(files.values()), tuple(unreadable))


def verify(run_dir: Path, found: Inventory, progress: Callable[[int], None] = lambda _: None) -> list[str]:
    """Read every file whole and compare digests; changes nothing.

    Args:
        run_dir: the run directory.
        found: what it has on record.
        progress: gets the bytes of every file that was read.

    Returns:
        what is wrong, a line each.
    """
    return [*found.unreadable, *(problem for _, problem in damaged(run_dir, found.files, progress))]


def superseded(run_dir: Path, graph: Graph) -> list[tuple[Path, int]]:
    """Files that no current manifest names, with their bytes: what `clean` frees.

    Only what is known to be ours: files that records name, the records, and what a killed run could not record any
    more, as far as its name proves it. A stage without a manifest keeps its parts, they are what it resumes from.
    """
    stay_inside(run_dir, linkable(graph))
    found: set[Path] = set()
    for name, stage in graph.items():
        books = Books(run_dir, name)
        manifest = books.manifest()
        if manifest is None:
            continue
        keep = {run_dir / file.path for part in manifest.parts for file in part.files}
        keep |= {books.folder / f"{part.key}.json" for part in manifest.parts}
        parts = [part for path in books.sidecars() if (part := books.record(path.stem))]
        own = {".", name, *stage.folders}  # no record of this stage can name another's files
        ours = {
            run_dir / file.path
            for part in parts
            for file in part.files
            if (place := str(PurePosixPath(file.path).parent)) in own or place.startswith(f".{name}-")
        }
        folders = {run_dir / name} | {path.parent for path in ours} - {run_dir}
        ours |= {*books.sidecars(), *books.checkpoints(), *unfinished.left_over(books.folder)}
        for folder in folders:
            ours |= {*unfinished.left_over(folder)}
            if not folder.is_symlink():  # other run directories may have linked the same folder
                ours |= {path for path in _files(folder) - keep - ours if _carries_digest(path)}
        if stage.swapped:
            # Nobody but a run writes parts into folders of this name.
            growing = [folder for folder in run_dir.glob(f".{name}-*") if _STAGING.fullmatch(folder.name)]
            ours |= {path for folder in growing for path in _files(folder) if publication.PART.fullmatch(path.name)}
        found |= {path for path in ours - keep if path.is_file()}
    return [(path, path.stat().st_size) for path in sorted(found)]


def _files(folder: Path) -> set[Path]:
    return {path for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set()


def _carries_digest(path: Path) -> bool:
    """Whether a file is called as `Publisher` calls it, by the digest of what it holds."""
    named = _PUBLISHED.fullmatch(path.name)
    return named is not None and file_digest(path).startswith(named[1])


def clean(run_dir: Path, graph: Graph) -> int:
    """Delete what `superseded` lists. Returns the bytes freed."""
    stay_inside(run_dir, linkable(graph))  # before the lock is written
    with run_lock(run_dir):
        listed = superseded(run_dir, graph)
        for path, _ in listed:
            path.unlink(missing_ok=True)
        for folder in run_dir.glob(".*-*"):
            if _STAGING.fullmatch(folder.name) and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
    return sum(size for _, size in listed)
