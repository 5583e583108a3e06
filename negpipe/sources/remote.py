"""Local copies of remote files that are memory-mapped."""

from __future__ import annotations

import shutil
from pathlib import Path

from negpipe.engine.fingerprint import key
from negpipe.errors import InputError, NegpipeError
from negpipe.sources.identity import version
from negpipe.sources.places import extension_of, file_system
from negpipe.store.files import publish

_BLOCK = 2**20


def here(address: str, folder: Path) -> Path:
    """The local path of a file; a remote file is copied.

    Args:
        address: a path, or an address supported by fsspec.
        folder: for the copies; a changed file is fetched again and replaces the old copy.

    Raises:
        InputError: the remote file does not exist, or cannot be read.
    """
    if "://" not in address:
        return Path(address)
    name = key(address)
    copy = folder / f"{name}-{key(version(address))}{extension_of(address)}"
    if not copy.exists():
        try:
            filesystem, path = file_system(address)
            with filesystem.open(path, "rb", block_size=8 * _BLOCK) as source:
                publish(folder, copy.name, lambda file: shutil.copyfileobj(source, file, _BLOCK))
        except NegpipeError:
            raise
        except Exception as error:  # every file system has different errors
            problem = f"this address cannot be read ({error})"
            raise InputError(problem, file=address, remedy="Check it and the network") from None
        for old in folder.glob(f"{name}-*"):
            if old != copy:
                old.unlink(missing_ok=True)
    return copy
