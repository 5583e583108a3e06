"""Writes an export: text and Parquet files, optionally in shards, under the final name only when complete."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from negpipe.errors import ConfigError
from negpipe.store.files import growing

_GROUP_BYTES = 32 * 2**20
_GROUP_ROWS = 65536


@contextmanager
def published(out: Path, *, single: bool, force: bool) -> Iterator[Path]:
    """A temporary folder next to `out`; on success it, or with `single` its only file, is renamed to `out`.

    Raises:
        ConfigError: `out` exists and `force` is not set.
        StorageError: the file system rejected a write; existing output is kept.
    """
    if out.exists() and not force:
        raise ConfigError(f"--out {out} already exists: choose another path, or overwrite it with --force")
    with growing(out, single=single) as folder:
        yield folder


def shard_name(stem: str, suffix: str, number: int, shard_rows: int | None) -> str:
    """A file of a table: train.jsonl, or with shards train-00000.jsonl and so on."""
    return f"{stem}{suffix}" if shard_rows is None else f"{stem}-{number:05d}{suffix}"


class _Shards:
    """Counts rows into the files of one table."""

    def __init__(self, folder: Path, stem: str, suffix: str, shard_rows: int | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._stem, self._suffix, self._shard_rows = folder, stem, suffix, shard_rows
        self._number = 0
        self._in_shard = 0
        self.rows = 0

    def _next(self) -> Path:
        self._number += 1
        return self._folder / shard_name(self._stem, self._suffix, self._number - 1, self._shard_rows)

    @property
    def _room(self) -> int | None:
        """Rows that still fit in the open shard; None: any number."""
        return None if self._shard_rows is None else self._shard_rows - self._in_shard

    def _count(self, rows: int) -> None:
        self._in_shard += rows
        self.rows += rows


def as_json(objects: Iterable[Any]) -> Iterator[str]:
    """Each object as JSON on one line. NaN and Infinity raise ValueError."""
    return (json.dumps(value, ensure_ascii=False, allow_nan=False) for value in objects)


class TextFiles(_Shards):
    """Rows of UTF-8 text, one per line.

    Args:
        head: the start of every file; `joint` separates rows, `tail` is the end.
        compress: gzip, with reproducible bytes.
    """

    def __init__(
        self,
        folder: Path,
        stem: str,
        *,
        shard_rows: int | None,
        compress: bool,
        suffix: str = ".jsonl",
        head: str = "",
        joint: str = "\n",
        tail: str = "\n",
    ) -> None:
        super().__init__(folder, stem, suffix + (".gz" if compress else ""), shard_rows)
        self._compress, self._head, self._joint, self._tail = compress, head, joint, tail
        self._file: TextIO | None = None
        self._stack = ExitStack()

    def __enter__(self) -> TextFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._close()
        self._stack.close()

    def write(self, rows: Iterable[str]) -> None:
        for row in rows:
            if self._room == 0:
                self._close()
            file = self._file or self._open()
            file.write(self._joint if self._in_shard else self._head)
            file.write(row)
            self._count(1)

    def _open(self) -> TextIO:
        raw = self._stack.enter_context(self._next().open("wb"))
        packed = self._stack.enter_context(gzip.GzipFile("", "wb", 6, raw, mtime=0)) if self._compress else raw
        self._file = self._stack.enter_context(io.TextIOWrapper(packed, encoding="utf-8", newline=""))
        return self._file

    def _close(self) -> None:
        if self._file is not None:
            self._file.write(self._tail)
        self._stack.close()
        self._file = None
        self._in_shard = 0


class ParquetFiles(_Shards):
    """Tables of one schema in zstd Parquet, in row groups of some megabytes."""

    def __init__(self, folder: Path, stem: str, schema: pa.Schema, *, shard_rows: int | None) -> None:
        super().__init__(folder, stem, ".parquet", shard_rows)
        self._schema = schema
        self._writer: pq.ParquetWriter | None = None
        self._pending: list[pa.Table] = []

    def __enter__(self) -> ParquetFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush()
        self._close()

    def write(self, table: pa.Table) -> None:
        while table.num_rows:
            if self._room == 0:
                self._flush()
                self._close()
            piece = table.slice(0, self._room)
            table = table.slice(piece.num_rows)
            self._pending.append(piece)
            self._count(piece.num_rows)
            waiting = sum(piece.num_rows for piece in self._pending)
            if waiting >= _GROUP_ROWS or sum(piece.nbytes for piece in self._pending) >= _GROUP_BYTES:
                self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._next(), self._schema, compression="zstd", compression_level=1)
        table = pa.concat_tables(self._pending).cast(self._schema)
        self._writer.write_table(table, row_group_size=table.num_rows)
        self._pending = []

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None
        self._in_shard = 0
