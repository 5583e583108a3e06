"""Resolves paths of the config: local or remote files, a local folder or a hub dataset."""

from __future__ import annotations

import difflib
import glob
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from negpipe.config.schema import Dialect
from negpipe.errors import InputError, beneath

PACKED = (".gz", ".bz2", ".xz", ".zst")
"""Extensions of compressed files."""
_ENDING = 8  # maximum characters of an extension, with its dot
EXTENSIONS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".trec", ".qrels", ".parquet")
ALL = "all"
"""All splits of a dataset, concatenated."""


class SourceTable(NamedTuple):
    """A table of a source: its location, and the format of its files.

    Attributes:
        paths: its consecutive files; or one folder or hub dataset.
        split: None: the only split of a dataset; ALL: all splits; not used for files.
        dialect: of CSV and TSV files.
        section: of the config, if the table has one, where `table` can set another dialect.
        inside: the key of a JSON object with the rows, in a list, or in an object as `key` and `value`.
        streaming: stream a dataset, without a local copy.
    """

    paths: tuple[str, ...]
    subset: str | None = None
    split: str | None = None
    revision: str | None = None
    dialect: Dialect = Dialect()
    section: str = ""
    inside: str | None = None
    streaming: bool = False

    @property
    def path(self) -> str:
        """The first of its paths, used as its name."""
        return self.paths[0]

    @property
    def name(self) -> str:
        """Its name in messages."""
        more = f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else ""
        of = ", ".join(filter(None, (self.inside, self.subset, self.split)))
        return f"{self.path}{more}" + (f" ({of})" if of else "")

    @property
    def kind(self) -> Literal["file", "folder", "url", "hub"]:
        """See `locate`."""
        return locate(self.path)


def paths_of(named: str | Sequence[str]) -> tuple[str, ...]:
    """Expand a path of the config, a pattern such as `docs-*.jsonl.gz`, or a list of them, in order.

    Raises InputError: a pattern without matches.
    """
    every = [named] if isinstance(named, str) else named
    return tuple(path for one in every for path in _expanded(str(Path(one).expanduser()) if one[:1] == "~" else one))


def _expanded(path: str) -> Iterator[str]:
    remote = "://" in path
    # In an address a question mark starts the query, and files on the web cannot be listed.
    patterns = "" if path.startswith(("http://", "https://")) else "*[" if remote else "*?["
    if not any(sign in path for sign in patterns) or Path(path).exists():
        yield path
        return
    if remote:
        filesystem, pattern = file_system(path)
        found = [filesystem.unstrip_protocol(name) for name in sorted(filesystem.glob(pattern))]
    else:
        names = glob.glob(path, recursive=True)  # noqa: PTH207 (Path.glob also finds hidden files)
        found = [name for name in sorted(names) if Path(name).is_file()]
    if not found:
        raise InputError(
            f"no file matches the pattern{beneath(path)}", file=path, remedy=near(path) or "Check the data section"
        )
    yield from found


def file_system(address: str) -> tuple[Any, str]:
    """The file system of a path or an address, of fsspec, and the path in it.

    Raises:
        InputError: it is not supported, or its package is not installed.
    """
    import fsspec

    scheme = address.partition("://")[0]
    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(address)
    except ImportError as error:
        remedy = "Run `pip install 'negpipe[s3]'`" if scheme in ("s3", "s3a") else str(error)
        problem = f"a package that reads {scheme}:// is not installed"
        raise InputError(problem, file=address, remedy=remedy) from None
    except ValueError as error:
        raise InputError("this type of address is not supported", file=address, remedy=str(error)) from None
    return found


def locate(path: str) -> Literal["file", "folder", "url", "hub"]:
    """The kind of a path of the config. Raises InputError: clearly a local path, and it does not exist."""
    if "://" in path:
        return "url"
    local = Path(path)
    if local.is_file():
        return "file"
    if local.is_dir():
        return "folder"
    # A name with an extension and without a namespace is not a hub dataset.
    typed_wrong = "/" not in path and 1 < len(Path(path).suffix) <= _ENDING and near(path)
    if extension_of(path) in EXTENSIONS or path.startswith((".", "/", "~")) or path.count("/") > 1 or typed_wrong:
        remedy = near(path) or "Check the config's data section"
        raise InputError(f"file or folder not found{beneath(path)}", file=path, remedy=remedy)
    return "hub"


def near(path: str) -> str:
    """A hint at similar names next to it, or an empty string."""
    folder, name = Path(path).parent, Path(path).name
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    found = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"Similar names: {', '.join(str(folder / other) for other in found)}" if found else ""


def bare_name(path: str) -> str:
    """The path in lower case, without the query of a URL."""
    return (path.partition("?")[0] if "://" in path else path).lower()


def extension_of(path: str) -> str:
    """The extension with the kind of a file, ignoring that of a compressed one, except for Parquet."""
    name = PurePosixPath(bare_name(path))
    if name.suffix not in PACKED:
        return name.suffix
    inner = PurePosixPath(name.stem).suffix
    return inner + name.suffix if inner == ".parquet" else inner
