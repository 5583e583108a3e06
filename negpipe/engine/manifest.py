"""Parts with their records, and one manifest per complete stage.

A record is written after its part, a manifest after all its records: the files they name existed when they were
written. The store decides what is done; every reader checks it again. Records and manifests contain their own digest.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from negpipe.engine.fingerprint import digest
from negpipe.errors import DamagedError, count_of
from negpipe.store import claims
from negpipe.store.files import BOOKS, remove, write_all
from negpipe.store.store import LocalStore, Store

_RECORD = re.compile(r"[0-9a-f]{16}\.json")
_CHECKPOINT = re.compile(r"[0-9a-f]{16}(-[0-9a-f]{12})*(-\d+)?\.npz")
_AGREED = ".versions"
_ARRAYS = ".arrays"
OTHER_CONTENT = "has changed since it was written"
Book = TypeVar("Book", bound=BaseModel)


class File(BaseModel):
    """A data file: name in the store, size in bytes, sha256, and its role in its part.

    `role` is a word of the part's stage, such as "ledger"; several files of one role are "rows-00000", "rows-00001".
    Records of the first edition have no roles. An `aside` file holds circumstances and enters no identity.
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
        path.encode()  # a lone surrogate raises ValueError too
        parts = path.split("/")
        if len(parts) > 2 or not {"", ".", ".."}.isdisjoint(parts) or "\0" in path:
            raise ValueError("not a file of the store or of a folder in it")
        return path

    def problem(self, store: Store, *, full: bool = False) -> str | None:
        """What is wrong with the file in the store, or None. `full` also compares its digest."""
        if problem := self.misfit(store.size(self.path)):
            return problem
        if full and store.digest(self.path) != self.digest:
            return f"{self.path} {OTHER_CONTENT}"
        return None

    def misfit(self, size: int | None) -> str | None:
        """What is wrong with a file of `size` bytes (None: missing); None: nothing."""
        if size is None:
            return f"{self.path} is missing"
        if size != self.bytes:
            return f"{self.path} has {size:,} bytes, expected {self.bytes:,}"
        return None


class Part(BaseModel):
    """One task's output, as recorded.

    `meta` is content (counts, digests that the next stage's keys use); `provenance` is circumstance (process,
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
        """Whether its files cannot be distinguished: a record of the first edition with several files."""
        return len(self.files) > 1 and not all(file.role for file in self.files)

    def file(self, role: str) -> File:
        """The file of a role, or the only file.

        Raises:
            DamagedError: the record has no such file.
        """
        found = self.all(role) or (list(self.files) if len(self.files) == 1 else [])
        if len(found) != 1:
            raise DamagedError(
                f"the record of part {self.key} names {count_of(len(found), 'file')} as its {role}:"
                " run `negpipe mine CONFIG --repair`"
            )
        return found[0]

    def all(self, role: str) -> list[File]:
        """The files of a role, in their order."""
        found = [file for file in self.files if file.role == role or file.role.startswith(f"{role}-")]
        return sorted(found, key=lambda file: file.role)

    def identity(self) -> list[Any]:
        """What another stage's keys may use; independent of the order of files."""
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
    """The part records of one stage (in the store) and its manifest (in the run directory).

    Args:
        run: the store of the run directory, or its folder.
        stage: the stage's name.
        store: the store of parts and records; None: the run directory.
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
        """The finished part of a key; None if record or files are missing, unreadable or cut off."""
        part = self.record(key)
        return None if part is None else self.complete({key: part}).get(key)

    def found(self, keys: Collection[str]) -> dict[str, Part]:
        """The finished parts of many keys, as by `part`; where listings are delayed, some may be missing."""
        there = {*self.recorded()}
        return self.complete(self._records([key for key in dict.fromkeys(keys) if key in there]))

    def record(self, key: str) -> Part | None:
        """The record of a key; None if it is missing or has changed since it was written."""
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

    def complete(self, parts: Mapping[str, Part]) -> dict[str, Part]:
        """Those whose files can be distinguished and exist with all their bytes."""
        known = {key: part for key, part in parts.items() if not part.lacks_roles}
        sizes = self.store.sizes(file.path for part in known.values() for file in part.files)
        return {
            key: part
            for key, part in known.items()
            if not any(file.misfit(sizes.get(file.path)) for file in part.files)
        }

    def name(self, key: str) -> str:
        """The store's name of the record of a key."""
        return f"{self.folder}/{key}.json"

    def write_part(self, part: Part) -> None:
        content = _sealed(part)
        name = f"{part.key}.json"
        self.store.put(self.folder, lambda _: name, lambda file: write_all(file, content), len(content))

    def begun(self, key: str) -> Path:
        """A folder for unfinished work that a run of this key may resume; deletes those of other keys."""
        folder = self.run.scratch / self.folder / f"begun-{key}"
        self.drop_begun(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def drop_begun(self, but: Path | None = None) -> None:
        """Delete unfinished work: the stage is complete."""
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
        """Checkpoints of long searches, as named in the scratch folder."""
        names = LocalStore(self.store.scratch).names(self.folder)
        return [name for name in names if _CHECKPOINT.fullmatch(name.rpartition("/")[2])]

    def agreed(self, key: str) -> str:
        """The store's name of the file with the library versions that the shards of this key started with."""
        return f"{self.folder}/{key}{_AGREED}"

    def drop_agreed(self, key: str = "") -> None:
        """Let the shards of this key, or of every key, start with other versions."""
        names = [self.agreed(key)] if key else [name for name in self.of_shards() if name.endswith(_AGREED)]
        for name in names:
            self.store.delete(name)

    def arrays(self, key: str) -> str:
        """The run store's name of the file with the arrays that run the shards of this key."""
        return f"{self.folder}/{key}{_ARRAYS}"

    def of_shards(self) -> list[str]:
        """Files of running shards, and leftovers of killed ones, as named in the store."""
        return [name for name in self.store.names(self.folder) if name.endswith((claims.SUFFIX, _AGREED, _ARRAYS))]

    def records(self, but: Collection[str] = ()) -> Iterator[Part]:
        """Every readable record, without those of some keys."""
        yield from self._records([key for key in self.recorded() if key not in but]).values()

    def parts(self) -> Iterator[Part]:
        """Every existing part, current or superseded."""
        yield from self.complete(self._records(self.recorded())).values()

    def manifest(self) -> Manifest | None:
        """The manifest, or None if the stage never completed.

        Raises:
            DamagedError: it exists but cannot be read.
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
        """The stored bytes of the manifest, to pass to `write_manifest` as `expected`."""
        return self.run.read(self._manifest)

    def write_manifest(self, manifest: Manifest, expected: bytes | None) -> bool:
        """Write the manifest if it still is `expected`; returns whether it was written."""
        return self.run.replace(self._manifest, _sealed(manifest), expected)

    def drop_manifest(self) -> None:
        """Delete the manifest, as if the stage had never completed; its parts stay."""
        self.run.delete(self._manifest)


def _sealed(book: BaseModel) -> bytes:
    """On one line: indenting takes four times as long in Python, and there may be ten thousand parts."""
    value = book.model_dump(mode="json")
    return (json.dumps(value | {"digest": _seal(value)}, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _parsed(content: bytes, kind: type[Book]) -> Book:
    """Raises ValueError: it has changed since it was written. The first edition wrote no digests, and no roles."""
    try:
        value = json.loads(content)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if isinstance(value, dict):
        seal = value.pop("digest", None)
        if seal != _seal(value) and (seal is not None or b'"role"' in content):
            raise ValueError("its content has changed since it was written")
    return kind.model_validate(value)


def _seal(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
