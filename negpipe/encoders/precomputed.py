"""Precomputed vectors: .npy or Parquet, by source row or by id, read without loading the file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from negpipe.data.arrays import Floats, Hashes, Ints
from negpipe.data.npy import BROKEN
from negpipe.data.texts import hashes
from negpipe.engine.budget import Budget
from negpipe.errors import InputError, count_of
from negpipe.store import mapped

_COMPARED = 2**22  # values of repeated vectors compared at a time


class VectorFile:
    """One vector per source row, or vectors with an id column.

    Args:
        path: `.npy` of shape (n, d), or `.parquet` with one list column of numbers and, to match rows by
            id, a text or integer column; an id may be repeated with the same vector.
        rows: rows of the source; without ids, the file must have the same number.
        setting: the config key of the file, for errors.
        budget: for a row group of a Parquet file.

    Raises:
        ConfigError: a row group of a Parquet file, or its ids, exceed the budget.
        InputError: not such a file, a different number of rows, or an id with two vectors.
    """

    def __init__(self, path: Path, rows: int, setting: str, budget: Budget) -> None:
        self.path, self._wrong = path, partial(InputError, file=str(path), field=setting)
        self._by_id: tuple[Hashes, Ints] | None = None
        self._matrix = _opened(path, setting, budget)
        if isinstance(self._matrix, _Parquet) and self._matrix.label is not None:
            hashed = np.concatenate([np.empty(0, np.uint64), *map(hashes, self._matrix.ids())])
            order = np.argsort(hashed, kind="stable").astype(np.int64)
            self._by_id = hashed[order], order
            self._check_repeats(self._matrix.label)
        if self._by_id is None and self._matrix.shape[0] != rows:
            raise self._wrong(
                f"{count_of(self._matrix.shape[0], 'vector')} for {count_of(rows, 'row')} of the source",
                remedy="Provide one vector per source row, in its order, or a Parquet file with an id column",
            )

    @property
    def dimension(self) -> int:
        return self._matrix.shape[1]

    def of(
        self, ids: Sequence[str], others: Sequence[Sequence[str]], source_rows: Sequence[Sequence[int]]
    ) -> tuple[Floats, int]:
        """Vectors of rows, and the number of rows with a duplicate text whose vector differs.

        Args:
            ids: the row's first id; its vector is used.
            others: the row's other ids; they need no vector.
            source_rows: rows of the source with the row's text; the vector of the first is used.

        Returns:
            (n, d) float32, count.

        Raises:
            InputError: a row has no vector.
        """
        vectors = self._matrix.take(self.rows(ids, source_rows))
        if self._by_id is not None:
            known, order = self._by_id
            at = np.repeat(np.arange(len(others)), list(map(len, others)))
            wanted = hashes(name for names in others for name in names)
            found = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
            same = known[found] == wanted
            at, rows = at[same], order[found[same]]
        else:
            where = [(at, row) for at, rows in enumerate(source_rows) for row in rows[1:] if row >= 0]
            at, rows = np.array(where, dtype=np.int64).reshape(-1, 2).T
        by_place = np.argsort(rows)  # one row group of a Parquet file is read at a time
        at, rows = at[by_place], rows[by_place]
        differing = [
            at[here][(self._matrix.take(rows[here]) != vectors[at[here]]).any(axis=1)] for here in self._some(len(rows))
        ]
        return vectors, len(np.unique(np.concatenate([at[:0], *differing])))

    def rows(self, ids: Sequence[str], source_rows: Sequence[Sequence[int]]) -> Ints:
        """The rows of the file with the vectors of rows; see `of`."""
        if self._by_id is not None:
            return self._positions(ids)
        first = np.array([rows[0] for rows in source_rows], dtype=np.int64)
        if len(first) and first.min() < 0:
            raise self._wrong(
                f"positive {ids[int(np.argmin(first))]!r} is not in the corpus, so it has no vector",
                remedy="Provide vectors with an id column that includes positives, or add the positives to the corpus",
            )
        return first

    def _check_repeats(self, label: str) -> None:
        assert self._by_id is not None
        known, order = self._by_id
        again = np.flatnonzero(known[1:] == known[:-1]) + 1
        again = again[np.argsort(order[again])]  # one row group is read at a time
        for here in self._some(len(again)):
            some = again[here]
            differs = (self._matrix.take(order[some - 1]) != self._matrix.take(order[some])).any(axis=1)
            if differs.any():
                at = some[int(np.argmax(differs))]
                problem = f"the id of row {order[at - 1]} appears again with a different vector"
                raise self._wrong(problem, row=int(order[at]), field=label, remedy="Provide one vector per id")

    def _some(self, count: int) -> Iterator[slice]:
        size = max(1, _COMPARED // self.dimension)
        return (slice(low, low + size) for low in range(0, count, size))

    def _positions(self, ids: Sequence[str]) -> Ints:
        assert self._by_id is not None
        known, order = self._by_id
        wanted = hashes(ids)
        at = np.searchsorted(known, wanted)
        missing = np.flatnonzero((at == len(known)) | (known[np.minimum(at, len(known) - 1)] != wanted))
        if len(missing):
            problem = f"no vector for id {ids[int(missing[0])]!r} (and {len(missing) - 1} more in this part)"
            raise self._wrong(problem, remedy="Add the missing vectors")
        return order[at]


def dimension_of(path: Path, setting: str, budget: Budget) -> int:
    """The dimension of the vectors in a file, without reading ids; arguments and errors as in `VectorFile`."""
    return _opened(path, setting, budget).shape[1]


def _opened(path: Path, setting: str, budget: Budget) -> _Npy | _Parquet:
    if path.suffix == ".npy":
        return _Npy(path, setting)
    if path.suffix == ".parquet":
        return _Parquet(path, setting, budget)
    raise InputError("vectors must be .npy or .parquet", file=str(path), field=setting)


class _Npy:
    def __init__(self, path: Path, setting: str) -> None:
        try:
            data = mapped.npy(path)
        except BROKEN as error:
            raise InputError(f"not a readable .npy file: {error}", file=str(path), field=setting) from None
        if data.ndim != 2 or data.dtype.kind != "f" or data.shape[1] == 0:
            problem = f"expected a matrix of floats (rows, dimension), found {data.dtype} of shape {data.shape}"
            raise InputError(problem, file=str(path), field=setting)
        self._data = data
        self.shape: tuple[int, int] = data.shape

    def take(self, rows: Ints) -> Floats:
        with np.errstate(over="ignore"):  # Overflow is reported by name.
            return np.asarray(self._data[rows], dtype=np.float32)


class _Parquet:
    """Reads one row group at a time; the last one stays in memory."""

    def __init__(self, path: Path, setting: str, budget: Budget) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._wrong = partial(InputError, file=str(path), field=setting)
        try:
            self._file = pq.ParquetFile(path)
        except (OSError, pa.ArrowInvalid, UnicodeDecodeError) as error:
            raise self._wrong(f"not a readable Parquet file: {error}") from None
        schema = self._file.schema_arrow
        lists = [f.name for f in schema if _is_list(f.type) and pa.types.is_floating(f.type.value_type)]
        labels = [f.name for f in schema if pa.types.is_integer(f.type) or _is_text(f.type)]
        if len(lists) != 1 or len(labels) > 1:
            problem = f"expected one column of float lists and at most one id column, found {', '.join(schema.names)}"
            raise self._wrong(problem, remedy="Keep those columns only")
        self._column = lists[0]
        self.label: str | None = labels[0] if labels else None
        groups = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        at, width = schema.names.index(self._column), schema.field(self._column).type.value_type.bit_width // 8
        numbers = [self._file.metadata.row_group(i).column(at).num_values for i in range(len(groups))]
        # Stored values, in pieces and joined, and as float32; ids, with hashes and order of all of them.
        needed = (2 * width + 4) * max(numbers, default=0) + (150 * max(groups, default=0) + 40 * sum(groups)) * len(
            labels
        )
        budget.require(
            needed,
            f"{path}: reading a row group",
            "lower executor.workers, or write the file with smaller row groups (pyarrow: write_table(…,"
            " row_group_size=10_000))",
        )
        self._starts = np.cumsum([0, *groups])  # An empty group has no rows, so it is never requested.
        self._held: tuple[int, Floats] | None = None
        self._dimension: int | None = None
        if not sum(groups):
            raise self._wrong("the file contains no vectors", remedy="Write it again")
        self.shape: tuple[int, int] = (int(self._starts[-1]), self._group(int(np.argmax(groups))).shape[1])

    def ids(self) -> Iterator[list[str]]:
        """The ids, one row group at a time."""
        for group, start in enumerate(self._starts[:-1]):
            column = self._file.read_row_group(group, [self.label])[self.label]
            if column.null_count:
                row = int(start) + column.is_null().to_pylist().index(True)
                raise self._wrong("there is no id", row=row, field=self.label, remedy="Give every vector an id")
            yield [str(value) for value in column.to_pylist()]

    def take(self, rows: Ints) -> Floats:
        out = np.empty((len(rows), self.shape[1]), dtype=np.float32)
        groups = np.searchsorted(self._starts, rows, side="right") - 1
        for group in np.unique(groups):
            where = groups == group
            out[where] = self._group(int(group))[rows[where] - self._starts[group]]
        return out

    def _group(self, number: int) -> Floats:
        if self._held is None or self._held[0] != number:
            column: Any = self._file.read_row_group(number, [self._column])[self._column].combine_chunks()
            values = column.flatten().to_numpy(zero_copy_only=False)
            lengths = column.value_lengths().fill_null(0).to_numpy()
            width = self._dimension or max(1, int(lengths[0]))
            wrong = np.flatnonzero(lengths != width)
            if len(wrong):
                row, remedy = int(self._starts[number] + wrong[0]), "All vectors must have the same dimension"
                raise self._wrong(f"expected a vector of {width} numbers", row=row, field=self._column, remedy=remedy)
            self._dimension = width
            self._held = number, values.reshape(-1, width).astype(np.float32)
        return self._held[1]


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
