"""Identifies a source without reading it: its local files, and the identity of everything remote.

Both are needed: a config may combine a local corpus with queries from the hub.
"""

from __future__ import annotations

import logging
from pathlib import Path

from negpipe.config import schema
from negpipe.errors import InputError
from negpipe.redaction import redact
from negpipe.sources import hub
from negpipe.sources.guess import recognized
from negpipe.sources.layouts import tables_of
from negpipe.sources.places import file_system, locate

_log = logging.getLogger(__name__)
_VERSION_KEYS = ("ETag", "etag", "Content-MD5", "md5", "checksum", "LastModified", "Last-Modified", "last_modified")
_WEAK_KEYS = ("mtime", "created", "size")


def files(data: schema.Data) -> list[list[str]]:
    """The local files of each table of the source, absolute, in reading order; for a dataset folder, every file.

    Raises InputError: a local path that does not exist.
    """
    return [[file for path in table.paths for file in _local(path)] for table, _ in tables_of(recognized(data))]


def _local(path: str) -> list[str]:
    kind = locate(path)
    if kind == "file":
        return [str(Path(path).absolute())]
    return [str(file) for file in hub.files(Path(path).absolute())] if kind == "folder" else []


def revision(data: schema.Data) -> str:
    """The identity of everything remote: hub commits and versions of remote files; "" if everything is local.

    Raises:
        InputError: something is not found, or cannot be queried.
    """
    names = set()
    for table, _ in tables_of(recognized(data)):
        for path in table.paths:
            kind = locate(path)
            if kind == "hub":
                commit = hub.commit(path, table.subset, table.revision)
                names.add(f"{path}@{commit} ({table.subset}, {table.split})")
            elif kind == "url":
                names.add(f"{redact(path)}@{version(path)}")
    return "; ".join(sorted(names))


def version(url: str) -> str:
    """The version of a remote file's content, without reading it.

    Raises:
        InputError: the file does not exist, or cannot be queried.
    """
    filesystem, path = file_system(url)
    try:
        info = filesystem.info(path)
    except FileNotFoundError:
        raise InputError("file not found", file=url, remedy="Check the address") from None
    except Exception as error:  # every file system has different errors
        problem = f"this address cannot be read ({error})"
        raise InputError(problem, file=url, remedy="Check it and the network") from None
    known = {key: info[key] for key in (*_VERSION_KEYS, *_WEAK_KEYS) if info.get(key) is not None}
    if known.keys() <= {"size"}:
        _log.warning("%s: versions are distinguished by size only; a change of the same size goes unnoticed", url)
        known["url"] = url  # its query may be the only other distinction
    return ",".join(f"{key}={value}" for key, value in known.items())
