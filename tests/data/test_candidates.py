"""Candidate files describe themselves: read by other programs, joined by anchor, scored by several judges."""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from negpipe.data import candidates
from negpipe.data.candidates import Candidates, Deeper, Scored
from negpipe.errors import DamagedError, InputError

IDS = pa.array([f"q{i}" for i in range(5)], pa.large_string())


def some() -> Candidates:
    rows = np.arange(20).reshape(5, 4).astype(np.int64)
    rows[4, 2:] = -1
    scores = np.where(rows < 0, -np.inf, 1 - rows / 100).astype(np.float32)
    offsets = np.array([0, 1, 1, 3, 4, 5])
    positives = np.array([7, 8, 9, 10, 11])
    return Candidates(rows, scores, positives, offsets, (positives / 10).astype(np.float32), np.arange(5))


def written(path: Path, found: Candidates, further: dict[str, Scored] | None = None) -> Path:
    with path.open("wb") as file:
        candidates.write(file, IDS, found, further)
    return path


def judged(found: Candidates) -> dict[str, Scored]:
    """A judge who saw the first three of each and turns their order round."""
    scores = np.full(found.rows.shape, np.nan, np.float32)
    ranks = np.full(found.rows.shape, -1, np.int32)
    for at, rows in enumerate(found.rows[:, :3]):
        seen = int((rows >= 0).sum())
        scores[at, :seen], ranks[at, :seen] = np.arange(seen), np.arange(seen)[::-1]
    return {"teacher": Scored(ranks, scores, np.full(len(found.positives), 5, np.float32))}


def test_another_program_reads_names_ranks_and_scores(tmp_path: Path) -> None:
    path = written(tmp_path / "part.parquet", some(), judged(some()))
    listed = (
        duckdb.connect()
        .execute(
            "SELECT anchor, unnest(rows) AS document, unnest(rank_dense) AS rank, unnest(score_dense) AS score,"
            f" unnest(rank_teacher) AS by_teacher, unnest(score_teacher) AS teacher FROM '{path}'"
        )
        .fetchall()
    )
    assert len(listed) == 20
    assert listed[1] == ("q0", 1, 1, pytest.approx(0.99), 1, 1.0)
    assert listed[3][4:] == (None, None)  # not looked at: never zero
    assert listed[-1] == ("q4", None, None, None, None, None)  # the corpus is smaller than the list
    (row,) = (
        duckdb.connect().execute(f"SELECT positives, positive_score_dense FROM '{path}' WHERE anchor = 'q2'").fetchall()
    )
    assert row == ([8, 9], pytest.approx([0.8, 0.9]))


@pytest.mark.parametrize("depth", [None, 2])
def test_what_is_written_is_read(tmp_path: Path, depth: int | None) -> None:
    (found,) = candidates.read(written(tmp_path / "part.parquet", some()), IDS, depth=depth)
    expected = some().narrowed(depth or 4)
    for name, values in vars(expected).items():
        assert np.array_equal(getattr(found, name), values), name


def test_a_file_in_another_order_is_joined_by_anchor(tmp_path: Path) -> None:
    path = written(tmp_path / "part.parquet", some())
    order = [3, 0, 4, 2, 1]
    pq.write_table(pq.read_table(path).take(order), path)
    deeper = [Deeper(np.array([0, 2]), np.arange(12).reshape(2, 6) + 100, np.ones((2, 6), np.float32))]
    below = tmp_path / "deeper.parquet"
    with below.open("wb") as file:
        assert candidates.write_deeper(file, IDS, deeper) == 2
    for source in (below, deeper):
        found = {
            int(anchor): (piece.rows[at].tolist(), piece.positives[slice(*piece.offsets[at : at + 2])].tolist())
            for piece in candidates.read(path, IDS, source)
            for at, anchor in enumerate(piece.anchors)
        }
        assert list(found) == order
        for anchor, (rows, positives) in found.items():
            if anchor in (0, 2):
                assert rows == deeper[0].rows[[0, 2].index(anchor)].tolist()
            else:
                assert rows[:4] == some().rows[anchor].tolist()
            assert positives == some().positives[slice(*some().offsets[anchor : anchor + 2])].tolist()


def test_candidates_of_other_anchors_are_not_taken_for_these(tmp_path: Path) -> None:
    path = written(tmp_path / "part.parquet", some())
    with pytest.raises(DamagedError, match="q0"):
        list(candidates.read(path, pa.array([f"x{i}" for i in range(5)])))


def test_a_score_ranks_only_what_it_scored(tmp_path: Path) -> None:
    path = written(tmp_path / "part.parquet", some(), judged(some()))
    (found,) = candidates.read(path, IDS, score="teacher")
    assert found.rows.tolist()[0] == [2, 1, 0, -1]
    assert found.scores.tolist()[0] == [2, 1, 0, -np.inf]
    assert found.rows.tolist()[4] == [17, 16, -1, -1]
    assert found.positive_scores.tolist() == [5] * 5
    with pytest.raises(InputError, match="dense, teacher") as error:
        list(candidates.read(path, IDS, score="bm25"))
    assert error.value.field == "mining.score"


def test_a_score_that_was_not_computed_is_null(tmp_path: Path) -> None:
    teacher = judged(some())["teacher"]
    teacher.positive_scores[1] = np.nan
    teacher.scores[0, 1] = np.nan  # of a candidate that has a rank
    path = written(tmp_path / "part.parquet", some(), {"teacher": teacher})
    nulls = (
        duckdb.connect()
        .execute(
            f"SELECT count(*) FILTER (score IS NULL), count(*) FILTER (score <> score) FROM"
            f" (SELECT unnest(positive_score_teacher) AS score FROM '{path}')"
        )
        .fetchall()
    )
    assert nulls == [(1, 0)]
    assert duckdb.connect().execute(f"SELECT score_teacher FROM '{path}' LIMIT 1").fetchall() == [([0, None, 2, None],)]
    (found,) = candidates.read(path, IDS, score="teacher")
    assert np.isnan(found.positive_scores).tolist() == [False, True, False, False, False]
