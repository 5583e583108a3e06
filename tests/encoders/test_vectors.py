"""Vectors that users bring, in every form they may come in, against the matrix they were made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from negpipe.encoders.precomputed import VectorFile
from negpipe.engine.budget import Budget
from negpipe.errors import BudgetError, InputError

ROWS, DIMENSION = 23, 4
MATRIX = np.random.default_rng(0).normal(size=(ROWS, DIMENSION)).astype(np.float32)
IDS = [f"id {i}" for i in range(ROWS)]


def npy(path: Path, matrix: npt.NDArray[Any] = MATRIX) -> Path:
    np.save(path / "v.npy", matrix)
    return path / "v.npy"


def parquet(path: Path, columns: dict[str, Any], group: int = 5) -> Path:
    pq.write_table(pa.table(columns), path / "v.parquet", row_group_size=group)
    return path / "v.parquet"


def opened(path: Path, rows: int = ROWS, memory: int = 2**26) -> VectorFile:
    return VectorFile(path, rows, "encoder.corpus_vectors", Budget(memory))


def by_row(file: VectorFile, rows: list[list[int]]) -> tuple[npt.NDArray[np.float32], int]:
    return file.of(["?"] * len(rows), [[]] * len(rows), rows)


LISTS = [
    pa.list_(pa.float32()),
    pa.list_(pa.float64()),
    pa.large_list(pa.float32()),
    pa.list_(pa.float32(), DIMENSION),
    pa.list_(pa.float16()),
]


@pytest.mark.parametrize("kind", LISTS, ids=str)
@pytest.mark.parametrize("labels", [None, IDS, list(range(ROWS)), pa.array(IDS, pa.large_string())], ids=type)
def test_every_kind_of_parquet_column(kind: Any, labels: Any, tmp_path: Path) -> None:
    half = kind == pa.list_(pa.float16())
    matrix = MATRIX.astype(np.float16) if half else MATRIX
    columns: dict[str, Any] = {"vector": pa.array(list(matrix), kind)}
    file = opened(parquet(tmp_path, columns if labels is None else {"label": labels} | columns))
    assert file.dimension == DIMENSION
    wanted = [20, 3, 3, 11]
    names = ["x"] * 4 if labels is None else [str(pa.array(labels)[row].as_py()) for row in wanted]
    found, differing = file.of(names, [[]] * 4, [[row] for row in wanted])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, matrix[wanted].astype(np.float32))
    assert differing == 0


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_every_kind_of_npy(kind: Any, tmp_path: Path) -> None:
    found, _ = by_row(opened(npy(tmp_path, MATRIX.astype(kind))), [[20], [3], [3]])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, MATRIX.astype(kind)[[20, 3, 3]].astype(np.float32))


def test_row_groups_that_do_not_fit_into_memory_are_refused(tmp_path: Path) -> None:
    matrix = np.zeros((4_000, 100))
    for group, fits in ((4_000, False), (1_000, True)):
        path = parquet(tmp_path, {"vector": list(matrix)}, group)
        if fits:
            assert opened(path, 4_000, 2**21).dimension == 100
        else:
            with pytest.raises(BudgetError, match="smaller row groups") as refused:
                opened(path, 4_000, 2**21)
            assert refused.value.needed >= matrix.nbytes


def test_fortran_order_is_read_right(tmp_path: Path) -> None:
    found, _ = by_row(opened(npy(tmp_path, np.asfortranarray(MATRIX))), [[7], [0]])
    np.testing.assert_array_equal(found, MATRIX[[7, 0]])


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=3, unique=True), max_size=8),
    group=st.integers(1, ROWS),
)
def test_by_row_in_any_order(rows: list[list[int]], group: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    matrix = MATRIX.copy()
    matrix[1::2] = matrix[0]  # some duplicates have equal vectors, some have not
    folder = tmp_path_factory.mktemp("v")
    expected = sum(any((matrix[own[0]] != matrix[row]).any() for row in own[1:]) for own in rows)
    for path in (npy(folder, matrix), parquet(folder, {"vector": list(matrix)}, group)):
        found, differing = by_row(opened(path), rows)
        np.testing.assert_array_equal(found, matrix[[own[0] for own in rows]])
        assert differing == expected


@settings(max_examples=30, deadline=None)
@given(
    names=st.lists(st.lists(st.integers(0, ROWS + 3), min_size=1, max_size=3, unique=True), max_size=8),
    order=st.permutations(range(ROWS)),
)
def test_by_id_in_any_order(names: list[list[int]], order: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    matrix = MATRIX.copy()
    matrix[1::2] = matrix[0]
    names = [own for own in names if own[0] < ROWS]  # other ids need no vector
    path = parquet(tmp_path_factory.mktemp("v"), {"id": [IDS[i] for i in order], "vector": list(matrix[order])})
    found, differing = opened(path, rows=999).of(
        [IDS[own[0]] for own in names], [[f"id {i}" for i in own[1:]] for own in names], [[-1]] * len(names)
    )
    np.testing.assert_array_equal(found, matrix[[own[0] for own in names]])
    assert differing == sum(any((matrix[own[0]] != matrix[i]).any() for i in own[1:] if i < ROWS) for own in names)


@pytest.mark.parametrize("compared", [1, 3 * DIMENSION, 10**6])
def test_repeats_are_compared_some_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compared: int) -> None:
    monkeypatch.setattr("negpipe.encoders.precomputed._COMPARED", compared)
    matrix = MATRIX.copy()
    matrix[10:] = matrix[0]
    same, other, mixed = [0, *range(10, ROWS)], [1, 2], [3, *range(10, ROWS), 3]
    assert by_row(opened(npy(tmp_path, matrix)), [same, other, [4], mixed])[1] == 2
    # By id: twice the same vectors, and of the last one another.
    twice = np.concatenate([matrix, matrix])
    columns: dict[str, Any] = {"id": [*IDS, *IDS], "vector": list(twice)}
    ids = [IDS[0], IDS[1], IDS[4]]
    others = [[IDS[row] for row in own[1:]] for own in (same, other, [4])]
    assert opened(parquet(tmp_path, columns), rows=999).of(ids, others, [[-1]] * 3)[1] == 1
    twice[-1] += 1
    columns["vector"] = list(twice)
    with pytest.raises(InputError, match="appears again with a different vector"):
        opened(parquet(tmp_path, columns), rows=999)


def test_rows_that_the_source_has_not_are_no_duplicates(tmp_path: Path) -> None:
    # A positive from outside the corpus with a corpus row's text: -1 stands for "no row in the source".
    found, differing = by_row(opened(npy(tmp_path)), [[2, -1]])
    np.testing.assert_array_equal(found, MATRIX[[2]])
    assert differing == 0


def test_a_repeated_id_with_one_vector_is_fine(tmp_path: Path) -> None:
    path = parquet(tmp_path, {"id": [*IDS, IDS[2]], "vector": [*MATRIX, MATRIX[2]]})
    found, _ = opened(path).of([IDS[2]], [[]], [[0]])
    np.testing.assert_array_equal(found, MATRIX[[2]])


def broken(found: InputError) -> tuple[int | None, str | None, str]:
    return found.row, found.field, found.problem


@pytest.mark.parametrize(
    ("columns", "row", "field", "fragment"),
    [
        ({"id": [*IDS, IDS[2]], "vector": [*MATRIX, MATRIX[3]]}, 23, "id", "the id of row 2 appears again"),
        ({"id": [*IDS[:8], None, *IDS[9:]], "vector": list(MATRIX)}, 8, "id", "there is no id"),
        ({"vector": [*MATRIX[:12], MATRIX[0][:3], *MATRIX[13:]]}, 12, "vector", "a vector of 4 numbers"),
        ({"vector": [*MATRIX[:12], None, *MATRIX[13:]]}, 12, "vector", "a vector of 4 numbers"),
        ({"vector": [*MATRIX[:2], MATRIX[0][:3], *MATRIX[3:]]}, 2, "vector", "a vector of 4 numbers"),
        ({"vector": pa.array([[]] * ROWS, pa.list_(pa.float32()))}, 0, "vector", "a vector of 1 numbers"),
        ({"a": list(MATRIX), "b": list(MATRIX)}, None, "encoder.corpus_vectors", "found a, b"),
        ({"a": IDS, "b": IDS, "v": list(MATRIX)}, None, "encoder.corpus_vectors", "at most one id column"),
        ({"id": IDS}, None, "encoder.corpus_vectors", "one column of float lists"),
        ({"v": [[1, 2]] * ROWS}, None, "encoder.corpus_vectors", "one column of float lists"),
        ({"v": list(MATRIX[:5])}, None, "encoder.corpus_vectors", "5 vectors for 23 rows"),
        ({"v": pa.array([], pa.list_(pa.float32()))}, None, "encoder.corpus_vectors", "the file contains no vectors"),
    ],
)
def test_what_is_wrong_with_a_parquet_file(
    columns: dict[str, Any], row: int | None, field: str, fragment: str, tmp_path: Path
) -> None:
    path = parquet(tmp_path, columns)
    with pytest.raises(InputError) as caught:
        by_row(opened(path), [[row] for row in range(ROWS)])
    assert caught.value.file == str(path)
    assert (caught.value.row, caught.value.field) == (row, field)
    assert fragment in caught.value.problem


@pytest.mark.parametrize(
    ("matrix", "fragment"),
    [
        (np.ones(ROWS, np.float32), "shape (23,)"),
        (np.ones((ROWS, 2, 2), np.float32), "shape (23, 2, 2)"),
        (np.ones((ROWS, 0), np.float32), "shape (23, 0)"),
        (np.ones((ROWS, 2), np.int8), "found int8"),
        (np.ones((ROWS, 2), complex), "found complex128"),
        (np.full((ROWS, 2), "x"), "found <U1"),
        (np.full((ROWS, 2), None), "not a readable .npy file"),  # would have to be unpickled
        (np.ones((ROWS - 1, 2), np.float32), "22 vectors for 23 rows"),
    ],
)
def test_what_is_wrong_with_a_npy_file(matrix: Any, fragment: str, tmp_path: Path) -> None:
    path = npy(tmp_path, matrix)
    with pytest.raises(InputError, match=r"encoder\.corpus_vectors") as caught:
        opened(path)
    assert caught.value.file == str(path)
    assert fragment in caught.value.problem


@pytest.mark.parametrize(("name", "fragment"), [("v.npy", "not a readable .npy"), ("v.parquet", "not a readable Parq")])
@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_a_file_that_is_none(name: str, fragment: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=fragment):
        opened(tmp_path / name)


@pytest.mark.parametrize("cut", [40, 200])
def test_a_file_that_is_cut_off(cut: int, tmp_path: Path) -> None:
    for path in (npy(tmp_path), parquet(tmp_path, {"id": IDS, "vector": list(MATRIX)})):
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(InputError, match="not a readable"):
            opened(path)


@pytest.mark.parametrize("bit", [1, 64, 128])
def test_any_flipped_bit_of_a_header_is_explained(bit: int, tmp_path: Path) -> None:
    """numpy parses headers as Python, and raises whatever Python's parser does."""
    path = npy(tmp_path)
    whole = path.read_bytes()
    refused = 0
    for place in range(len(whole) - MATRIX.nbytes):
        content = bytearray(whole)
        content[place] ^= bit
        path.write_bytes(content)
        try:
            opened(path)
        except InputError:
            refused += 1
    assert refused > 60


def test_another_kind_of_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"vectors must be \.npy or \.parquet"):
        opened(tmp_path / "v.pt")


def test_missing_vectors_are_named(tmp_path: Path) -> None:
    path = parquet(tmp_path, {"id": IDS[2:], "vector": list(MATRIX[2:])})
    with pytest.raises(InputError, match=r"no vector for id 'id 1' \(and 1 more in this part\)"):
        opened(path).of(["id 5", "id 1", "id 0"], [[]] * 3, [[5], [1], [0]])
    with pytest.raises(InputError, match="positive 'p' is not in the corpus, so it has no vector"):
        opened(npy(tmp_path)).of(["a", "p"], [[]] * 2, [[5], [-1]])
