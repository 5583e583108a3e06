"""Files elsewhere of which a copy is needed, because they are mapped."""

from __future__ import annotations

import shutil
from pathlib import Path

from negpipe.engine.fingerprint import key
from negpipe.errors import InputError, NegpipeError
from negpipe.sources.identity import version
from negpipe.sources.places import extension_of
from negpipe.store.files import publish

_BLOCK = 2**20


def here(address: str, folder: Path) -> Path:
    """Where this machine reads a file: a local one where it is, of a remote one a copy.

    Args:
        address: a path, or an address that fsspec knows.
        folder: of the copies; one that changed is fetched again, and takes the place of the old copy.

    Raises:
        InputError: the remote file is not there, or cannot be read.
    """
    if "://" not in address:
        return Path(address)
    import fsspec

    name = key(address)
    copy = folder / f"{name}-{key(version(address))}{extension_of(address)}"
    if not copy.exists():
        try:
            filesystem, path = fsspec.core.url_to_fs(address)
            with filesystem.open(path, "rb", block_size=8 * _BLOCK) as source:
                publish(folder, copy.name, lambda file: shutil.copyfileobj(source, file, _BLOCK))
        except NegpipeError:
            raise
        except Exception as error:  # every kind of file system has its own errors
            problem = f"this address cannot be read ({error})"
            raise InputError(problem, file=address, remedy="Check it and the network") from None
        for old in folder.glob(f"{name}-*"):
            if old != copy:
                old.unlink(missing_ok=True)
    return copy
