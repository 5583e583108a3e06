"""What is on disk: parts with their sidecars, and one manifest a complete stage.

A sidecar is written after its part, a manifest after all its sidecars: what they name existed when
they were written. Done is what the disk says; every reader checks it again. Both carry a digest of themselves.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from negpipe.engine.fingerprint import digest
from negpipe.errors import DamagedError
from negpipe.store.files import BOOKS, file_digest, write_json

_RECORD = re.compile(r"[0-9a-f]{16}\.json")
_CHECKPOINT = re.compile(r"[0-9a-f]{16}(-[0-9a-f]{12})*(-\d+)?\.npz")
OTHER_CONTENT = "has other content than was written"
Book = TypeVar("Book", bound=BaseModel)


class File(BaseModel):
    """A data file: path relative to the run directory, size in bytes, sha256."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str
    bytes: int
    digest: str

    @field_validator("path")
    @classmethod
    def _inside(cls, path: str) -> str:
        path.encode()  # half a surrogate pair is a ValueError too
        parts = PurePosixPath(path).parts
        if not 1 <= len(parts) <= 2 or path.startswith("/") or ".." in parts or "\0" in path:
            raise ValueError("not a file of the run directory or of a folder in it")
        return path

    def problem(self, run_dir: Path, *, full: bool = False) -> str | None:
        """What is wrong with the file on disk, or None. `full` reads it and compares its digest."""
        path = run_dir / self.path
        try:
            size = path.stat().st_size
        except OSError:
            return f"{self.path} is missing"
        if size != self.bytes:
            return f"{self.path} has {size:,} bytes, {self.bytes:,} were written"
        if full and file_digest(path) != self.digest:
            return f"{self.path} {OTHER_CONTENT}"
        return None


class Part(BaseModel):
    """One task's output, as its sidecar records it.

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
    def path(self) -> str:
        return self.files[0].path

    def identity(self) -> list[Any]:
        """What another stage may key on."""
        return [self.kind, self.rows, self.files[0].digest]


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
    """Reads and writes the sidecars and the manifest of one stage of a run."""

    def __init__(self, run_dir: Path, stage: str) -> None:
        self.run_dir = run_dir
        self.folder = run_dir / BOOKS / stage
        self.manifest_path = self.folder / "manifest.json"

    def part(self, key: str) -> Part | None:
        """The finished part of a key, or None: no sidecar, an unreadable one, or one whose files are gone or cut."""
        part = self.record(key)
        if part is None or any(file.problem(self.run_dir) for file in part.files):
            return None
        return part

    def record(self, key: str) -> Part | None:
        """What the sidecar of a key says, or None: there is none, or not as it was written."""
        try:
            part = _read(self.folder / f"{key}.json", Part)
        except (OSError, ValueError):
            return None
        return part if part.key == key else None

    def write_part(self, part: Part) -> None:
        _write(self.folder / f"{part.key}.json", part)

    def sidecars(self) -> list[Path]:
        """The files of all parts' records, current or superseded, readable or not."""
        return [path for path in sorted(self.folder.glob("*.json")) if _RECORD.fullmatch(path.name)]

    def checkpoints(self) -> list[Path]:
        """What long searches of any part have left to go on from."""
        return [path for path in sorted(self.folder.glob("*.npz")) if _CHECKPOINT.fullmatch(path.name)]

    def parts(self) -> Iterable[Part]:
        """Every part with a readable sidecar, current or superseded."""
        for path in self.sidecars():
            if part := self.part(path.stem):
                yield part

    def manifest(self) -> Manifest | None:
        """The manifest, or None where the stage never completed.

        Raises:
            DamagedError: there is one and it cannot be read.
        """
        try:
            return _read(self.manifest_path, Manifest)
        except FileNotFoundError:
            return None
        except ValueError as error:
            problem = f"{error.error_count()} problems" if isinstance(error, ValidationError) else str(error)
            raise DamagedError(
                f"{self.manifest_path} is not a manifest ({problem}):"
                " delete it and run the stage again, finished parts are reused"
            ) from None

    def write_manifest(self, manifest: Manifest) -> None:
        _write(self.manifest_path, manifest)


def _write(path: Path, book: BaseModel) -> None:
    value = book.model_dump(mode="json")
    write_json(path, value | {"digest": _seal(value)})


def _read(path: Path, kind: type[Book]) -> Book:
    """Raises ValueError: it is not what was written. One without a digest was written before there were any."""
    try:
        value = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if isinstance(value, dict) and "digest" in value and value.pop("digest") != _seal(value):
        raise ValueError("its content is not what was written")
    return kind.model_validate(value)


def _seal(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
