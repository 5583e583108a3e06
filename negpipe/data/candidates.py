"""Candidate parts: what `search` stores and `triplets` reads, Parquet in slices of anchors.

Anchors that need more than `search` stored have deeper candidates in a file of their own, row groups of
some anchors of one slice, with a column that says which anchors of the part they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from negpipe.data.tables import members, ragged
from negpipe.errors import DamagedError

ROW_GROUP = 4096
CELLS = 2**20  # candidates of a slice that has deeper ones
BYTES = 10  # of a candidate on disk, compressed: measured 9 of a million documents, 10 of 200 million
_DEEPER = pa.schema([("anchor", pa.int64()), ("rows", pa.list_(pa.int64())), ("scores", pa.list_(pa.float32()))])
Rows = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Candidates:
    """What was found for n anchors.

    Attributes:
        rows: (n, k) int64, best first, -1 where the corpus is smaller than k.
        scores: (n, k) float32, -inf where there is no row.
        positives: rows of all anchors' positives, ragged by offsets.
        offsets: (n + 1,) int64, from 0.
        positive_scores: float32, as positives.
    """

    rows: Rows
    scores: Scores
    positives: Rows
    offsets: Rows
    positive_scores: Scores

    def narrowed(self, depth: int) -> Candidates:
        """The first `depth` candidates of each anchor."""
        return replace(self, rows=self.rows[:, :depth], scores=self.scores[:, :depth])

    def take(self, anchors: Rows) -> Candidates:
        """Some of the anchors."""
        owned, offsets = members(self.offsets, anchors)
        return Candidates(
            self.rows[anchors], self.scores[anchors], self.positives[owned], offsets, self.positive_scores[owned]
        )

    def deepened(self, deeper: Deeper) -> Candidates:
        """The same with deeper candidates for some anchors, and padding for the others."""
        width = max(self.rows.shape[1], deeper.rows.shape[1])
        rows, scores = _padded(self.rows, width, -1), _padded(self.scores, width, -np.inf)
        rows[deeper.anchors], scores[deeper.anchors] = deeper.rows, deeper.scores
        return replace(self, rows=rows, scores=scores)


@dataclass(frozen=True)
class Deeper:
    """Candidates that take the place of those of some anchors.

    Attributes:
        anchors: (m,) int64, which anchors, ascending, of one slice.
        rows: (m, k) int64 as in `Candidates`; scores alike.
    """

    anchors: Rows
    rows: Rows
    scores: Scores

    def between(self, low: int, high: int) -> Deeper:
        """Those of the anchors from `low` to below `high`, numbered from `low` on."""
        here = slice(*np.searchsorted(self.anchors, [low, high]))
        return Deeper(self.anchors[here] - low, self.rows[here], self.scores[here])


def write(file: BinaryIO, found: Candidates, *, approximate: str | None = None) -> None:
    """Write one part; `approximate` names the index that may have missed some."""
    lists = pa.array(found.offsets.astype(np.int32))
    table = pa.table(
        {
            **_columns(found),
            "positives": pa.ListArray.from_arrays(lists, pa.array(found.positives)),
            "positive_scores": pa.ListArray.from_arrays(lists, pa.array(found.positive_scores)),
        }
    )
    if approximate:
        table = table.replace_schema_metadata({"negpipe.ann.approximate": approximate})
    pq.write_table(table, file, row_group_size=ROW_GROUP, compression="lz4", use_dictionary=False)


def write_deeper(file: BinaryIO, found: Iterable[Deeper]) -> int:
    """Write the deeper candidates of a part, as `adaptive.deepen` yields them; the number of their anchors."""
    anchors = 0
    with pq.ParquetWriter(file, _DEEPER, compression="lz4", use_dictionary=False) as writer:
        for piece in found:
            ends = pa.array(np.arange(len(piece.rows) + 1, dtype=np.int32) * piece.rows.shape[1])
            lists = (pa.ListArray.from_arrays(ends, pa.array(each.ravel())) for each in (piece.rows, piece.scores))
            writer.write_table(pa.table([pa.array(piece.anchors), *lists], schema=_DEEPER))
            anchors += len(piece.rows)
    return anchors


def joined(pieces: Sequence[Candidates]) -> Candidates:
    """Anchors one behind the other; at least one piece, all equally deep."""
    ends = np.cumsum([0, *(len(piece.positives) for piece in pieces)])
    return Candidates(
        np.concatenate([piece.rows for piece in pieces]),
        np.concatenate([piece.scores for piece in pieces]),
        np.concatenate([piece.positives for piece in pieces]),
        np.concatenate([[0], *(piece.offsets[1:] + end for piece, end in zip(pieces, ends, strict=False))]),
        np.concatenate([piece.positive_scores for piece in pieces]),
    )


def read(path: Path, deeper: Path | Iterable[Deeper] | None = None, depth: int | None = None) -> Iterator[Candidates]:
    """Read one part a slice of anchors at a time.

    Args:
        path: the part.
        deeper: its deeper candidates in order, or their file, if it has any.
        depth: how many of each anchor's stored ones are wanted; None: all.

    Raises:
        DamagedError: a file is not whole.
    """
    below = iter(_read_deeper(deeper) if isinstance(deeper, Path) else deeper or ())
    following = next(below, None)
    start = 0
    with _opened(path) as file:
        for batch in file.iter_batches(ROW_GROUP):
            positives, offsets = ragged(batch["positives"])
            positive_scores, _ = ragged(batch["positive_scores"])
            rows, scores = _matrices(batch)
            found = Candidates(rows[:, :depth], scores[:, :depth], positives, offsets, positive_scores)
            done = 0
            while following is not None and following.anchors[0] < start + len(rows):
                end, step = int(following.anchors[-1]) + 1 - start, max(1, CELLS // following.rows.shape[1])
                for low in range(done, end, step):
                    high = min(low + step, end)
                    yield found.take(np.arange(low, high)).deepened(following.between(start + low, start + high))
                done, following = end, next(below, None)
            if done < len(rows):
                yield found.take(np.arange(done, len(rows))) if done else found
            start += len(rows)


def _read_deeper(path: Path) -> Iterator[Deeper]:
    with _opened(path) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group).combine_chunks()
            yield Deeper(table["anchor"].to_numpy(), *_matrices(table))


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (OSError, pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise DamagedError(f"{path} cannot be read ({error}): run `negpipe verify`, then search again") from None


def _columns(found: Candidates) -> dict[str, pa.Array]:
    depth = found.rows.shape[1]
    return {
        "rows": pa.FixedSizeListArray.from_arrays(pa.array(found.rows.ravel()), depth),
        "scores": pa.FixedSizeListArray.from_arrays(pa.array(found.scores.ravel()), depth),
    }


def _matrices(table: pa.Table | pa.RecordBatch) -> tuple[Rows, Scores]:
    columns = (table[name] for name in ("rows", "scores"))
    arrays = (column.chunk(0) if isinstance(column, pa.ChunkedArray) else column for column in columns)
    rows, scores = (array.flatten().to_numpy().reshape(table.num_rows, -1) for array in arrays)
    return rows, scores


def _padded(values: Any, width: int, padding: float) -> Any:
    padded = np.full((len(values), width), padding, values.dtype)
    padded[:, : values.shape[1]] = values
    return padded
