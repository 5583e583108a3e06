"""Approximate indexes: the true top of the lists probed, whatever the threads; shards are whole FAISS indexes."""

from __future__ import annotations

import io
import os
import tracemalloc
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from stand_ins import on_device

from negpipe import ann
from negpipe.ann import clusters, coded, factory
from negpipe.ann import lists as listed
from negpipe.ann.groups import in_groups
from negpipe.ann.pairs import pair_scores, rows_of
from negpipe.ann.products import BFloat16, Float32
from negpipe.engine.budget import Budget
from negpipe.errors import BudgetError, DamagedError

pytestmark = pytest.mark.slow

ROOMY = 2**31
DIMENSION = 24


@pytest.fixture(params=[Float32, BFloat16, on_device], autouse=True)
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """All of them, whatever this machine would choose."""
    for module in (listed, clusters, factory):
        monkeypatch.setattr(module, "arithmetic", lambda *about: request.param())
    return request.param


def clustered(rows: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(60, DIMENSION))
    vectors = centres[rng.integers(0, len(centres), rows)] + 0.4 * rng.normal(size=(rows, DIMENSION))
    vectors[rng.integers(0, rows, rows // 10)] = vectors[rng.integers(0, rows, rows // 10)]  # ties
    made: np.ndarray = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    return made


def build(folder: Path, rows: np.ndarray, kind: str, shard_rows: int, threads: int = 2) -> list[tuple[Path, int]]:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "part.npy", rows)
    vectors = ann.open_parts([folder / "part.npy"])
    sample = factory.sample(vectors, max(1, factory.rows_wanted(kind, DIMENSION, len(rows))), 1)
    trained = factory.train(kind, sample, seed=1, threads=threads)
    with (folder / "trained.faiss").open("wb") as file:
        factory.write(trained, file)
    shards = []
    for first in range(0, len(rows), shard_rows):
        index = faiss.read_index(str(folder / "trained.faiss"))
        np.save(folder / f"shard-{first}.npy", rows[first : first + shard_rows])
        part = ann.open_parts([folder / f"shard-{first}.npy"])
        factory.fill(index, part, threads=threads)
        path = folder / f"shard-{first}.faiss"
        with path.open("wb") as file:
            factory.write(index, file)
        shards.append((path, first))
    return shards


def test_each_list_is_read_once_for_all_anchors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, anchors = clustered(6_000, 1), clustered(150, 2).astype(np.float32)
    lists = listed.open_lists(build(tmp_path, corpus, "IVF20,Flat", 2_500), corpus[:64].astype(np.float32))
    read, reads = listed._Shard.read, []

    def counted(shard: Any, number: int, *more: Any) -> None:
        reads.append((shard.path, number))
        read(shard, number, *more)

    monkeypatch.setattr(listed._Shard, "read", counted)
    # So small a sample gives no guess that could fail, which would read lists again.
    listed.search_lists(anchors, lists, 40, 20, budget=Budget(ROOMY, 2))
    assert sorted(reads) == [(shard.path, number) for shard in lists.shards for number in range(20)]


class Reluctant(io.FileIO):
    """A file of a network file system, which may give fewer bytes than it is asked for."""

    MOST = 1000

    def readinto(self, room: Any) -> int:
        return super().readinto(memoryview(room).cast("B")[: self.MOST]) or 0


def test_a_list_that_comes_in_pieces_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = clustered(3_000, 1)
    lists = listed.open_lists(build(tmp_path, corpus, "IVF4,Flat", 2_000), corpus[:64].astype(np.float32))
    room = np.empty((lists.longest, DIMENSION), np.float32)
    whole = [[values.tobytes() for values in lists.read(number, room)] for number in range(4)]
    assert max(len(vectors) for vectors, _ in whole) > 10 * Reluctant.MOST
    preadv = os.preadv

    def opened(path: Path, mode: str = "r", buffering: int = -1, *rest: Any) -> Any:
        raw = Reluctant(path)
        return raw if buffering == 0 else io.BufferedReader(raw)

    with monkeypatch.context() as patch:
        patch.setattr(io, "open", opened)
        patch.setattr(os, "preadv", lambda handle, room, at: preadv(handle, [room[0].cast("B")[: Reluctant.MOST]], at))
        pieces = [[values.tobytes() for values in lists.read(number, room)] for number in range(4)]
        numbers = [lists.ids(number).tobytes() for number in range(4)]
    assert pieces == whole
    assert numbers == [ids for _, ids in whole]


@pytest.mark.slow
def test_a_list_of_more_than_two_gibibytes_is_read_whole(tmp_path: Path) -> None:
    """The system reads 2**31 - 4096 bytes at a time, whatever it is asked for."""
    path, rows, first = tmp_path / "shard.faiss", 2**26 // DIMENSION * 8 + 100, 96
    last = np.arange(DIMENSION, dtype=np.float32)
    with path.open("wb") as file:  # all but the last vector and the id are a hole
        file.seek(first + (rows - 1) * last.nbytes)
        file.write(last.tobytes() + np.int64(7).tobytes())
    shard = listed._Shard(path, 0, np.array([rows]), np.array([first]))
    vectors, ids = np.empty((rows, DIMENSION), np.float32), np.empty(1, np.int64)
    assert vectors.nbytes > 2**31
    shard.read(0, 0, vectors, ids)
    assert vectors[-1].tolist() == last.tolist()
    assert not vectors[-1000:-1].any()
    assert ids.tolist() == [7]


@pytest.mark.parametrize("nprobe", [1, 3, 20])
@pytest.mark.parametrize("sampled", [64, 2_000])
def test_the_true_top_of_the_lists_probed(tmp_path: Path, nprobe: int, sampled: int) -> None:
    corpus, anchors = clustered(6_000, 1), clustered(150, 2).astype(np.float32)
    shards = build(tmp_path, corpus, "IVF20,Flat", 2_500)
    lists = listed.open_lists(shards, corpus[:sampled].astype(np.float32))
    rows, scores = listed.search_lists(anchors, lists, 40, nprobe, budget=Budget(ROOMY, 2))

    # FAISS says which list holds a row and which lists are nearest; plain numpy ranks what they hold.
    members = {number: set(lists.ids(number).tolist()) for number in range(20)}
    assert sorted(row for of in members.values() for row in of) == list(range(len(corpus)))
    index = faiss.read_index(str(shards[0][0]))
    nearest = index.quantizer.search(anchors, nprobe)[1]
    for anchor in range(len(anchors)):
        allowed = np.array(sorted(set().union(*(members[number] for number in nearest[anchor].tolist()))))
        own = ann.pair_scores(anchors, np.full(len(allowed), anchor), corpus.astype(np.float32), allowed)
        order = np.lexsort((allowed, -own))[:40]
        assert rows[anchor][: len(order)].tolist() == allowed[order].tolist()
        assert scores[anchor][: len(order)].tobytes() == own[order].tobytes()
        assert (rows[anchor][len(order) :] == -1).all()


def test_bytes_do_not_depend_on_threads_or_the_sample(tmp_path: Path) -> None:
    corpus, anchors = clustered(6_000, 1), clustered(150, 2).astype(np.float32)
    found = []
    for threads in (1, 2, 3):
        shards = build(tmp_path / str(threads), corpus, "IVF20,Flat", 2_500, threads)
        lists = listed.open_lists(shards, corpus[:: threads * 7].astype(np.float32))
        rows, scores = listed.search_lists(anchors, lists, 40, 5, budget=Budget(ROOMY, threads))
        found.append((rows.tobytes(), scores.tobytes(), [path.read_bytes() for path, _ in shards]))
    assert found[0] == found[1] == found[2]


@pytest.mark.guarantee("`flat` and `stream` are exact")
def test_probing_every_list_is_exact(tmp_path: Path) -> None:
    corpus, anchors = clustered(3_000, 1), clustered(50, 2).astype(np.float32)
    shards = build(tmp_path, corpus, "IVF20,Flat", 10_000)
    lists = listed.open_lists(shards, corpus[:500].astype(np.float32))
    rows, scores = listed.search_lists(anchors, lists, 100, 20, budget=Budget(ROOMY, 2))
    vectors = ann.open_parts([tmp_path / "part.npy"])
    exact = ann.search_exact(anchors, vectors, 100, positives=factory.NO_PAIRS, budget=Budget(ROOMY, 2))
    assert rows.tobytes() == exact.rows.tobytes() and scores.tobytes() == exact.scores.tobytes()


def test_lists_of_vectors_longer_than_the_sample_lose_nothing_that_reaches_the_cut(
    tmp_path: Path, arithmetic: Any
) -> None:
    """Their products are off by more than those the common floors allow for."""
    corpus, anchors = clustered(3_000, 1), clustered(150, 2).astype(np.float32)
    short, depth = corpus[:500].astype(np.float32), 5
    corpus *= 40
    lists = listed.open_lists(build(tmp_path, corpus, "IVF20,Flat", 10_000), short)
    vectors = ann.open_parts([tmp_path / "part.npy"])
    exact = ann.search_exact(anchors, vectors, depth, positives=factory.NO_PAIRS, budget=Budget(ROOMY, 1))
    everywhere, cut = np.tile(np.arange(20), (len(anchors), 1)), exact.scores[:, -1].copy()
    best = listed._scan(anchors, lists, depth, everywhere, cut, arithmetic(), 1, lambda rows: None)
    assert np.array_equal(rows_of(np.sort(best, axis=1)), exact.rows)


def test_equal_vectors_wait_in_bounded_memory(tmp_path: Path) -> None:
    """All pairs reach the cut: 400 anchors with 20,000 rows in one list would be 128 MB of keys."""
    corpus, anchors = clustered(22_000, 1), clustered(400, 2).astype(np.float32)
    corpus[:20_000] = corpus[0]
    lists = listed.open_lists(build(tmp_path, corpus, "IVF20,Flat", 22_000), corpus[::100].astype(np.float32))
    tracemalloc.start()
    rows, _ = listed.search_lists(anchors, lists, 8, 20, budget=Budget(ROOMY, 1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    found = ann.search_exact(
        anchors, ann.open_parts([tmp_path / "part.npy"]), 8, positives=factory.NO_PAIRS, budget=Budget(ROOMY, 1)
    )
    assert rows.tobytes() == found.rows.tobytes()
    assert peak < 60e6


def test_what_is_found_for_all_groups_counts_as_memory() -> None:
    anchors, depth, each = np.zeros((20_000, 8), np.float32), 320, 20_000

    def search(group: np.ndarray, budget: Budget, progress: Any) -> tuple[np.ndarray, np.ndarray]:
        assert len(group) * each <= budget.memory
        return np.zeros((len(group), depth), np.int64), np.zeros((len(group), depth), np.float32)

    about: dict[str, Any] = {"each": each, "fixed": 0, "progress": lambda rows: None}
    tracemalloc.start()
    in_groups(anchors, search, depth, budget=Budget(90 * 2**20), **about)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 90 * 2**20
    with pytest.raises(BudgetError) as refused:
        in_groups(anchors, search, depth, budget=Budget(70 * 2**20), **about)
    assert refused.value.needed == 12 * len(anchors) * depth + each


def test_an_index_of_another_dimension_is_refused(tmp_path: Path) -> None:
    ((path, _),) = build(tmp_path, clustered(1_000, 1), "IVF4,Flat", 1_000)
    with pytest.raises(DamagedError, match=r"shard-0.faiss: holds dimension 24, the vectors have 8"):
        factory.read(path, 8)


@pytest.mark.parametrize("kind", ["IVF20,Flat", "IVF20,SQ8", "PQ8x4fs"])
def test_groups_of_anchors_change_nothing(tmp_path: Path, kind: str) -> None:
    """In little memory as many anchors are searched at a time as fit; what is reported adds up."""
    corpus, anchors = clustered(6_000, 1), clustered(3_000, 2).astype(np.float32)
    shards = build(tmp_path, corpus, kind, 2_500)
    vectors = ann.open_parts([tmp_path / "part.npy"])

    def search(memory: int) -> tuple[bytes, bytes, int]:
        seen: list[int] = []
        about: dict[str, Any] = {"budget": Budget(memory), "progress": seen.append}
        if kind == "IVF20,Flat":
            lists = listed.open_lists(shards, corpus[::10].astype(np.float32))
            rows, scores = listed.search_lists(anchors, lists, 40, 5, **about)
        else:
            opened = coded.open_shards(shards, DIMENSION)
            rows, scores = coded.search_coded(
                anchors, opened, vectors, 40, effort_value=5 if "IVF" in kind else None, proposed=200, **about
            )  # fmt: skip
        return rows.tobytes(), scores.tobytes(), sum(seen)

    least = 40 * 2**20 if kind == "IVF20,Flat" else 6 * 2**20
    assert search(ROOMY) == search(least)
    with pytest.raises(BudgetError):
        search(2**20)


@pytest.mark.guarantee("workers, threads, blocks and memory change no byte")
@pytest.mark.parametrize("kind", ["IVF20,Flat", "IVF20,SQ8", "OPQ4,IVF8,PQ4x4fs", "PCA8,SQ8", "HNSW8"])
def test_threads_change_no_byte_of_an_index(tmp_path: Path, kind: str) -> None:
    rows = clustered(3_000, 5)
    made = {
        threads: [path.read_bytes() for path, _ in build(tmp_path / str(threads), rows, kind, 2_000, threads)]
        for threads in (1, 3)
    }
    assert made[1] == made[3]


def test_codes_are_not_trained_for_a_search_that_is_not_used() -> None:
    """Polysemous training takes minutes, and FAISS does it for every PQ of a factory string."""
    for kind in ("PQ8", "IVF4,PQ8", "OPQ8,IVF4,PQ8"):
        index = factory.make(kind, DIMENSION)
        assert factory.inner(index).do_polysemous_training is False


def test_lists_are_as_good_as_those_of_faiss() -> None:
    rows = clustered(5_000, 6).astype(np.float32)

    def gained(centres: np.ndarray) -> float:
        return float((rows @ centres.T).max(axis=1).sum())

    def theirs(seed: int) -> np.ndarray:
        index = faiss.index_factory(DIMENSION, "IVF40,Flat", faiss.METRIC_INNER_PRODUCT)
        index.cp.seed = seed
        index.train(rows)
        return np.asarray(index.quantizer.reconstruct_n(0, 40))

    ours = [clusters.centres(rows, 40, seed=seed, threads=2) for seed in range(8)]
    assert np.mean([*map(gained, ours)]) >= 0.99 * np.mean([gained(theirs(seed)) for seed in range(8)])
    assert np.linalg.norm(ours[0], axis=1) == pytest.approx(1, abs=1e-6)
    for kind in ("IVF40,Flat", "IVF40,PQ4x4fs", "IVF40_HNSW8,Flat", "RR8,IVF40,SQ8"):
        trained = factory.train(kind, rows, seed=5, threads=1)
        index = faiss.extract_index_ivf(trained)
        assert index.quantizer.ntotal == 40
        if not kind.startswith("RR"):  # which trains on rotated rows
            assert np.array_equal(index.quantizer.reconstruct_n(0, 40), ours[5])


@pytest.mark.parametrize("count", [1, 40, 5_000])
def test_a_vector_belongs_to_the_centre_of_greatest_score_the_first_of_equals(arithmetic: Any, count: int) -> None:
    rows, centres = (clustered(size, 6).astype(np.float32) for size in (3_000, count))
    centres[: count // 8] *= -1
    centres[[count // 2, -1]] = rows[0]
    everyone, everything = (each.ravel() for each in np.indices((len(rows), count)))
    scores = pair_scores(rows, everyone, centres, everything).reshape(len(rows), count)
    found = clusters.nearest(rows, centres, numbers=arithmetic(), threads=2)
    assert np.array_equal(found, scores.argmax(axis=1))
    assert found[0] == count // 2
