"""Looking after a run directory: are its files whole, and what may go."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from negpipe.errors import DamagedError, MissingStageError
from negpipe.lock import run_lock
from negpipe.manifest import Books, File
from negpipe.stages import STAGES


def verify(run_dir: Path, progress: Callable[[int], None] = lambda _: None) -> tuple[int, list[str]]:
    """Read every file of every complete stage and compare digests.

    Returns:
        files checked, and what is wrong, a line each.

    Raises:
        MissingStageError: there is nothing to verify.
    """
    files: list[File] = []
    problems: list[str] = []
    for name in STAGES:
        try:
            manifest = Books(run_dir, name).manifest()
        except DamagedError as error:
            problems.append(str(error))
            continue
        files += [file for part in (manifest.parts if manifest else ()) for file in part.files]
    if not files and not problems:
        raise MissingStageError(f"no stage is complete in {run_dir}: run `negpipe mine CONFIG` first")

    def check(file: File) -> str | None:
        problem = file.problem(run_dir, full=True)
        progress(file.bytes)
        return problem

    with ThreadPoolExecutor() as pool:
        problems += [problem for problem in pool.map(check, files) if problem]
    return len(files), problems


def superseded(run_dir: Path) -> list[tuple[Path, int]]:
    """Files that no current manifest names, with their bytes: what `clean` frees.

    A stage without a manifest keeps its parts, they are what it resumes from.
    """
    found: list[Path] = []
    for name, stage in STAGES.items():
        books = Books(run_dir, name)
        manifest = books.manifest()
        if manifest is None:
            continue
        keep = {run_dir / file.path for part in manifest.parts for file in part.files}
        keep |= {books.folder / f"{part.key}.json" for part in manifest.parts} | {books.manifest_path}
        folders = {run_dir / name, *(path.parent for path in keep), books.folder}
        found += [
            p for folder in folders for p in folder.glob("*") if p.is_file() and p not in keep and p.suffix != ".note"
        ]
        if stage.swapped:
            found += [p for folder in run_dir.glob(f".{name}-*") for p in folder.rglob("*") if p.is_file()]
    return [(path, path.stat().st_size) for path in sorted(found)]


def clean(run_dir: Path) -> int:
    """Delete what `superseded` lists. Returns the bytes freed."""
    with run_lock(run_dir):
        listed = superseded(run_dir)
        for path, _ in listed:
            path.unlink(missing_ok=True)
        for folder in run_dir.glob(".*-*"):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
    return sum(size for _, size in listed)
