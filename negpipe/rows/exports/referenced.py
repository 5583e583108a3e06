"""The documents that an export refers to by id, each once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from negpipe.data.arrays import Mask
from negpipe.data.tables import Rows
from negpipe.rows.exports.blocks import Block
from negpipe.rows.exports.files import ParquetFiles

_ROWS = 8192


class Referenced:
    """Records the documents of the added blocks, in one byte per row of the corpus."""

    def __init__(self, corpus: Rows) -> None:
        self._corpus = corpus
        self._seen: Mask = np.zeros(len(corpus), np.bool_)

    def add(self, block: Block) -> None:
        self._seen[block.positives.rows] = True
        self._seen[block.negatives.rows] = True

    def tables(self, id_column: str) -> Iterator[pa.Table]:
        """Id and text of each, in the order of the corpus."""
        rows = np.flatnonzero(self._seen)
        for start in range(0, len(rows), _ROWS):
            here = rows[start : start + _ROWS]
            columns = {id_column: self._corpus.strings("id", here), "text": self._corpus.strings("text", here)}
            yield pa.table(columns).cast(_schema(id_column))

    def write(self, folder: Path, stem: str, id_column: str, shard_rows: int | None) -> None:
        """Write them as Parquet."""
        with ParquetFiles(folder, stem, _schema(id_column), shard_rows=shard_rows) as files:
            for table in self.tables(id_column):
                files.write(table)


def _schema(id_column: str) -> pa.Schema:
    return pa.schema({id_column: pa.string(), "text": pa.string()})
