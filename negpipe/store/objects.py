"""A `Store` in an S3 bucket, with copies of the files read on a local disk.

A file is written to the local disk, uploaded under its final key in one request or one completed multipart upload, and
kept as a copy. A file is downloaded once, and accepted only if it has the digest in its name. Mutable files are written
conditionally (If-None-Match, If-Match): of two writers, one learns that it came late. Nothing is renamed.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from negpipe.errors import ConfigError, DamagedError, VanishedError
from negpipe.store import files, lease, view
from negpipe.store.cache import OF_CONTENT, FileCache
from negpipe.store.s3 import Bucket
from negpipe.store.store import Shown, Store

A = TypeVar("A")
B = TypeVar("B")
_PROBE = f"{files.BOOKS}/probe-"
_FEW = 32  # up to so many files of a folder are requested one by one; for more, the folder is listed
_RIVALS = 4
_THREADS = 16  # concurrent requests, which only wait for S3


@dataclass(frozen=True)
class ObjectStore:
    """A `Store` under a prefix of a bucket.

    Attributes:
        bucket: the bucket.
        prefix: the prefix of its keys, without a trailing slash; may be empty.
        cache: copies of its parts on a local disk; files that only this machine needs are next to them.
    """

    bucket: Bucket
    prefix: str
    cache: FileCache

    verifies = True

    def __str__(self) -> str:
        return f"s3://{self.bucket.name}/{self.prefix}".rstrip("/")

    @property
    def scratch(self) -> Path:
        return self.cache.folder

    def put(
        self, folder: str, name: Callable[[str], str], write: Callable[[BinaryIO], None], needed: int | None = None
    ) -> files.Published:
        def upload(file: Path, final: str) -> None:
            self.bucket.upload(file, self._key(f"{folder}/{final}".lstrip("/")))

        made = files.publish(self.scratch / folder, name, write, needed, upload)
        if OF_CONTENT.fullmatch(made.name):
            self.cache.added(made.bytes)
        else:  # it may change in the bucket
            (self.scratch / folder / made.name).unlink(missing_ok=True)
        return made

    def path(self, name: str) -> Path:
        if not OF_CONTENT.fullmatch(name):
            return self.scratch / name
        return self.cache.find(name) or self._fetched(name)

    def size(self, name: str) -> int | None:
        return self.bucket.size(self._key(name))

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        wanted = {*names}
        folders = Counter(name.rpartition("/")[0] for name in wanted)
        found: dict[str, int] = {}
        for folder in (folder for folder, count in folders.items() if count > _FEW):
            found |= {name: size for name, size in self._listed(folder) if name in wanted}
        missing = sorted(wanted - found.keys())  # a listing may predate a file
        for name, size in zip(missing, each(self.size, missing), strict=True):
            if size is not None:
                found[name] = size
        return found

    def names(self, folder: str) -> list[str]:
        return sorted(name for name, _ in self._listed(folder))

    def strays(self, folder: str, known: Collection[str]) -> list[str]:
        ours = (name for name in self.names(folder) if OF_CONTENT.fullmatch(name) or name.startswith(_PROBE))
        return [name for name in ours if name not in known]

    def read(self, name: str) -> bytes | None:
        found = self.bucket.get(self._key(name))
        return None if found is None else found[0]

    def reads(self, names: Iterable[str]) -> dict[str, bytes]:
        wanted = [*names]
        return {
            name: content for name, content in zip(wanted, each(self.read, wanted), strict=True) if content is not None
        }

    def replace(self, name: str, content: bytes, expected: bytes | None) -> bool:
        key = self._key(name)
        if expected is None:
            # Our own write may be refused too, if its answer was lost and the request was repeated.
            return self.bucket.put(key, content, IfNoneMatch="*") or self.read(name) == content
        there = self.bucket.get(key)
        return there is not None and there[0] == expected and self._put_over(key, content, there) is not None

    def delete(self, name: str) -> None:
        self.bucket.delete(self._key(name))
        if OF_CONTENT.fullmatch(name):
            (self.scratch / name).unlink(missing_ok=True)

    def digest(self, name: str) -> str | None:
        copy, value = self.scratch / name, hashlib.sha256()
        # A damaged copy is damage, whatever the bucket has: parts may have been made from it.
        if (of_content := OF_CONTENT.fullmatch(name)) and copy.is_file():
            copied = files.file_digest(copy)
            if not copied.startswith(of_content[1]):
                return copied
        return None if self.bucket.stream(self._key(name), value.update) is None else value.hexdigest()

    def lock(self, name: str, patience: float = 0.0) -> AbstractContextManager[None]:
        return lease.held(self, name.rpartition("/")[2], wait=patience)

    def check_room(self, needed: Mapping[str, int], what: str, remedy: str) -> None:
        """A bucket is unlimited; a lack of local disk is detected per file, see `put`."""

    def show(self, name: str, what: Shown, version: str, parts: Store, old: Callable[[], Collection[str]]) -> None:
        wanted, there = _pointer(what, version), self.read(_pointing(name))
        if wanted is None:
            if there is not None:
                self.delete(_pointing(name))
        elif wanted != there and not self.replace(_pointing(name), wanted, there):
            raise VanishedError(f"{self}/{_pointing(name)}: another process changed it: run the command again")

    def shows(self, name: str, what: Shown, version: str, parts: Store) -> bool:
        return self.read(_pointing(name)) == _pointer(what, version)

    def entries(self, name: str) -> list[str]:
        return [*self._shown(name).values()]

    def folder(self, name: str) -> Path:
        shown = {entry: self.path(path) for entry, path in self._shown(name).items()}
        version = hashlib.sha256(files.json_bytes(self._shown(name))).hexdigest()[:16]
        view.show(self.scratch, name, shown, version, tuple)
        return self.scratch / name

    def place(self, name: str) -> str:
        return f"{self}/{_pointing(name)}"

    def _shown(self, name: str) -> dict[str, str]:
        shown: dict[str, str] = json.loads(self.read(_pointing(name)) or b"{}").get("files", {})
        return shown

    def _put_over(self, key: str, content: bytes, there: tuple[bytes, str]) -> str | None:
        """Write an object that is still what was found there.

        Returns:
            its tag, in the form that this service compares; None if the object has changed, or no form is accepted.
        """
        # HTTP has tags in quotes, and some services insist on them. Ceph answers with them, but compares without.
        for tag in (there[1], there[1].strip('"')):
            if self.bucket.put(key, content, IfMatch=tag):
                return tag
            now = self.bucket.get(key)
            if now != there:  # by us, if an answer was lost
                return tag if now is not None and now[0] == content else None
        return None

    def check_conditions(self) -> None:
        """Check that conditional writes are conditional here.

        Of several concurrent ones only one may win; the right tag must be accepted, an outdated one refused.

        Raises:
            ConfigError: they are not; two drivers would not notice each other.
        """
        name = f"{_PROBE}{uuid.uuid4().hex}"
        won = each(lambda number: self.replace(name, str(number).encode(), None), range(_RIVALS))
        try:
            there = self.bucket.get(self._key(name))
            tag = self._put_over(self._key(name), b"", there) if there else None
            if sum(won) != 1:
                missing = "If-None-Match"
            elif tag is None or self.bucket.put(self._key(name), b"", IfMatch=tag):  # the second time, it is outdated
                missing = "If-Match"
            else:
                return
        finally:
            self.delete(name)
        raise ConfigError(
            f"run_dir: {self}: this service does not support conditional writes ({missing}), so two drivers could both"
            " write a manifest: use one that does, such as AWS, or a run_dir on a disk"
        )

    def _fetched(self, name: str) -> Path:
        """A new copy of a file; if it is not in the bucket, the path where it would be."""
        copy = self.scratch / name
        wanted = OF_CONTENT.fullmatch(name)
        assert wanted is not None

        def checked(digest: str) -> str:
            if not digest.startswith(wanted[1]):
                raise DamagedError(
                    f"{self}/{name} has changed since it was written. Run `negpipe mine CONFIG --repair` to"
                    " recompute damaged parts and everything that may derive from them"
                )
            return copy.name

        def write(file: BinaryIO) -> None:
            if self.bucket.stream(self._key(name), file.write, lambda size: files.fits(copy.parent, size)) is None:
                raise LookupError(name)

        with suppress(LookupError):
            self.cache.added(files.publish(copy.parent, checked, write).bytes)
        return copy

    def _listed(self, folder: str) -> list[tuple[str, int]]:
        start = len(self._key(""))
        return [(key[start:], size) for key, size in self.bucket.listed(self._key(f"{folder}/"))]

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name


def each(function: Callable[[A], B], items: Iterable[A]) -> list[B]:
    """The results for all items, several computed at a time."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return [*pool.map(function, items)]


def _pointing(name: str) -> str:
    return f"{name}.json"


def _pointer(what: Shown, version: str) -> bytes | None:
    """The pointer from a name to the parts that it shows."""
    if what is None:
        return None
    return files.json_bytes({"file": what} if isinstance(what, str) else {"version": version, "files": {**what}})
