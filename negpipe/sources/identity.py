"""What a source is, without reading it: its local files, and the identity of everything that is elsewhere.

The two complete each other: a config may join a local corpus to queries from the hub.
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
from negpipe.sources.places import locate

_log = logging.getLogger(__name__)
_VERSION_KEYS = ("ETag", "etag", "Content-MD5", "md5", "checksum", "LastModified", "Last-Modified", "last_modified")
_WEAK_KEYS = ("mtime", "created", "size")


def files(data: schema.Data) -> list[list[str]]:
    """The local files of each table of the source, absolute, in reading order; of a dataset folder every file.

    Raises InputError: a local path that does not exist.
    """
    return [[file for path in table.paths for file in _local(path)] for table, _ in tables_of(recognized(data))]


def _local(path: str) -> list[str]:
    kind = locate(path)
    if kind == "file":
        return [str(Path(path).absolute())]
    return [str(file) for file in hub.files(Path(path).absolute())] if kind == "folder" else []


def revision(data: schema.Data) -> str:
    """The identity of everything that is not local: hub commits and the versions of remote files; "" if all is.

    Raises:
        InputError: not found, or it cannot be asked for.
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
    """What tells one content of a remote file from another, without reading it.

    Raises:
        InputError: it is not there, or cannot be asked for.
    """
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
        info = filesystem.info(path)
    except FileNotFoundError:
        raise InputError("there is no such file", file=url, remedy="Check the address") from None
    except Exception as error:  # every kind of file system has its own errors, and missing drivers
        problem = f"this address cannot be read ({error})"
        raise InputError(problem, file=url, remedy="Check it and the network") from None
    known = {key: info[key] for key in (*_VERSION_KEYS, *_WEAK_KEYS) if info.get(key) is not None}
    if known.keys() <= {"size"}:
        _log.warning("%s: only its size tells versions apart; a change of the same size goes unnoticed", url)
        known["url"] = url  # what its query asks for may be all there is to go by
    return ",".join(f"{key}={value}" for key, value in known.items())
