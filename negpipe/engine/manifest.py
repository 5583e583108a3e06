"""What is there: parts with their records, and one manifest a complete stage.

A record is written after its part, a manifest after all its records: what they name existed when
they were written. Done is what the store says; every reader checks it again. Both carry a digest of themselves.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from negpipe.engine.fingerprint import digest
from negpipe.errors import DamagedError
from negpipe.store import claims
from negpipe.store.files import BOOKS, json_bytes, remove, write_all
from negpipe.store.store import LocalStore, Store

_RECORD = re.compile(r"[0-9a-f]{16}\.json")
_CHECKPOINT = re.compile(r"[0-9a-f]{16}(-[0-9a-f]{12})*(-\d+)?\.npz")
_AGREED = ".versions"
_ARRAYS = ".arrays"
OTHER_CONTENT = "has changed since it was written"
Book = TypeVar("Book", bound=BaseModel)


class File(BaseModel):
    """A data file: name in the store, size in bytes, sha256, and what it is to its part.

    `role` is one of the part's own words, "ledger"; of several files in one role "rows-00000", "rows-00001". Records of
    the first edition have none. What is `aside` says something of circumstance and is in no identity.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str
    bytes: int
    digest: str
    role: str = ""
    aside: bool = False

    @field_validator("path")
    @classmethod
    def _inside(cls, path: str) -> str:
        path.encode()  # half a surrogate pair is a ValueError too
        parts = PurePosixPath(path).parts
        if not 1 <= len(parts) <= 2 or path.startswith("/") or ".." in parts or "\0" in path:
            raise ValueError("not a file of the store or of a folder in it")
        return path

    def problem(self, store: Store, *, full: bool = False) -> str | None:
        """What is wrong with the file in the store, or None. `full` reads it and compares its digest."""
        if problem := self.misfit(store.size(self.path)):
            return problem
        if full and store.digest(self.path) != self.digest:
            return f"{self.path} {OTHER_CONTENT}"
        return None

    def misfit(self, size: int | None) -> str | None:
        """What is wrong with a file of so many bytes, or with there being none; None: nothing."""
        if size is None:
            return f"{self.path} is missing"
        if size != self.bytes:
            return f"{self.path} has {size:,} bytes, expected {self.bytes:,}"
        return None


class Part(BaseModel):
    """One task's output, as its record says.

    `meta` is content (counts, digests the next stage keys on); `provenance` is circumstance (process,
    host, versions, seconds) and never part of an identity.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    key: str
    kind: str
    rows: int
    files: tuple[File, ...] = Field(min_length=1)
    meta: dict[str, Any] = {}
    provenance: dict[str, Any] = {}

    @property
    def lacks_roles(self) -> bool:
        """Whether nobody can tell its files apart: a record of the first edition with several of them."""
        return len(self.files) > 1 and not all(file.role for file in self.files)

    def file(self, role: str) -> File:
        """The file of a role, or the only one there is.

        Raises:
            DamagedError: the record names none.
        """
        found = self.all(role) or (list(self.files) if len(self.files) == 1 else [])
        if len(found) != 1:
            raise DamagedError(
                f"the record of part {self.key} names {len(found)} files as its {role}:"
                " run `negpipe mine CONFIG --repair`"
            )
        return found[0]

    def all(self, role: str) -> list[File]:
        """The files of a role, in their order."""
        found = [file for file in self.files if file.role == role or file.role.startswith(f"{role}-")]
        return sorted(found, key=lambda file: file.role)

    def identity(self) -> list[Any]:
        """What another stage may key on: nothing of it depends on the order of files."""
        content = sorted((file.role, file.digest) for file in self.files if not file.aside)
        return [self.kind, self.rows, *(digest for _, digest in content)]


class Manifest(BaseModel):
    """The parts, in order, that make up a stage's current output."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    stage: str
    version: int
    key: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    parts: tuple[Part, ...]
    stats: dict[str, Any] = {}
    provenance: dict[str, Any] = {}

    @cached_property
    def digest(self) -> str:
        """Identity of the content: the parts' content in order."""
        return digest([part.identity() for part in self.parts])

    def of_kind(self, kind: str) -> list[Part]:
        return [part for part in self.parts if part.kind == kind]


class Books:
    """The records of one stage's parts, in the store, and its manifest, in the run directory.

    Args:
        run: the store of the run directory, or the folder.
        stage: the stage's name.
        store: where parts and their records are; None: in the run directory.
    """

    def __init__(self, run: Path | Store, stage: str, store: Store | None = None) -> None:
        self.stage = stage
        self.run: Store = LocalStore(run) if isinstance(run, Path) else run
        self.store: Store = store or self.run
        self.folder = f"{BOOKS}/{stage}"
        self._manifest = f"{self.folder}/manifest.json"

    @property
    def manifest_path(self) -> Path:
        return self.run.scratch / self._manifest

    def part(self, key: str) -> Part | None:
        """The finished part of a key, or None: no record, an unreadable one, or one whose files are gone or cut."""
        part = self.record(key)
        return None if part is None else self._whole({key: part}).get(key)

    def found(self, keys: Collection[str]) -> dict[str, Part]:
        """The finished parts of many keys, as `part` has them; where listings are late, some may be missing."""
        there = {*self.recorded()}
        return self._whole(self._records([key for key in dict.fromkeys(keys) if key in there]))

    def record(self, key: str) -> Part | None:
        """What the record of a key says, or None: there is none, or not as it was written."""
        return self._records([key]).get(key)

    def _records(self, keys: Sequence[str]) -> dict[str, Part]:
        contents = self.store.reads(map(self.name, keys))
        found = {}
        for key in keys:
            with suppress(ValueError):
                content = contents.get(self.name(key))
                part = None if content is None else _parsed(content, Part)
                if part and part.key == key:
                    found[key] = part
        return found

    def _whole(self, parts: Mapping[str, Part]) -> dict[str, Part]:
        """Those whose files can be told apart and are there with all their bytes."""
        known = {key: part for key, part in parts.items() if not part.lacks_roles}
        sizes = self.store.sizes(file.path for part in known.values() for file in part.files)
        return {
            key: part
            for key, part in known.items()
            if not any(file.misfit(sizes.get(file.path)) for file in part.files)
        }

    def name(self, key: str) -> str:
        """The record of a key, as the store calls it."""
        return f"{self.folder}/{key}.json"

    def write_part(self, part: Part) -> None:
        content = _sealed(part)
        name = f"{part.key}.json"
        self.store.put(self.folder, lambda _: name, lambda file: write_all(file, content), len(content))

    def begun(self, key: str) -> Path:
        """A folder for what a run of this key has begun and may go on from; that of any other key is gone."""
        folder = self.run.scratch / self.folder / f"begun-{key}"
        self.drop_begun(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def drop_begun(self, but: Path | None = None) -> None:
        """Delete what was begun: the stage is complete."""
        for folder in (self.run.scratch / self.folder).glob("begun-*"):
            if folder != but:
                remove(folder)

    def forget(self, key: str) -> None:
        """Delete the record of a key; the files stay."""
        self.store.delete(self.name(key))

    def recorded(self) -> list[str]:
        """Keys of all parts' records, current or superseded, readable or not."""
        names = (name.rpartition("/")[2] for name in self.store.names(self.folder))
        return [name.removesuffix(".json") for name in names if _RECORD.fullmatch(name)]

    def checkpoints(self) -> list[str]:
        """What long searches of any part have left to go on from, as the scratch folder calls it."""
        names = LocalStore(self.store.scratch).names(self.folder)
        return [name for name in names if _CHECKPOINT.fullmatch(name.rpartition("/")[2])]

    def agreed(self, key: str) -> str:
        """With which versions of libraries the shards of a stage of this key began, as the store calls it."""
        return f"{self.folder}/{key}{_AGREED}"

    def drop_agreed(self, key: str = "") -> None:
        """Let the shards of a stage of this key, or of every one, begin with other versions."""
        for name in self.of_shards():
            if name.endswith(f"{key}{_AGREED}"):
                self.store.delete(name)

    def arrays(self, key: str) -> str:
        """Which arrays make the shards of a stage of this key, as the store of the run directory calls it."""
        return f"{self.folder}/{key}{_ARRAYS}"

    def of_shards(self) -> list[str]:
        """What shards that are at work need, and those that were killed left, as the store calls it."""
        return [name for name in self.store.names(self.folder) if name.endswith((claims.SUFFIX, _AGREED, _ARRAYS))]

    def records(self) -> Iterator[Part]:
        """What every readable record says."""
        yield from self._records(self.recorded()).values()

    def parts(self) -> Iterator[Part]:
        """Every part that is there, current or superseded."""
        yield from self._whole(self._records(self.recorded())).values()

    def manifest(self) -> Manifest | None:
        """The manifest, or None where the stage never completed.

        Raises:
            DamagedError: there is one and it cannot be read.
        """
        content = self.content()
        if content is None:
            return None
        try:
            return _parsed(content, Manifest)
        except ValueError as error:
            problem = f"{error.error_count()} problems" if isinstance(error, ValidationError) else str(error)
            raise DamagedError(
                f"{self.run}/{self._manifest} is not a manifest ({problem}):"
                " delete it and run the stage again; finished parts are reused"
            ) from None

    def content(self) -> bytes | None:
        """The manifest as it is stored, for `write_manifest` to expect."""
        return self.run.read(self._manifest)

    def write_manifest(self, manifest: Manifest, expected: bytes | None) -> bool:
        """Write the manifest if nobody did since it was `expected`; returns whether it was written."""
        return self.run.replace(self._manifest, _sealed(manifest), expected)

    def drop_manifest(self) -> None:
        """Make the stage one that never completed; its parts stay."""
        self.run.delete(self._manifest)


def _sealed(book: BaseModel) -> bytes:
    value = book.model_dump(mode="json")
    return json_bytes(value | {"digest": _seal(value)})


def _parsed(content: bytes, kind: type[Book]) -> Book:
    """Raises ValueError: it is not what was written. One without a digest was written before there were any."""
    try:
        value = json.loads(content)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if isinstance(value, dict) and "digest" in value and value.pop("digest") != _seal(value):
        raise ValueError("its content has changed since it was written")
    return kind.model_validate(value)


def _seal(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
