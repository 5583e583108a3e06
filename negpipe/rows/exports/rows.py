"""The training rows themselves, as `output.format` lays them out: what `triplets/` holds, for other readers.

jsonl: an object a row. hub: Parquet in data/, for a dataset repository. sentence-transformers: Parquet of
anchor, positive, negative_1 … negative_n, whatever the config's format, without a further column, since its
trainer takes every column as an input; pairs that lack negatives are left out. All open with
`datasets.load_dataset`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from negpipe.config.schema import Config
from negpipe.rows import formats
from negpipe.rows.exports.blocks import Slices
from negpipe.rows.exports.files import JsonFiles, shard_name
from negpipe.rows.exports.job import Job, Layout

logger = logging.getLogger(__name__)


def _tables(job: Job, config: Config) -> Iterator[tuple[int, pa.Table]]:
    """Rows of a config's format, each table with the number of its file."""
    sharded = config.output.model_copy(update={"rows_per_file": job.shard_rows})
    units = (units for _, units in job.slices)
    tables = formats.tables(units, job.corpus, config.model_copy(update={"output": sharded}))
    return ((number, table) for number, table in tables if table.num_rows)


def _jsonl(job: Job) -> int:
    with JsonFiles(job.folder, "train", shard_rows=job.shard_rows, compress=job.compress) as files:
        for _, table in _tables(job, job.config):
            names, columns = table.column_names, [_values(column) for column in _finite(table).columns]
            files.write([dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)])
        return files.rows


def _values(column: pa.ChunkedArray) -> list[Any]:
    """A column's values. Of texts that share entries, each entry is turned into Python once."""
    if not pa.types.is_dictionary(column.type):
        return list(column.to_pylist())
    values: list[Any] = []
    for chunk in column.chunks:
        entries = chunk.dictionary.to_pylist()
        values += [None if at is None else entries[at] for at in chunk.indices.to_pylist()]
    return values


def _finite(table: pa.Table) -> pa.Table:
    """The same with null for every number that JSON cannot write."""
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


def _parquet(job: Job, config: Config, folder: str) -> int:
    rows = 0
    (job.folder / folder).mkdir(exist_ok=True)
    for number, group in groupby(_tables(job, config), key=lambda pair: pair[0]):
        with (job.folder / folder / shard_name("train", ".parquet", number, job.shard_rows)).open("wb") as file:
            rows += formats.write(file, (table for _, table in group))
    return rows


def _hub(job: Job) -> int:
    return _parquet(job, job.config, "data")


def _sentence_transformers(job: Job) -> int:
    texts = {"format": "n-tuple", "ids": False, "scores": False, "ranks": False, "grades": False, "extra_columns": ()}
    output = job.config.output.model_copy(update=texts)
    pairs = 0

    def counted() -> Slices:
        nonlocal pairs
        for found, units in job.slices:
            pairs += int(np.diff(units.positive_offsets)[np.diff(units.negative_offsets) > 0].sum())
            yield found, units

    rows = _parquet(replace(job, slices=counted()), job.config.model_copy(update={"output": output}), ".")
    if rows < pairs:
        logger.info("export: %s of %s pairs left out, they have too few negatives", f"{pairs - rows:,}", f"{pairs:,}")
    return rows


JSONL = Layout(_jsonl, json=True, suffix=".jsonl")
HUB = Layout(_hub)
SENTENCE_TRANSFORMERS = Layout(_sentence_transformers, suffix=".parquet")
