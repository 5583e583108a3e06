"""A GPU's products change no byte of what is found, however far they are off, as long as they keep to their bound."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from real_runs import Run
from stand_ins import Off, on_device

from negpipe import ann
from negpipe.ann import clusters, exact, lists, products
from negpipe.ann.pairs import pair_scores
from negpipe.ann.products import BFloat16, Float32, OnDevice, Operand, Products
from negpipe.ann.vectors import Held
from negpipe.engine.budget import Budget
from negpipe.errors import BudgetError, ConfigError

Floats = NDArray[np.float32]
NO_PAIRS = (np.empty(0, np.int64), np.empty(0, np.int64))
DEPTH = 50


def draw(rows: int, dimension: int, seed: int) -> Floats:
    return np.random.default_rng(seed).standard_normal((rows, dimension), np.float32)


def close() -> tuple[Floats, Floats]:
    """Scores closer to each other than rounding."""
    rng = np.random.default_rng(11)
    steps = 1 + rng.integers(-3, 4, (3_000, 300)) * np.float32(2**-23)
    return draw(30, 300, 1), draw(1, 300, 2) * steps.astype(np.float32)


def equal() -> tuple[Floats, Floats]:
    """Ties of a thousand rows, at the cut of some anchors."""
    rows = draw(3_000, 24, 3)
    rows[1_000:2_000] = rows[0]
    anchors = draw(30, 24, 4)
    anchors[:10], anchors[10:20] = rows[0], -rows[0]
    return anchors, rows


def of_all_lengths() -> tuple[Floats, Floats]:
    """From zeros and numbers that are hardly any to those whose products nearly overflow."""
    rng = np.random.default_rng(5)
    sizes = np.array([0, 1e-41, 1e-22, 1e-18, 1e-3, 1, 1e9, 1e15], np.float32)
    anchors, rows = draw(32, 40, 6), draw(3_000, 40, 7)
    return anchors * rng.choice(sizes, (32, 1)), rows * rng.choice(sizes, (3_000, 1))


def hardly_any() -> tuple[Floats, Floats]:
    """Products below the least normal number."""
    return draw(30, 40, 8) * np.float32(1e-20), draw(3_000, 40, 9) * np.float32(1e-20)


SHAPES = [close, equal, of_all_lengths, hardly_any]


def scores_of_all(anchors: Floats, rows: Floats) -> Floats:
    everyone, everything = (each.ravel() for each in np.indices((len(anchors), len(rows))))
    return pair_scores(anchors, everyone, rows, everything).reshape(len(anchors), -1)


def best(anchors: Floats, rows: Floats, depth: int) -> Any:
    """Rows by brute force, of equals the lower one first."""
    return np.argsort(-scores_of_all(anchors, rows), axis=1, kind="stable")[:, :depth]


def search(numbers: Any, anchors: Floats, rows: Floats, monkeypatch: pytest.MonkeyPatch) -> ann.Found:
    """In blocks that are small enough for cuts to be known when most rows come."""
    monkeypatch.setattr(exact, "_BLOCK_ROWS", 500)
    monkeypatch.setattr(exact, "arithmetic", lambda *about: numbers)
    return ann.search_exact(anchors, Held(rows), DEPTH, positives=NO_PAIRS, budget=Budget(2**28, 2))


def same(one: ann.Found, other: ann.Found) -> bool:
    return one.rows.tobytes() == other.rows.tobytes() and one.scores.tobytes() == other.scores.tobytes()


class Flushing(OnDevice):
    """A device that takes numbers that are not normal for 0, in what it reads and in what it makes."""

    def multiply(self, anchors: Operand, rows: Operand, scratch: Any) -> Any:
        import torch

        assert torch.set_flush_denormal(True)
        try:
            return super().multiply(anchors, rows, scratch)
        finally:
            torch.set_flush_denormal(False)


@pytest.mark.guarantee(
    "a device that multiplies for search changes no byte",
    "what is within the proven error of its products is scored on the cores (tested on a stand-in)",
    section="rows",
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("numbers", [on_device, Off, lambda: Flushing("cpu", 2, 2**28)])
def test_the_bytes_are_those_of_the_processor(
    shape: Callable[[], tuple[Floats, Floats]], numbers: Callable[[], OnDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    anchors, rows = shape()
    found = search(numbers(), anchors, rows, monkeypatch)
    assert same(found, search(Float32(), anchors, rows, monkeypatch))
    assert np.array_equal(found.rows, best(anchors, rows, DEPTH))


def test_products_that_break_their_bound_lose_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test before this one would see, if the bound were too small by a half."""
    anchors, rows = close()
    expected = search(Float32(), anchors, rows, monkeypatch)
    assert not same(search(Off(1.5), anchors, rows, monkeypatch), expected)


@pytest.mark.parametrize("numbers", [on_device, Off])
def test_a_vector_belongs_to_the_same_list(numbers: Callable[[], OnDevice]) -> None:
    centres = close()[1][:500]
    vectors = np.concatenate([draw(600, 300, 8), -centres[:100]])
    expected = scores_of_all(vectors, centres).argmax(axis=1)
    assert np.array_equal(clusters.nearest(vectors, centres, numbers=numbers(), threads=2), expected)


@pytest.mark.parametrize("numbers", [Float32, BFloat16, on_device])
@pytest.mark.parametrize("floor", [-np.inf, -1e9, -0.5, 0.0, 2.0, 1e9])
def test_pairs_come_by_anchor_and_row_in_pieces(
    numbers: Callable[[], Any], floor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_PAIRS", 1_000)
    anchors, rows = (np.round(draw(count, 6, count)) for count in (70, 300))  # exact in all of them
    made = numbers()
    with products.pool(made, 1) as thread:
        operands = made.operand(anchors), made.operand(rows)
        floors = made.ordered(np.full(70, floor, np.float32))
        pieces = thread.submit(lambda: [*Products(made, 70, 300).reaching(floors, *operands)]).result()
    expected = np.nonzero(anchors @ rows.T >= floor)
    assert [sum(len(one[side]) for one in pieces) for side in (0, 1)] == [len(expected[0])] * 2
    for side in (0, 1):
        assert np.array_equal(np.concatenate([np.zeros(0, np.int64), *(one[side] for one in pieces)]), expected[side])
    assert max((len(one[0]) for one in pieces), default=0) <= 1_000 + 300


def test_blocks_and_products_fit_the_memory_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []

    class Small(OnDevice):
        def multiply(self, anchors: Operand, rows: Operand, scratch: Any) -> Any:
            made = super().multiply(anchors, rows, scratch)
            held.append(made.numel() * 4)
            return made

    memory, blocks = 6 * 2**20, list[int]()
    anchors, rows = draw(64, 256, 1), draw(8_000, 256, 2)
    numbers = Small("cpu", 2, memory)
    monkeypatch.setattr(exact, "arithmetic", lambda *about: numbers)
    budget = Budget(2**28, 2)
    found = ann.search_exact(anchors, Held(rows), 9, positives=NO_PAIRS, budget=budget, progress=blocks.append)
    assert np.array_equal(found.rows, best(anchors, rows, 9))
    assert 1_024 <= max(blocks) < 2_000 and sum(blocks) == 8_000
    assert anchors.nbytes + 2 * max(blocks) * 256 * 4 <= memory // 2
    assert 2 * max(held) <= memory // 4
    assert numbers.strip < OnDevice("cpu", 2, 2**31).strip == 2**14


def test_what_does_not_fit_the_device_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    anchors, rows = draw(64, 256, 1), draw(2_000, 256, 2)
    told = r"search\.device does not have the memory for 64 anchors of dimension 256, 1 MiB were free: .*search"
    with pytest.raises(BudgetError, match=told):
        search(OnDevice("cpu", 1, 2**20), anchors, rows, monkeypatch)

    def full(*operands: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 MiB")

    monkeypatch.setattr(torch, "mm", full)
    told = r"does not have the memory for more products.*executor\.workers.*search\.device: cpu"
    with pytest.raises(BudgetError, match=told):
        search(on_device(), anchors, rows, monkeypatch)


@pytest.fixture
def tf32() -> Iterator[Callable[[], bool]]:
    """Somebody in this process has switched TF32 on; tells whether it is."""
    import torch

    switch = torch.backends.cuda.matmul
    name, on = ("fp32_precision", "tf32") if hasattr(switch, "fp32_precision") else ("allow_tf32", True)
    before = getattr(switch, name)
    setattr(switch, name, on)
    yield lambda: getattr(switch, name) == on
    setattr(switch, name, before)


def test_tf32_is_off_for_products_and_what_it_was_afterwards(
    tf32: Callable[[], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Watched(OnDevice):
        def multiply(self, anchors: Operand, rows: Operand, scratch: Any) -> Any:
            seen.append(tf32())
            return super().multiply(anchors, rows, scratch)

    numbers = Watched("cpu", 1, 2**28)
    numbers.check()
    search(numbers, *equal(), monkeypatch)
    assert set(seen) == {False} and tf32()


class Coarse(OnDevice):
    """Reads so many of the 23 digits behind the point, as TF32 (10) and bfloat16 (7) do."""

    digits = 10

    def operand(self, vectors: Floats, room: Any = None) -> Operand:
        bits = vectors.view(np.int32) & np.int32(-(1 << (23 - self.digits)))
        return super().operand(bits.view(np.float32), room)


@pytest.mark.parametrize("digits", [7, 10, 16])
def test_a_device_that_multiplies_with_fewer_digits_is_refused(digits: int) -> None:
    on_device().check()
    coarse = Coarse("cpu", 1, 2**28)
    coarse.digits = digits
    with pytest.raises(
        ConfigError, match=r"search\.device multiplies less precisely than float32.*search\.device: cpu"
    ):
        coarse.check()


def test_a_gpu_multiplies_where_it_is_granted_there_and_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    checked = []

    def check(numbers: OnDevice) -> None:
        checked.append(numbers)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30 * (1 + device.index), 2**40))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(OnDevice, "check", check)
    monkeypatch.setattr(products, "_matrix_units", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def chosen(device: str, multiplications: float = 1e13) -> Any:
        return products.arithmetic(multiplications, Budget(2**30, 4, device))

    made = chosen("cuda:1")
    assert (made._device, made._memory, checked) == ("cuda:1", 2**31 + 200, [made])
    assert chosen("cuda")._device == "cuda:0"
    for numbers in (chosen("cuda:2"), chosen("cpu"), chosen("cuda:1", 1e11), products.arithmetic(1e13)):
        assert isinstance(numbers, Float32)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")  # a worker is shown its own alone
    assert chosen("cuda:5")._device == "cuda:0"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert isinstance(chosen("cuda:5"), Float32)


def test_searches_take_the_device_that_tasks_are_granted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    granted = []

    def watched(multiplications: float, budget: Budget) -> Any:
        granted.append(budget.device)
        return on_device()

    for module in (exact, lists):
        monkeypatch.setattr(module, "arithmetic", watched)
    anchors, rows = draw(20, 16, 1), draw(2_000, 16, 2)
    np.save(tmp_path / "part.npy", rows)
    vectors, budget = ann.open_parts([tmp_path / "part.npy"]), Budget(2**28, 1, "cuda:3")
    ann.search_exact(anchors, vectors, 5, positives=NO_PAIRS, budget=budget)
    index = ann.factory.train("IVF4,Flat", rows, seed=1, threads=1)
    ann.factory.fill(index, vectors, threads=1)
    with (tmp_path / "index.faiss").open("wb") as file:
        ann.factory.write(index, file)
    lists.search_lists(anchors, lists.open_lists([(tmp_path / "index.faiss", 0)], rows[:50]), 5, 2, budget=budget)
    assert granted == ["cuda:3"] * 3  # of both searches, and for the lists that are nearest


def test_a_run_makes_the_same_files_with_the_stand_in(
    undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []

    def device(*about: Any) -> OnDevice:
        used.append(Off())
        return used[-1]

    for module in (exact, lists):
        monkeypatch.setattr(module, "arithmetic", device)
    run = undisturbed.copied(tmp_path / "run")
    for stage in ("search", "triplets"):
        run.forget(stage)
    assert run.mine("search.device=cpu").ran == ("search", "triplets")
    assert used and run.content() == undisturbed.content()


THREADS = """
import numpy, torch
from negpipe import ann
from negpipe.ann import exact
from negpipe.ann.products import BFloat16, OnDevice
from negpipe.ann.vectors import Held
from negpipe.engine.budget import Budget

vectors = numpy.random.default_rng(0).standard_normal((500, 8), numpy.float32)
nothing = numpy.empty(0, numpy.int64)
for numbers in (BFloat16(), OnDevice("cpu", 2, 2**28)):
    exact.arithmetic = lambda *about: numbers
    ann.search_exact(vectors, Held(vectors), 5, positives=(nothing, nothing), budget=Budget(2**30, 2))
print(torch.get_num_threads())
"""


@pytest.mark.slow
def test_a_search_leaves_torch_its_threads() -> None:
    said = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        for program in ("import torch; print(torch.get_num_threads())", THREADS)
    ]
    assert said[0] == said[1]
