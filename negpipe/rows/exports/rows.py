"""The training rows in the layout of `output.format`, the same as in `triplets/`, for other readers.

jsonl: one object per row. hub: Parquet in data/, for a dataset repository. sentence-transformers: Parquet with
texts and label only, since its trainer uses every other column as an input. All can be opened with
`datasets.load_dataset`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from negpipe.config.schema import Config
from negpipe.rows import formats
from negpipe.rows.exports.files import as_json, shard_name
from negpipe.rows.exports.job import ExportJob, ExportLayout


def _tables(job: ExportJob, config: Config) -> Iterator[tuple[int, pa.Table]]:
    """Rows of a config's format, each table with the number of its file."""
    sharded = config.output.model_copy(update={"rows_per_file": job.shard_rows})
    units = (units for _, units in job.slices)
    tables = formats.tables(units, job.corpus, config.model_copy(update={"output": sharded}))
    return ((number, table) for number, table in tables if table.num_rows)


def _jsonl(job: ExportJob) -> int:
    with job.lines() as files:
        for _, table in _tables(job, job.config):
            names, columns = table.column_names, [_values(column) for column in _finite(table).columns]
            files.write(as_json(dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)))
        return files.rows


def _values(column: pa.ChunkedArray) -> list[Any]:
    """A column's values. Shared dictionary entries are converted to Python once."""
    if not pa.types.is_dictionary(column.type):
        return list(column.to_pylist())
    values: list[Any] = []
    for chunk in column.chunks:
        entries = chunk.dictionary.to_pylist()
        values += [None if at is None else entries[at] for at in chunk.indices.to_pylist()]
    return values


def _finite(table: pa.Table) -> pa.Table:
    """The same with null for every number that JSON cannot represent."""
    for at, field in enumerate(table.schema):
        column = table.column(at).combine_chunks()
        if pa.types.is_floating(field.type):
            table = table.set_column(at, field.name, _or_null(column))
        elif pa.types.is_list(field.type) and pa.types.is_floating(field.type.value_type):
            values = pa.ListArray.from_arrays(column.offsets, _or_null(column.values))
            table = table.set_column(at, field.name, values)
    return table


def _or_null(values: pa.Array) -> pa.Array:
    return pc.if_else(pc.is_finite(values), values, pa.scalar(None, values.type))


def _parquet(job: ExportJob, tables: Iterator[tuple[int, pa.Table]], folder: str) -> int:
    rows = 0
    (job.folder / folder).mkdir(exist_ok=True)
    for number, group in groupby(tables, key=lambda pair: pair[0]):
        with (job.folder / folder / shard_name("train", ".parquet", number, job.shard_rows)).open("wb") as file:
            rows += formats.write(file, (table for _, table in group))
    return rows


def _hub(job: ExportJob) -> int:
    return _parquet(job, _tables(job, job.config), "data")


def _sentence_transformers(job: ExportJob) -> int:
    plain = {"ids": False, "scores": False, "ranks": False, "grades": False, "extra_columns": ()}
    config = job.config.model_copy(update={"output": job.config.output.model_copy(update=plain)})
    return _parquet(job, ((number, _inputs(table)) for number, table in _tables(job, config)), ".")


def _inputs(table: pa.Table) -> pa.Table:
    """The same without the sources of negatives."""
    return table.select([name for name in table.column_names if name not in ("source", "sources")])


JSONL = ExportLayout(_jsonl, text=True, suffix=".jsonl", has_rows=formats.has_rows)
HUB = ExportLayout(_hub, has_rows=formats.has_rows)
SENTENCE_TRANSFORMERS = ExportLayout(_sentence_transformers, suffix=".parquet", has_rows=formats.has_rows)
