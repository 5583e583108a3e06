"""What a path of the config names: a local file, a local folder, a remote file or a hub dataset."""

from __future__ import annotations

import difflib
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from negpipe.errors import InputError

PACKED = (".gz", ".bz2", ".xz", ".zst")
"""Extensions of compressed files."""
EXTENSIONS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


class Table(NamedTuple):
    """Where a table is. `split` None: the only split of a dataset; it says nothing about a file."""

    path: str
    subset: str | None = None
    split: str | None = None
    revision: str | None = None


def locate(path: str) -> Literal["file", "folder", "url", "hub"]:
    """What a path of the config names. Raises InputError: plainly a local path, and nothing is there."""
    if "://" in path:
        return "url"
    local = Path(path)
    if local.is_file():
        return "file"
    if local.is_dir():
        return "folder"
    if extension_of(path) in EXTENSIONS or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise InputError(
            "there is no such file or folder", file=path, remedy=near(path) or "Check the config's data section"
        )
    return "hub"


def near(path: str) -> str:
    """A hint at names like this one beside it, or an empty string."""
    folder, name = Path(path).parent, Path(path).name
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    found = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"Near it: {', '.join(str(folder / other) for other in found)}" if found else ""


def bare_name(path: str) -> str:
    """The path in lower case, without the query of a URL."""
    return (path.partition("?")[0] if "://" in path else path).lower()


def extension_of(path: str) -> str:
    """The extension that tells the kind of a file; that of a compressed one is looked through, except on Parquet."""
    name = PurePosixPath(bare_name(path))
    if name.suffix not in PACKED:
        return name.suffix
    inner = PurePosixPath(name.stem).suffix
    return inner + name.suffix if inner == ".parquet" else inner
