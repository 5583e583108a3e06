"""Candidate parts: what `search` stores and `triplets` reads, Parquet in slices of anchors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from negpipe.errors import DamagedError
from negpipe.tables import ragged

ROW_GROUP = 4096
Rows = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Candidates:
    """What was found for n anchors.

    Attributes:
        rows: (n, k) int64, best first, -1 where the corpus is smaller than k.
        scores: (n, k) float32, -inf where there is no row.
        positives: rows of all anchors' positives, ragged by offsets.
        offsets: (n + 1,) int64.
        positive_scores: float32, as positives.
    """

    rows: Rows
    scores: Scores
    positives: Rows
    offsets: Rows
    positive_scores: Scores


def write(file: BinaryIO, found: Candidates) -> None:
    """Write one part."""
    depth = found.rows.shape[1]
    lists = pa.array(found.offsets.astype(np.int32))
    table = pa.table(
        {
            "rows": pa.FixedSizeListArray.from_arrays(pa.array(found.rows.ravel()), depth),
            "scores": pa.FixedSizeListArray.from_arrays(pa.array(found.scores.ravel()), depth),
            "positives": pa.ListArray.from_arrays(lists, pa.array(found.positives)),
            "positive_scores": pa.ListArray.from_arrays(lists, pa.array(found.positive_scores)),
        }
    )
    pq.write_table(table, file, row_group_size=ROW_GROUP, compression="lz4", use_dictionary=False)


def read(path: Path) -> Iterator[Candidates]:
    """Read one part a slice of anchors at a time.

    Raises:
        DamagedError: the file is not a whole candidate part.
    """
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(ROW_GROUP):
                positives, offsets = ragged(batch["positives"])
                positive_scores, _ = ragged(batch["positive_scores"])
                rows, scores = (
                    batch[name].flatten().to_numpy().reshape(batch.num_rows, -1) for name in ("rows", "scores")
                )
                yield Candidates(rows, scores, positives, offsets, positive_scores)
    except (OSError, pa.ArrowInvalid) as error:
        raise DamagedError(f"{path} cannot be read ({error}): run `negpipe verify`, then search again") from None
