"""What is on disk: parts with their sidecars, and one manifest a complete stage.

A sidecar is written after its part, a manifest after all its sidecars: what they name existed when
they were written. Done is what the disk says; every reader checks it again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from negpipe.errors import DamagedError
from negpipe.fingerprint import digest, file_digest
from negpipe.storage import write_json

BOOKS = ".negpipe"


class File(BaseModel):
    """A data file: path relative to the run directory, size in bytes, sha256."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str
    bytes: int
    digest: str

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
            return f"{self.path} has other content than was written"
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
    files: tuple[File, ...]
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
        try:
            part = Part.model_validate_json((self.folder / f"{key}.json").read_bytes())
        except (OSError, ValidationError):
            return None
        if part.key != key or any(file.problem(self.run_dir) for file in part.files):
            return None
        return part

    def write_part(self, part: Part) -> None:
        write_json(self.folder / f"{part.key}.json", part.model_dump(mode="json"))

    def parts(self) -> Iterable[Part]:
        """Every part with a readable sidecar, current or superseded."""
        for path in sorted(self.folder.glob("*.json")):
            part = None if path == self.manifest_path else self.part(path.stem)
            if part:
                yield part

    def manifest(self) -> Manifest | None:
        """The manifest, or None where the stage never completed.

        Raises:
            DamagedError: there is one and it cannot be read.
        """
        try:
            data = self.manifest_path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            return Manifest.model_validate_json(data)
        except ValidationError as error:
            raise DamagedError(
                f"{self.manifest_path} is not a manifest ({error.error_count()} problems):"
                " delete it and run the stage again, finished parts are reused"
            ) from None

    def write_manifest(self, manifest: Manifest) -> None:
        write_json(self.manifest_path, json.loads(manifest.model_dump_json()))
