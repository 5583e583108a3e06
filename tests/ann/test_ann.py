"""Streamed exact search against brute force: every pair scored, ordered by (-score, row)."""

from __future__ import annotations

import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stand_ins import on_device

from negpipe import ann
from negpipe.ann.products import BFloat16, Float32
from negpipe.engine.budget import Budget
from negpipe.errors import ConfigError, DamagedError, StorageError

NO_PAIRS = (np.empty(0, np.int64), np.empty(0, np.int64))
ROOMY = 2**30


def save_parts(folder: Path, vectors: np.ndarray, part_rows: int) -> ann.Vectors:
    paths = []
    for start in range(0, len(vectors), part_rows):
        paths.append(folder / f"{start:09d}.npy")
        np.save(paths[-1], vectors[start : start + part_rows])
    return ann.open_parts(paths)


def save_flat(path: Path, vectors: ann.Vectors) -> ann.Vectors:
    with path.open("wb") as file:
        ann.write_flat(file, vectors)
    return ann.open_flat(path)


def brute_force(anchors: np.ndarray, vectors: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
    anchor_of, row_of = (index.ravel() for index in np.indices((len(anchors), len(vectors))))
    scores = ann.pair_scores(anchors, anchor_of, vectors, row_of).reshape(len(anchors), -1)
    rows = np.full((len(anchors), depth), -1, np.int64)
    best = np.full((len(anchors), depth), -np.inf, np.float32)
    for number, score in enumerate(scores):
        order = np.lexsort((np.arange(len(score)), -score))[:depth]
        rows[number, : len(order)], best[number, : len(order)] = order, score[order]
    return rows, best


def check(found: ann.Found, anchors: np.ndarray, vectors: np.ndarray, depth: int) -> None:
    rows, scores = brute_force(anchors, vectors.astype(np.float32), depth)
    assert found.rows.dtype == np.int64 and found.scores.dtype == np.float32
    assert found.rows.tobytes() == rows.tobytes()
    assert found.scores.tobytes() == scores.tobytes()


def make(rng: np.random.Generator, rows: int, dimension: int, distinct: int | None = None) -> np.ndarray:
    """Random vectors; with `distinct`, each of that many repeated in random order."""
    made = rng.standard_normal((distinct or rows, dimension)).astype(np.float32)
    return made if distinct is None else made[rng.integers(0, distinct, rows)]


@pytest.fixture(params=[Float32, BFloat16, on_device], autouse=True)
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, whatever this machine would choose."""
    monkeypatch.setattr(ann.exact, "arithmetic", lambda *about: request.param())


@settings(max_examples=35, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 400),
    anchors=st.integers(1, 20),
    dimension=st.integers(1, 40) | st.sampled_from([768, 1_024]),
    depth=st.integers(1, 450),
    part_rows=st.integers(1, 150),
    distinct=st.none() | st.integers(1, 5),
    scale=st.sampled_from([1.0, 1e-4, 100.0]),
    mixed=st.booleans(),
    half=st.booleans(),
    flat=st.booleans(),
    threads=st.integers(1, 3),
)
def test_small_corpora_equal_brute_force(
    seed: int,
    rows: int,
    anchors: int,
    dimension: int,
    depth: int,
    part_rows: int,
    distinct: int | None,
    scale: float,
    mixed: bool,
    half: bool,
    flat: bool,
    threads: int,
) -> None:
    rng = np.random.default_rng(seed)
    vectors = (make(rng, rows, dimension, distinct) * np.float32(scale)).astype(np.float16 if half else np.float32)
    queries = make(rng, anchors, dimension)
    if mixed:  # short ones, long ones, zeros
        vectors = vectors * rng.choice([0, 1e-3, 1, 30], (rows, 1)).astype(vectors.dtype)
        queries = queries * rng.choice([0, 1e-18, 1, 1e9], (anchors, 1)).astype(np.float32)
    with TemporaryDirectory() as name:
        stored = save_parts(Path(name), vectors, part_rows)
        if flat:
            stored = save_flat(Path(name) / "flat.index", stored)
        assert (stored.rows, stored.dimension) == vectors.shape
        found = ann.search_exact(queries, stored, depth, positives=NO_PAIRS, budget=Budget(ROOMY, threads))
    check(found, queries, vectors, depth)


@pytest.fixture(scope="module")
def corpus() -> np.ndarray:
    """12,000 unit vectors, sorted so that neighbours lie together, 3,000 of them the same one."""
    rng = np.random.default_rng(5)
    vectors = make(rng, 12_000, 24)
    vectors[4_000:7_000] = vectors[0]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors[np.argsort(vectors[:, 0], kind="stable")].astype(np.float16)


@pytest.mark.slow
@pytest.mark.guarantee("workers, threads, blocks and memory change no byte")
@pytest.mark.parametrize("depth", [1, 60, 3_500])
def test_bytes_do_not_depend_on_blocks_memory_threads_or_storage(
    corpus: np.ndarray, tmp_path: Path, depth: int
) -> None:
    queries = make(np.random.default_rng(6), 90, 24)
    # Anchors that point at the 3,000 equal vectors: their cut falls into a tie that no slack would cover.
    queries[:20] = corpus[6_000] if depth < 3_000 else -corpus[6_000].astype(np.float32)
    parts = save_parts(tmp_path, corpus, 1_999)
    flat = save_flat(tmp_path / "flat.index", parts)
    least = 40 * 2**20 + 90 * depth * 100
    for vectors, memory, threads in ((parts, ROOMY, 2), (flat, ROOMY, 1), (parts, least, 1), (flat, least, 3)):
        found = ann.search_exact(queries, vectors, depth, positives=NO_PAIRS, budget=Budget(memory, threads))
        check(found, queries, corpus, depth)


@pytest.mark.slow
@pytest.mark.parametrize("block_rows", [1, 7, 1_024, 1_025, 5_000])
def test_any_block_size(corpus: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_rows: int) -> None:
    rows = corpus[: min(len(corpus), 600 * block_rows)]
    queries = make(np.random.default_rng(7), 11, 24)
    seen: list[int] = []
    monkeypatch.setattr(ann.exact, "_BLOCK_ROWS", block_rows)
    vectors = save_parts(tmp_path, rows, 1_000)
    found = ann.search_exact(queries, vectors, 50, positives=NO_PAIRS, budget=Budget(ROOMY, 2), progress=seen.append)
    check(found, queries, rows, 50)
    assert sum(seen) == len(rows) and max(seen) <= block_rows


@pytest.mark.parametrize("block_rows", [3_000, 12_000])
def test_a_wrong_guess_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_rows: int) -> None:
    monkeypatch.setattr(ann.exact, "_BLOCK_ROWS", block_rows)
    rng = np.random.default_rng(8)
    queries = make(rng, 30, 24)
    corpus = make(rng, 12_000, 24)
    # The sample is every fourth row: for the first anchors it promises more than there is, for the next ones less.
    corpus[::4] = queries[rng.integers(0, 10, 3_000)] + 0.1 * corpus[::4]
    corpus[1::4] = queries[rng.integers(10, 20, 3_000)] + 0.1 * corpus[1::4]
    found = ann.search_exact(
        queries, save_parts(tmp_path, corpus, 5_000), 100, positives=NO_PAIRS, budget=Budget(ROOMY, 2)
    )
    check(found, queries, corpus, 100)


@pytest.mark.guarantee("`flat` and `stream` are exact")
def test_scores_closer_than_rounding_are_ordered_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ann.exact, "_BLOCK_ROWS", 500)
    rng = np.random.default_rng(11)
    vectors = make(rng, 1, 300) * (1 + rng.integers(-3, 4, (4_000, 300)) * np.float32(2**-23)).astype(np.float32)
    queries = make(rng, 40, 300)
    stored = save_parts(tmp_path, vectors, 1_000)
    found = ann.search_exact(queries, stored, 50, positives=NO_PAIRS, budget=Budget(ROOMY, 2))
    check(found, queries, vectors, 50)


@pytest.mark.parametrize("candidates", [0, 1, 700, 1499, 1500])
def test_rows_that_are_no_candidates_only_have_positive_scores(
    corpus: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, candidates: int
) -> None:
    vectors, anchors = corpus[::8], corpus[:20].astype(np.float32)
    monkeypatch.setattr(ann.exact, "_BLOCK_ROWS", 256)
    pairs = np.arange(len(anchors)), np.full(len(anchors), len(vectors) - 1)
    stored = save_parts(tmp_path, vectors, 400)
    found = ann.search_exact(anchors, stored, 20, positives=pairs, candidates=candidates, budget=Budget(ROOMY, 2))
    check(found, anchors, vectors[:candidates], 20)
    expected = ann.pair_scores(anchors, pairs[0], vectors.astype(np.float32), pairs[1])
    assert found.positive_scores.tobytes() == expected.tobytes()


def test_positive_scores_are_those_of_pair_scores(
    corpus: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ann.exact, "_BLOCK_ROWS", 1_000)
    rng = np.random.default_rng(9)
    queries = make(rng, 40, 24)
    pairs = rng.integers(0, 40, 500), rng.integers(0, len(corpus), 500)
    found = ann.search_exact(queries, save_parts(tmp_path, corpus, 999), 5, positives=pairs, budget=Budget(ROOMY, 2))
    expected = ann.pair_scores(queries, pairs[0], corpus.astype(np.float32), pairs[1])
    assert found.positive_scores.tobytes() == expected.tobytes()


@given(seed=st.integers(0, 2**32 - 1), dimension=st.integers(1, 800), pairs=st.integers(1, 60))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pair_scores_are_inner_products_with_bits_of_their_own(seed: int, dimension: int, pairs: int) -> None:
    rng = np.random.default_rng(seed)
    anchors, vectors = make(rng, 20, dimension), make(rng, 30, dimension)
    anchor_of, row_of = rng.integers(0, 20, pairs), rng.integers(0, 30, pairs)
    scores = ann.pair_scores(anchors, anchor_of, vectors, row_of)
    exact = np.einsum("ij,ij->i", anchors[anchor_of].astype(np.float64), vectors[row_of].astype(np.float64))
    lengths = np.linalg.norm(anchors[anchor_of], axis=1) * np.linalg.norm(vectors[row_of], axis=1)
    assert (np.abs(scores - exact) <= dimension * 2.0**-24 * lengths).all()
    order = rng.permutation(pairs)
    assert ann.pair_scores(anchors, anchor_of[order], vectors, row_of[order]).tobytes() == scores[order].tobytes()
    alone = [ann.pair_scores(anchors[a : a + 1], np.zeros(1, np.int64), vectors[r : r + 1], np.zeros(1, np.int64))[0]
             for a, r in zip(anchor_of, row_of, strict=True)]  # fmt: skip
    assert np.array(alone).tobytes() == scores.tobytes()


def test_equal_scores_of_zero_have_equal_bits() -> None:
    anchors, vectors = np.array([[1.0]], np.float32), np.array([[0.0], [-0.0]], np.float32)
    pair = np.zeros(2, np.int64), np.arange(2)
    assert not np.signbit(ann.pair_scores(anchors, pair[0], vectors, pair[1])).any()


def test_pairs_out_of_range_are_refused() -> None:
    vectors = np.ones((3, 4), np.float32)
    for anchor, row in ((0, 3), (3, 0), (-1, 0), (0, -1)):
        with pytest.raises(IndexError):
            ann.pair_scores(vectors, np.array([anchor]), vectors, np.array([row]))


def test_flat_file_opens_in_faiss(corpus: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "flat.index"
    vectors = save_flat(path, save_parts(tmp_path, corpus, 5_000))
    index = faiss.read_index(str(path))
    assert isinstance(index, faiss.IndexFlatIP) and index.ntotal == len(corpus)
    assert index.reconstruct_n(0, len(corpus)).tobytes() == corpus.astype(np.float32).tobytes()
    buffer = BytesIO()
    ann.write_flat(buffer, vectors)
    assert buffer.getvalue() == path.read_bytes()

    queries = make(np.random.default_rng(10), 300, 24)
    found = ann.search_exact(queries, vectors, 20, positives=NO_PAIRS, budget=Budget(ROOMY, 2))
    scores, _ = index.search(queries, 20)
    np.testing.assert_allclose(found.scores, scores, atol=1e-5)


def test_empty_corpus_and_no_anchors(corpus: np.ndarray, tmp_path: Path) -> None:
    empty = save_flat(tmp_path / "flat.index", ann.Vectors((), 24))
    assert (empty.rows, empty.dimension) == (0, 24)
    found = ann.search_exact(np.ones((2, 24), np.float32), empty, 3, positives=NO_PAIRS, budget=Budget(ROOMY, 1))
    assert (found.rows == -1).all() and np.isneginf(found.scores).all()
    vectors = save_parts(tmp_path, corpus, 5_000)
    found = ann.search_exact(np.ones((0, 24), np.float32), vectors, 3, positives=NO_PAIRS, budget=Budget(ROOMY, 2))
    assert found.rows.shape == found.scores.shape == (0, 3)


def test_damaged_flat_files(corpus: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "flat.index"
    save_flat(path, save_parts(tmp_path, corpus, 5_000))
    whole = path.read_bytes()
    wrong_count = whole[:8] + (len(corpus) - 1).to_bytes(8, "little") + whole[16:]
    for broken in (whole[:-1], whole + b"\0", whole[:20], b"", b"IxF2" + whole[4:], wrong_count):
        path.write_bytes(broken)
        with pytest.raises(DamagedError, match=r"flat\.index"):
            ann.open_flat(path)
    with pytest.raises(DamagedError, match="absent"):
        ann.open_flat(tmp_path / "absent")


def test_damaged_parts(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.npy", tmp_path / "bad.npy"
    np.save(good, np.ones((5, 4), np.float16))
    whole = good.read_bytes()
    for content in (whole[:-1], b"", b"no array"):
        bad.write_bytes(content)
        with pytest.raises(DamagedError, match=r"bad\.npy"):
            ann.open_parts([good, bad])
    for array in (np.ones((5, 3), np.float16), np.ones((5, 4)), np.ones(4, np.float16), np.ones((), np.float16)):
        np.save(bad, array)
        with pytest.raises(DamagedError, match=r"bad\.npy"):
            ann.open_parts([good, bad])
    with pytest.raises(DamagedError, match="absent"):
        ann.open_parts([tmp_path / "absent.npy"])


def test_file_cut_off_after_opening(tmp_path: Path) -> None:
    vectors = save_parts(tmp_path, np.ones((50, 4), np.float32), 20)
    path = vectors.files[1].path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedError, match=path.name):
        ann.search_exact(np.ones((1, 4), np.float32), vectors, 3, positives=NO_PAIRS, budget=Budget(ROOMY, 1))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e20])
def test_vectors_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    rows = np.ones((50, 4), np.float32)
    rows[33, 2] = value
    vectors = save_parts(tmp_path, rows, 20)
    anchors = np.ones((3, 4), np.float32)
    with pytest.raises(DamagedError, match=r"000000020\.npy, row 13"):
        ann.search_exact(anchors, vectors, 3, positives=NO_PAIRS, budget=Budget(ROOMY, 1))
    anchors[1, 0] = value
    with pytest.raises(DamagedError, match="anchor 1"):
        ann.search_exact(anchors, vectors, 3, positives=NO_PAIRS, budget=Budget(ROOMY, 1))


def test_too_little_memory_names_the_setting(corpus: np.ndarray, tmp_path: Path) -> None:
    vectors = save_parts(tmp_path, corpus, 5_000)
    with pytest.raises(ConfigError, match=r"resources\.memory_budget"):
        ann.search_exact(np.ones((90, 24), np.float32), vectors, 60, positives=NO_PAIRS, budget=Budget(2**18, 2))


def test_importing_the_module_imports_no_faiss() -> None:
    code = "import sys, negpipe.ann; sys.exit('faiss' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_checkpoint_is_left_once_searches_have_taken_long(corpus: np.ndarray, tmp_path: Path) -> None:
    queries, stored = make(np.random.default_rng(5), 4, 24), save_parts(tmp_path, corpus[:600], 300)
    none = np.empty(0, np.int64), np.empty(0, np.int64)
    for ago, left in ((0, False), (301, True)):
        checkpoint = ann.Checkpoint(tmp_path / "books" / f"{ago}.npz", since=time.monotonic() - ago)
        found = ann.search_exact(queries, stored, 9, positives=none, budget=Budget(ROOMY, 1), checkpoint=checkpoint)
        assert checkpoint.path.exists() is left
    (tmp_path / "gone").mkdir()
    stored = save_parts(tmp_path / "gone", corpus[:600] * np.nan, 300)  # nothing is read again
    again = ann.search_exact(queries, stored, 9, positives=none, budget=Budget(ROOMY, 1), checkpoint=checkpoint)
    assert again.rows.tobytes() == found.rows.tobytes()


def test_a_checkpoint_without_room_is_done_without(
    corpus: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: Any) -> None:
        raise StorageError("cannot write: no space left on the device")

    monkeypatch.setattr(ann.exact, "publish", full)
    queries, stored = make(np.random.default_rng(5), 4, 24), save_parts(tmp_path, corpus[:600], 300)
    none = np.empty(0, np.int64), np.empty(0, np.int64)
    checkpoint = ann.Checkpoint(tmp_path / "key.npz", seconds=0)
    ann.search_exact(queries, stored, 9, positives=none, budget=Budget(ROOMY, 1), checkpoint=checkpoint)
    assert "cannot write a checkpoint: cannot write: no space left on the device" in caplog.text


def test_a_search_goes_on_from_its_checkpoint(
    corpus: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ann.exact, "_BLOCK_ROWS", 700)
    queries = make(np.random.default_rng(5), 40, 24)
    pairs = np.arange(40), np.arange(0, 4_000, 100)
    stored = save_parts(tmp_path, corpus[:6_000], 1_000)
    fresh = ann.search_exact(queries, stored, 50, positives=pairs, budget=Budget(ROOMY, 2))

    class Stopped(Exception): ...

    def stop(rows: int) -> None:
        seen.append(rows)
        if sum(seen) > 3_000:
            raise Stopped

    checkpoint = ann.Checkpoint(tmp_path / "books" / "key.npz", seconds=0)
    seen: list[int] = []
    with pytest.raises(Stopped):
        ann.search_exact(
            queries, stored, 50, positives=pairs, budget=Budget(ROOMY, 2), progress=stop, checkpoint=checkpoint
        )
    resumed: list[int] = []
    monkeypatch.setattr(ann.exact, "_BLOCK_ROWS", 450)  # another machine, another budget
    found = ann.search_exact(
        queries, stored, 50, positives=pairs, budget=Budget(ROOMY, 1), progress=resumed.append, checkpoint=checkpoint
    )
    assert resumed[0] == 2_800 and max(resumed[1:]) <= 450 and sum(resumed) == 6_000
    for one, other in ((found.rows, fresh.rows), (found.scores, fresh.scores)):
        assert one.tobytes() == other.tobytes()
    assert found.positive_scores.tobytes() == fresh.positive_scores.tobytes()
    checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:-50])
    again = ann.search_exact(queries, stored, 50, positives=pairs, budget=Budget(ROOMY, 2), checkpoint=checkpoint)
    assert again.rows.tobytes() == fresh.rows.tobytes()
