"""`threads` is kept: nothing computes with more, the threads of FAISS, BLAS and torch included."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from negpipe import ann
from negpipe.ann import clusters, coded, exact, factory, lists, products
from negpipe.engine.budget import Budget

pytestmark = pytest.mark.slow

DIMENSION, MEMORY = 128, 2**29


def draw(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, DIMENSION), np.float32)


def of_exact(folder: Path) -> Callable[[], object]:
    anchors, vectors = draw(2_000, 1), ann.open_parts([folder / "rows.npy"])
    none = np.empty(0, np.int64), np.empty(0, np.int64)
    return lambda: ann.search_exact(anchors, vectors, 100, positives=none, budget=Budget(MEMORY, 1))


def of_training(folder: Path) -> Callable[[], object]:
    return lambda: factory.train("IVF200,PQ16x4fs", draw(16_000, 2), seed=1, threads=1)


def shard(folder: Path, kind: str) -> Path:
    index = factory.train(kind, draw(16_000, 2), seed=1, threads=1)
    factory.fill(index, ann.open_parts([folder / "rows.npy"]), threads=1)
    with (folder / "index.faiss").open("wb") as file:
        factory.write(index, file)
    return folder / "index.faiss"


def of_filling(folder: Path) -> Callable[[], object]:
    return lambda: shard(folder, "IVF200,Flat")


def of_lists(folder: Path) -> Callable[[], object]:
    opened = lists.open_lists([(shard(folder, "IVF50,Flat"), 0)], draw(500, 3))
    anchors = draw(2_000, 1)
    return lambda: lists.search_lists(anchors, opened, 100, 30, budget=Budget(MEMORY, 1))


def of_codes(folder: Path) -> Callable[[], object]:
    opened, vectors = [(factory.read(shard(folder, "SQ8"), DIMENSION), 0)], ann.open_parts([folder / "rows.npy"])
    about: dict[str, Any] = {"effort_value": None, "proposed": 200, "budget": Budget(MEMORY, 1)}
    return lambda: coded.search_coded(draw(1_000, 1), opened, vectors, 100, **about)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core is all there is")
@pytest.mark.parametrize("made", [of_exact, of_training, of_filling, of_lists, of_codes])
@pytest.mark.parametrize("numbers", [products.Float32, products.BFloat16])
def test_one_thread_is_one_thread(
    tmp_path: Path, made: Callable[[Path], Callable[[], object]], numbers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (exact, lists, clusters, factory):
        monkeypatch.setattr(module, "arithmetic", lambda *about: numbers())
    np.save(tmp_path / "rows.npy", draw(30_000, 0))
    work = made(tmp_path)
    work()
    computed, started = time.process_time(), time.monotonic()
    while time.monotonic() - started < 1:
        work()
    # A reader beside the one that computes is idle nearly always; a slow machine makes the ratio smaller.
    assert time.process_time() - computed < 1.25 * (time.monotonic() - started)
