"""Candidate parts: self-describing Parquet files with one row per anchor, read in slices of anchors.

A row has `anchor` (its id), `rows` (of the corpus, as found), and for every score NAME the lists `rank_NAME` and
`score_NAME`, parallel to `rows`; also `positives` (rows) and, parallel to it, `positive_score_NAME`. Missing candidates
and scores are null. Lists of candidates have one width per file, so that numpy sees matrices.

Anchors that need more than `search` stored have deeper candidates in a separate file with the same columns except
positives, in row groups of some anchors of one slice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from negpipe.data.arrays import Mask
from negpipe.data.tables import members, ragged
from negpipe.errors import DamagedError, InputError

ROW_GROUP = 4096
CELLS = 2**20  # candidates of a slice that has deeper ones
BYTES = 10  # per candidate on disk, compressed: measured 9 with a million documents, 10 with 200 million
DENSE = "dense"
"""The score of search: the product of the vectors."""
TEACHER = "teacher"
"""The score of a function passed to the Python API."""
_APPROXIMATE = b"negpipe.ann.approximate"
_DEEPER = pa.schema(
    [
        ("anchor", pa.large_string()),
        ("rows", pa.list_(pa.int64())),
        (f"rank_{DENSE}", pa.list_(pa.int32())),
        (f"score_{DENSE}", pa.list_(pa.float32())),
    ]
)
Rows = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Candidates:
    """The candidates of n anchors, by one of the scores.

    Attributes:
        rows: (n, k) int64, best first, -1 if there are fewer than k.
        scores: (n, k) float32, -inf if there is no row.
        positives: rows of the positives of all anchors, ragged by offsets.
        offsets: (n + 1,) int64, from 0.
        positive_scores: float32, parallel to positives, NaN if not computed.
        anchors: (n,) int64, their rows in the part's anchor table.
    """

    rows: Rows
    scores: Scores
    positives: Rows
    offsets: Rows
    positive_scores: Scores
    anchors: Rows

    def narrowed(self, depth: int) -> Candidates:
        """The first `depth` candidates of each anchor."""
        return replace(self, rows=self.rows[:, :depth], scores=self.scores[:, :depth])

    def without(self, dropped: Mask) -> Candidates:
        """The same without some candidates, (n, k); later ones move up."""
        order = np.argsort(dropped, axis=1, kind="stable")
        rows, scores = np.take_along_axis(self.rows, order, axis=1), np.take_along_axis(self.scores, order, axis=1)
        gone = np.take_along_axis(dropped, order, axis=1)
        rows[gone], scores[gone] = -1, -np.inf
        return replace(self, rows=rows, scores=scores)

    def take(self, anchors: Rows) -> Candidates:
        """Some of the anchors."""
        owned, offsets = members(self.offsets, anchors)
        return Candidates(
            self.rows[anchors],
            self.scores[anchors],
            self.positives[owned],
            offsets,
            self.positive_scores[owned],
            self.anchors[anchors],
        )

    def deepened(self, deeper: Deeper) -> Candidates:
        """The same with deeper candidates for some anchors, and padding for the others."""
        width = max(self.rows.shape[1], deeper.rows.shape[1])
        rows, scores = _padded(self.rows, width, -1), _padded(self.scores, width, -np.inf)
        rows[deeper.anchors], scores[deeper.anchors] = deeper.rows, deeper.scores
        return replace(self, rows=rows, scores=scores)


@dataclass(frozen=True)
class Deeper:
    """Candidates that replace those of some anchors.

    Attributes:
        anchors: (m,) int64, the anchors, ascending, of one slice.
        rows: (m, k) int64 as in `Candidates`, as are the scores.
    """

    anchors: Rows
    rows: Rows
    scores: Scores

    def among(self, anchors: Rows) -> Deeper:
        """The same for anchors in another order, numbered by their places in it."""
        order = np.argsort(anchors)
        place = order[np.minimum(np.searchsorted(anchors, self.anchors, sorter=order), len(anchors) - 1)]
        here = np.flatnonzero(anchors[place] == self.anchors)
        here = here[np.argsort(place[here])]
        return Deeper(place[here], self.rows[here], self.scores[here])

    def between(self, low: int, high: int) -> Deeper:
        """The candidates of anchors from `low` to below `high`, numbered from `low`."""
        here = slice(*np.searchsorted(self.anchors, [low, high]))
        return Deeper(self.anchors[here] - low, self.rows[here], self.scores[here])


@dataclass(frozen=True)
class Scored:
    """Another score of the same candidates.

    Attributes:
        ranks: (n, k) int32, ranks by these scores, -1 if there is none.
        scores: (n, k) float32, NaN if not computed.
        positive_scores: float32, one per positive.
    """

    ranks: npt.NDArray[np.int32]
    scores: Scores
    positive_scores: Scores


def write(
    file: BinaryIO,
    ids: pa.Array | pa.ChunkedArray,
    found: Candidates,
    further: Mapping[str, Scored] | None = None,
    *,
    approximate: str | None = None,
) -> None:
    """Write one part.

    Args:
        file: the output.
        ids: ids of the part's anchors, which `found.anchors` refers to.
        found: the candidates of search, with their scores.
        further: other scores of the same candidates, by name.
        approximate: the name of an index that may have missed some.
    """
    lists = pa.array(found.offsets.astype(np.int32))
    none = found.rows < 0
    ranks = np.where(none, -1, np.arange(found.rows.shape[1])).astype(np.int32)
    named = {DENSE: Scored(ranks, found.scores, found.positive_scores), **(further or {})}
    columns = {"anchor": _names(ids, found.anchors), "rows": _lists(found.rows, none)}
    for name, scored in named.items():
        unranked = scored.ranks < 0
        columns[f"rank_{name}"] = _lists(scored.ranks, unranked)
        columns[f"score_{name}"] = _lists(scored.scores, unranked | np.isnan(scored.scores))
    columns["positives"] = pa.ListArray.from_arrays(lists, pa.array(found.positives))
    for name, scored in named.items():
        of_positives = _values(scored.positive_scores, np.isnan(scored.positive_scores))
        columns[f"positive_score_{name}"] = pa.ListArray.from_arrays(lists, of_positives)
    table = pa.table(columns)
    if approximate:
        table = table.replace_schema_metadata({_APPROXIMATE: approximate})
    pq.write_table(table, file, row_group_size=ROW_GROUP, compression="lz4", use_dictionary=False)


def approximate(path: Path) -> str | None:
    """The name of the index that may have missed candidates of a part."""
    return ((pq.read_schema(path).metadata or {}).get(_APPROXIMATE) or b"").decode() or None


def write_deeper(file: BinaryIO, ids: pa.Array | pa.ChunkedArray, found: Iterable[Deeper]) -> int:
    """Write the deeper candidates of a part, as yielded by `deeper.deepen`; return the number of their anchors."""
    anchors = 0
    with pq.ParquetWriter(file, _DEEPER, compression="lz4", use_dictionary=False) as writer:
        for piece in found:
            ends = pa.array(np.arange(len(piece.rows) + 1, dtype=np.int32) * piece.rows.shape[1])
            none = piece.rows < 0
            ranks = np.broadcast_to(np.arange(piece.rows.shape[1], dtype=np.int32), piece.rows.shape)
            lists = (pa.ListArray.from_arrays(ends, _values(each, none)) for each in (piece.rows, ranks, piece.scores))
            writer.write_table(pa.table([_names(ids, piece.anchors), *lists], schema=_DEEPER))
            anchors += len(piece.rows)
    return anchors


def joined(pieces: Sequence[Candidates]) -> Candidates:
    """Concatenate the anchors of at least one piece, all of the same depth."""
    ends = np.cumsum([0, *(len(piece.positives) for piece in pieces)])
    return Candidates(
        np.concatenate([piece.rows for piece in pieces]),
        np.concatenate([piece.scores for piece in pieces]),
        np.concatenate([piece.positives for piece in pieces]),
        np.concatenate([[0], *(piece.offsets[1:] + end for piece, end in zip(pieces, ends, strict=False))]),
        np.concatenate([piece.positive_scores for piece in pieces]),
        np.concatenate([piece.anchors for piece in pieces]),
    )


def read(
    path: Path,
    ids: pa.Array | pa.ChunkedArray,
    deeper: Path | Iterable[Deeper] | None = None,
    depth: int | None = None,
    score: str = DENSE,
) -> Iterator[Candidates]:
    """Read one part, one slice of anchors at a time.

    Args:
        path: the part.
        ids: ids of its anchors; each slice refers to them.
        deeper: its deeper candidates in order, or their file, if any.
        depth: stored candidates to read per anchor; None: all.
        score: the name of the scores, which determine the order.

    Raises:
        DamagedError: a file is incomplete, or has other anchors.
        InputError: the part has no scores of this name.
    """
    below = iter(_read_deeper(deeper, ids) if isinstance(deeper, Path) else deeper or ())
    following = next(below, None)
    with _opened(path) as file:
        names = file.schema_arrow.names
        if f"score_{score}" not in names:
            have = ", ".join(name.removeprefix("score_") for name in names if name.startswith("score_"))
            raise InputError(
                f"candidates have no score '{score}', only {have}",
                field="mining.score",
                remedy="Use one of these",
            )
        columns = ["anchor", "rows", f"score_{score}", "positives", f"positive_score_{score}"]
        start = 0
        for batch in file.iter_batches(ROW_GROUP, columns=columns + [f"rank_{score}"] * (score != DENSE)):
            positives, offsets = ragged(batch["positives"])
            positive_scores, _ = ragged(batch[f"positive_score_{score}"])
            anchors = _places(path, batch["anchor"], ids, start)
            rows = _matrix(batch, "rows", -1)[:, :depth]
            scores = _matrix(batch, f"score_{score}", -np.inf)[:, :depth]
            if score != DENSE:
                rows, scores = _ordered(rows, scores, _matrix(batch, f"rank_{score}", -1)[:, :depth])
            found = Candidates(rows, scores, positives, offsets, positive_scores, anchors)
            done = 0
            while following is not None and len((own := following.among(anchors)).anchors):
                end, step = int(own.anchors[-1]) + 1, max(1, CELLS // following.rows.shape[1])
                for low in range(done, end, step):
                    high = min(low + step, end)
                    yield found.take(np.arange(low, high)).deepened(own.between(low, high))
                done, following = end, next(below, None)
            if done < len(rows):
                yield found.take(np.arange(done, len(rows))) if done else found
            start += len(rows)


def _read_deeper(path: Path, ids: pa.Array | pa.ChunkedArray) -> Iterator[Deeper]:
    with _opened(path) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group).combine_chunks()
            rows, scores = _matrix(table, "rows", -1), _matrix(table, f"score_{DENSE}", -np.inf)
            yield Deeper(_places(path, table["anchor"], ids), rows, scores)


def _places(path: Path, names: pa.Array, ids: pa.Array | pa.ChunkedArray, likely: int = 0) -> Rows:
    """The places of these among the anchors."""
    if isinstance(names, pa.ChunkedArray):
        names = names.combine_chunks()
    names = names.cast(ids.type)
    expected = ids.slice(likely, len(names))
    if expected.equals(pa.chunked_array([names]) if isinstance(expected, pa.ChunkedArray) else names):
        return np.arange(likely, likely + len(names))
    places = pc.index_in(names, value_set=ids)
    if places.null_count:
        other = names[places.is_null().to_pylist().index(True)]
        raise DamagedError(
            f"{path} has candidates of anchor {other}, which is not one of its anchors: run"
            " `negpipe verify`, then search again"
        )
    return np.asarray(places.to_numpy(zero_copy_only=False), np.int64)


def _ordered(rows: Rows, scores: Scores, ranks: npt.NDArray[np.int32]) -> tuple[Rows, Scores]:
    """Candidates in the order of their ranks; those without a rank are dropped."""
    order = np.argsort(ranks.astype(np.uint32), axis=1, kind="stable")  # -1 comes last
    none = np.take_along_axis(ranks, order, axis=1) < 0
    rows, scores = np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)
    rows[none], scores[none] = -1, -np.inf
    return rows, scores


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (OSError, pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise DamagedError(f"{path} cannot be read ({error}): run `negpipe verify`, then search again") from None


def _names(ids: pa.Array | pa.ChunkedArray, anchors: Rows) -> pa.LargeStringArray:
    names = ids.take(pa.array(anchors)).cast(pa.large_string())
    return names.combine_chunks() if isinstance(names, pa.ChunkedArray) else names


def _lists(values: npt.NDArray[Any], none: Mask) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(_values(values, none), values.shape[1])


def _values(values: npt.NDArray[Any], none: Mask) -> pa.Array:
    return pa.array(values.ravel(), mask=none.ravel() if none.any() else None)


def _matrix(table: pa.Table | pa.RecordBatch, name: str, empty: float) -> Any:
    column = table[name]
    values = (column.chunk(0) if isinstance(column, pa.ChunkedArray) else column).flatten()
    if values.null_count:
        values = values.fill_null(empty)
    return values.to_numpy().reshape(table.num_rows, -1)


def _padded(values: Any, width: int, padding: float) -> Any:
    padded = np.full((len(values), width), padding, values.dtype)
    padded[:, : values.shape[1]] = values
    return padded
