"""Selection against a slow oracle, against chance, and against sentence-transformers itself."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle_mining as oracle
import pyarrow.parquet as pq
import pytest
import small_source as small
from hypothesis import given, settings
from hypothesis import strategies as st

from negpipe.config.schema import Mining
from negpipe.engine.manifest import Books
from negpipe.select import filters, rules
from negpipe.select.filters import CODES, FILTERS, NAMES
from negpipe.select.rules import Fate, Rules

EIGHTHS = st.integers(-8, 8).map(lambda i: i / 8)
SCORES = st.one_of(EIGHTHS, st.floats(-1, 1, width=32), st.sampled_from([np.nan, np.inf, -np.inf, -0.0]))
CUTOFF = st.one_of(st.none(), EIGHTHS, st.floats(-1, 1))


def select(rows: Any, scores: Any, reference: Any, dropped: Any, uniform: Any, applied: dict[str, Any]) -> Any:
    """What becomes of candidates: the filters that see scores, then the choice."""
    mining = Mining.model_construct(**{"relative_margin": None, "exclude": ()} | applied)
    nothing: Any = None
    opened = filters.Filters(filters.Lookup(SimpleNamespace(mining=mining), nothing, nothing))  # type: ignore[arg-type]
    codes = opened.of_scores(nothing, np.arange(len(rows)), rows, scores, reference, dropped)
    own = {name: value for name, value in applied.items() if name in Rules.__dataclass_fields__}
    return rules.select(rows, scores, reference, codes, uniform, Rules(**own))


def exclusions(shape: tuple[int, int], found: dict[str, Any]) -> Any:
    """Codes of what is dropped for what it is, whatever its score."""
    dropped = np.zeros(shape, np.uint8)
    for one in reversed(FILTERS):
        if one.name in found:
            dropped[found[one.name]] = CODES[one.name]
    return dropped


def ragged(lists: list[list[Any]], dtype: Any) -> tuple[Any, Any]:
    offsets = np.cumsum([0, *map(len, lists)], dtype=np.int64)
    return np.array(list(itertools.chain(*lists)), dtype), offsets


@st.composite
def blocks(draw: st.DrawFn, strategies: tuple[str, ...], score: st.SearchStrategy[float]) -> dict[str, Any]:
    n, k = draw(st.integers(0, 4)), draw(st.integers(0, 9))

    def table(cell: st.SearchStrategy[Any]) -> list[list[Any]]:
        return [[draw(cell) for _ in range(k)] for _ in range(n)]

    range_min = draw(st.integers(0, 3))
    return {
        "shape": (n, k),
        "rows": table(st.integers(-1, 6)),
        "scores": table(score),
        "reasons": table(
            st.sets(st.sampled_from(oracle.EXCLUSIONS), max_size=2) if draw(st.booleans()) else st.just(set())
        ),
        "reference": [draw(st.one_of(EIGHTHS, st.floats(-1, 1, width=32), st.just(np.nan))) for _ in range(n)]
        if "top" in strategies
        else [draw(st.one_of(EIGHTHS, st.just(np.nan))) for _ in range(n)],
        "uniform": table(st.integers(1, 15).map(lambda i: i / 16)),
        "rules": {
            "range_min": range_min,
            "range_max": range_min + draw(st.integers(1, 9)),
            "num_negatives": draw(st.integers(1, 4)),
            "rank_over": draw(st.sampled_from(["raw", "survivors"])),
            "max_score": draw(CUTOFF),
            "min_score": draw(CUTOFF),
            "absolute_margin": draw(CUTOFF),
            "relative_margin": draw(CUTOFF),
            "strict": draw(st.booleans()),
            "sampling_strategy": draw(st.sampled_from(strategies)),
            "simans_a": draw(st.sampled_from([0.0, 0.5, 1.0, 64.0, 4096.0])),
            "simans_b": draw(EIGHTHS),
            "temperature": draw(st.sampled_from([1 / 1024, 0.125, 1.0])),
            "on_shortage": draw(st.sampled_from(["keep", "drop", "fail"])),
        },
    }


def check(block: dict[str, Any]) -> None:
    shape, applied = block["shape"], block["rules"]
    found = {
        name.lower(): np.array([[name in cell for cell in line] for line in block["reasons"]], bool).reshape(shape)
        for name in oracle.EXCLUSIONS
    }
    expected = [
        oracle.fates_of_unit(*unit, applied)
        for unit in zip(
            block["rows"], block["scores"], block["reasons"], block["reference"], block["uniform"], strict=True
        )
    ]
    fates = select(
        np.array(block["rows"], np.int64).reshape(shape),
        np.array(block["scores"], np.float32).reshape(shape),
        np.array(block["reference"], np.float32),
        exclusions(shape, found),
        None if applied["sampling_strategy"] == "top" else np.array(block["uniform"], np.float64).reshape(shape),
        applied,
    )
    assert fates.shape == shape
    assert fates.dtype == np.uint8
    assert [[NAMES[code].upper() for code in line] for line in fates.tolist()] == expected

    counts = rules.counts(fates, len(CODES))
    assert counts.tolist() == [[line.count(name.upper()) for name in NAMES] for line in expected]
    assert (counts.sum(axis=1) == shape[1]).all()
    assert (counts[:, Fate.TAKEN] <= applied["num_negatives"]).all()


@settings(max_examples=150, deadline=None)
@given(blocks(("top", "random"), SCORES))
def test_fates_agree_with_the_oracle(block: dict[str, Any]) -> None:
    check(block)


@settings(max_examples=150, deadline=None)
@given(blocks(("simans", "weighted"), st.one_of(EIGHTHS, st.just(np.nan))))
def test_weighted_draws_agree_with_the_oracle(block: dict[str, Any]) -> None:
    """Scores in eighths, so that equal weights are equal in float64 and in decimals alike."""
    check(block)


def test_codes_are_the_columns_of_the_counts() -> None:
    assert sorted(CODES.values()) == list(range(len(CODES)))
    assert [CODES[name] for name in NAMES] == list(range(len(CODES)))


@pytest.mark.slow
def test_a_filter_is_added_in_one_file(tmp_path: Path) -> None:
    """Its column in the ledger, its count and its sentence follow from the list."""
    shutil.copytree(Path(filters.__file__).parents[1], tmp_path / "copy/negpipe")
    path = tmp_path / "copy/negpipe/select/filters.py"
    before = '    Filter("excluded_file"'
    added = '    Filter("odd_row", lambda _: lambda grid: grid.rows % 2 == 1, _says("an odd row")),\n'
    path.write_text(path.read_text().replace(before, added + before, 1))
    small.build(tmp_path)
    config = small.write_config(tmp_path)

    def run(*words: object) -> str:
        command = [sys.executable, "-m", "negpipe", *map(str, words), "--set", "executor.kind=inline"]
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "copy")}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    assert "odd row" in run("mine", config)
    part = Books(tmp_path / "run", "triplets").manifest().parts[0]  # type: ignore[union-attr]
    ledger = pq.read_table(tmp_path / "run" / part.file("ledger").path)
    names = ledger.column_names
    assert sum(ledger["dropped_odd_row"].to_pylist()) > 0
    assert names.index("dropped_odd_row") + 1 == names.index("dropped_excluded_file")
    assert "an odd row" in run("explain", config, "--anchor", "q1")


def test_filters_stand_in_the_order_in_which_they_are_asked_or_counted() -> None:
    order = [one.sees for one in FILTERS]
    assert order == sorted(order, key=["documents", "pairs", "scores"].index)


def test_first_reason_counts_and_the_sum_is_whole() -> None:
    rows = np.array([[0, 1, 2, 3, 4, 5, -1]])
    scores = np.array([[0.99, 0.97, 0.9, 0.7, 0.6, 0.5, -3.4e38]], np.float32)
    own = rules.contains(rows, np.array([1]), np.array([0, 1]))
    dropped = exclusions(rows.shape, {"positive_text": own, "positive_id": own})
    applied = {"range_min": 0, "range_max": 4, "num_negatives": 1, "rank_over": "raw"}
    applied |= {"max_score": 0.95, "relative_margin": 0.1}
    fates = select(rows, scores, np.array([0.97], np.float32), dropped, None, applied)
    assert [NAMES[code].upper() for code in fates[0]] == [
        "MAX_SCORE", "POSITIVE_ID", "RELATIVE_MARGIN", "TAKEN", "AFTER_WINDOW", "AFTER_WINDOW", "PADDING",
    ]  # fmt: skip


def test_relative_margin_is_safe_for_negative_positives() -> None:
    """0.95 * p would be above a negative p, and let the positive's equals through."""
    scores = np.array([[-0.4, -0.5, -0.52, -0.6]], np.float32)
    applied = {"range_min": 0, "range_max": 4, "num_negatives": 4, "relative_margin": 0.05}
    fates = select(np.arange(4)[None], scores, np.array([-0.5], np.float32), np.zeros((1, 4), np.uint8), None, applied)
    dropped = CODES["relative_margin"]
    assert fates.tolist() == [[dropped, dropped, dropped, Fate.TAKEN]]


def test_equality_is_equality_in_float32() -> None:
    """Scores that sit on the cutoff once it is rounded as float32 arithmetic rounds it."""
    p = np.random.default_rng(0).uniform(-1, 1, 500).astype(np.float32)
    on_absolute = p.copy()
    p_absolute = on_absolute + np.float32(0.05)
    on_relative = p - np.abs(p) * np.float32(0.05)
    tenth = np.full(500, 0.1, np.float32)
    cases: list[tuple[Any, Any, int, dict[str, Any]]] = [
        (on_absolute, p_absolute, CODES["absolute_margin"], {"absolute_margin": 0.05}),
        (on_relative, p, CODES["relative_margin"], {"relative_margin": 0.05}),
        (tenth, p, CODES["max_score"], {"max_score": 0.1}),
        (-tenth, p, CODES["min_score"], {"min_score": -0.1}),
    ]
    for scores, reference, dropped, cutoff in cases:
        for strict, fate in ((False, Fate.TAKEN), (True, dropped)):
            applied = {"range_min": 0, "range_max": 1, "num_negatives": 1, "strict": strict, **cutoff}
            rows, dropped_before = np.zeros((500, 1), np.int64), np.zeros((500, 1), np.uint8)
            fates = select(rows, scores[:, None], reference, dropped_before, None, applied)
            assert (fates == fate).all()


def test_a_draw_without_numbers_is_refused() -> None:
    applied = Rules(range_min=0, range_max=1, num_negatives=1, sampling_strategy="random")
    with pytest.raises(ValueError, match="random"):
        rules.select(
            np.zeros((1, 1), np.int64),
            np.zeros((1, 1), np.float32),
            np.zeros(1, np.float32),
            np.zeros((1, 1), np.uint8),
            None,
            applied,
        )


# Exclusions and references


@pytest.mark.parametrize(("dtype", "top"), [(np.int64, 10**9), (np.uint64, 2**64 - 1)])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_membership(dtype: Any, top: int, data: st.DataObject) -> None:
    value = st.sampled_from([0, 1, 2, 3, top - 1, top])
    n, k = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))
    lists = [data.draw(st.lists(value, max_size=4)) for _ in range(n)]
    table = [[data.draw(value) for _ in range(k)] for _ in range(n)]
    values, offsets = ragged(lists, dtype)
    expected = [[oracle.member(cell, owned) for cell in line] for line, owned in zip(table, lists, strict=True)]
    candidates = np.array(table, dtype).reshape(n, k)
    assert rules.contains(candidates, values, offsets).tolist() == expected

    shared = [data.draw(st.integers(0, n - 1)) for _ in range(n)]  # several units may have one list
    found = [[oracle.member(cell, lists[at]) for cell in line] for line, at in zip(table, shared, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "LONG", data.draw(st.integers(0, 4)))
        patch.setattr(rules, "_CELLS", data.draw(st.integers(1, 9)))
        assert rules.contains(candidates, values, offsets, np.array(shared, np.int64)).tolist() == found
        assert rules.contains(candidates, values, offsets).tolist() == expected

    cut = data.draw(st.integers(0, n))  # a block of units goes with the whole of the values
    assert rules.contains(candidates[cut:], values, offsets[cut:]).tolist() == expected[cut:]
    assert rules.contains(candidates[:cut], values, offsets[: cut + 1]).tolist() == expected[:cut]


def test_membership_beyond_one_chunk() -> None:
    rng = np.random.default_rng(0)
    lengths = np.array([3000, 0, 7, 900])
    offsets = np.r_[0, np.cumsum(lengths)]
    values = rng.integers(0, 4000, offsets[-1])
    candidates = np.where(rng.random((4, 500)) < 0.1, -1, rng.integers(0, 4000, (4, 500)))
    found = rules.contains(candidates, values, offsets)
    for unit in range(4):
        assert found[unit].tolist() == np.isin(candidates[unit], values[offsets[unit] : offsets[unit + 1]]).tolist()
    assert not found[candidates == -1].any()


def test_a_list_that_many_share_is_read_once() -> None:
    """100,000 values and 4,096 units of 256 candidates: 10^11 comparisons of pairs, 800 MB of repeated lists."""
    values = np.random.default_rng(1).permutation(200_000)[:100_000]
    candidates = np.random.default_rng(2).integers(-1, 200_000, (4096, 256))
    tracemalloc.start()
    found = rules.contains(candidates, values, np.array([0, len(values)]), np.zeros(4096, np.int64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found == np.isin(candidates, values)).all()
    assert peak < 32 * 2**20


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(-1, 1, width=32), max_size=3), max_size=6), st.data())
def test_reference_is_min_or_max_and_nan_without_positives(lists: list[list[float]], data: st.DataObject) -> None:
    scores, offsets = ragged(lists, np.float32)
    cut = data.draw(st.integers(0, len(lists)))
    modes: list[tuple[Any, Any]] = [("min", min), ("max", max)]
    for which, pick in modes:
        expected = np.array([pick(own) if own else np.nan for own in lists], np.float32)
        np.testing.assert_array_equal(rules.reference_scores(scores, offsets, which), expected)
        np.testing.assert_array_equal(rules.reference_scores(scores, offsets[cut:], which), expected[cut:])
        np.testing.assert_array_equal(rules.reference_scores(scores, offsets[: cut + 1], which), expected[:cut])


# Chance


def hashes(rng: np.random.Generator, *shape: int) -> Any:
    return rng.integers(0, 2**64, shape, dtype=np.uint64)


def test_the_mixer_is_splitmix64() -> None:
    """The first outputs of the reference generator from state 1234567."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    states = np.array([(1234567 + i * 0x9E3779B97F4A7C15) % 2**64 for i in range(5)], np.uint64)
    assert rules._mix(states).tolist() == known
    assert [oracle.splitmix64(state) for state in states.tolist()] == known


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_uniform_agrees_with_exact_integers(seed: int, anchor: int, document: int) -> None:
    number = rules.uniform(seed, np.array([anchor], np.uint64), np.array([[document]], np.uint64))
    assert number.tolist() == [[oracle.uniform(seed, anchor, document)]]
    assert 0 < number < 1


def test_uniform_depends_on_nothing_but_its_arguments() -> None:
    rng = np.random.default_rng(1)
    anchors, documents = hashes(rng, 40), hashes(rng, 40, 30)
    whole = rules.uniform(7, anchors, documents)
    pieces = [rules.uniform(7, anchors[i : i + 9], documents[i : i + 9]) for i in range(0, 40, 9)]
    assert np.array_equal(np.concatenate(pieces), whole)
    units, columns = rng.permutation(40), rng.permutation(30)
    assert np.array_equal(rules.uniform(7, anchors[units], documents[units][:, columns]), whole[units][:, columns])
    assert not np.isin(rules.uniform(8, anchors, documents), whole).any()
    assert not np.isin(rules.uniform(7, anchors[::-1], documents), whole).any()


@pytest.mark.parametrize("kind", ["digests", "small numbers"])
def test_uniform_is_uniform(kind: str) -> None:
    rng = np.random.default_rng(2)
    n, k = 400, 250
    anchors = hashes(rng, n) if kind == "digests" else np.arange(n, dtype=np.uint64)
    documents = hashes(rng, n, k) if kind == "digests" else np.tile(np.arange(k, dtype=np.uint64), (n, 1))
    numbers = rules.uniform(42, anchors, documents)
    steps = np.arange(1, n * k + 1) / (n * k)
    assert np.abs(np.sort(numbers.ravel()) - steps).max() < 1.95 / np.sqrt(n * k)  # Kolmogorov-Smirnov at 0.1 %
    assert abs(numbers.mean() - 0.5) < 4 * np.sqrt(1 / 12 / (n * k))
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 4 / np.sqrt(n * k)
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 4 / np.sqrt(n * k)


def frequencies(scores: list[float], p: float, seed: int, **applied: Any) -> Any:
    """How often each of the candidates, the same for 40,000 units, is taken."""
    n, k = 40_000, len(scores)
    rng = np.random.default_rng(seed)
    fates = rules.select(
        np.tile(np.arange(k), (n, 1)),
        np.tile(np.array(scores, np.float32), (n, 1)),
        np.full(n, p, np.float32),
        np.zeros((n, k), np.uint8),
        rules.uniform(seed, hashes(rng, n), hashes(rng, n, k)),
        Rules(range_min=0, range_max=k, **applied),
    )
    assert ((fates == Fate.TAKEN).sum(axis=1) == applied["num_negatives"]).all()
    return (fates == Fate.TAKEN).mean(axis=0)


def close(measured: Any, expected: Any) -> bool:
    return bool((np.abs(measured - expected) < 4.5 * np.sqrt(expected * (1 - expected) / 40_000)).all())


def inclusion(weights: Any) -> tuple[Any, Any]:
    """Plackett-Luce: the exact chance to be drawn first, and to be among the first two."""
    first = weights / weights.sum()
    second = [sum(first[i] * first[j] / (1 - first[i]) for i in range(len(first)) if i != j) for j in range(len(first))]
    return first, first + np.array(second)


def test_random_takes_each_equally_often() -> None:
    measured = frequencies([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3], 1.0, 3, num_negatives=3, sampling_strategy="random")
    assert close(measured, np.full(7, 3 / 7))


def test_weighted_takes_by_softmax() -> None:
    scores = [0.9, 0.8, 0.75, 0.6, 0.2]
    first, two = inclusion(np.exp(np.array(scores) / 0.2))
    applied: dict[str, Any] = {"sampling_strategy": "weighted", "temperature": 0.2}
    assert close(frequencies(scores, 1.0, 4, num_negatives=1, **applied), first)
    assert close(frequencies(scores, 1.0, 5, num_negatives=2, **applied), two)


@pytest.mark.parametrize("b", [-0.25, 0.0, 0.25])
def test_simans_peaks_at_the_positive_plus_b(b: float) -> None:
    scores, p = [0.9, 0.75, 0.5, 0.25, 0.1], 0.5
    first, two = inclusion(np.exp(-8.0 * (np.array(scores) - p - b) ** 2))
    applied: dict[str, Any] = {"sampling_strategy": "simans", "simans_a": 8.0, "simans_b": b}
    assert close(frequencies(scores, p, 6, num_negatives=1, **applied), first)
    assert close(frequencies(scores, p, 7, num_negatives=2, **applied), two)
    assert scores[int(np.argmax(first))] == p + b


def test_another_seed_draws_others() -> None:
    rng = np.random.default_rng(8)
    anchors, documents = hashes(rng, 200), hashes(rng, 200, 50)
    applied = Rules(range_min=0, range_max=50, num_negatives=5, sampling_strategy="random")

    def draw(seed: int) -> Any:
        rows, scores = np.tile(np.arange(50), (200, 1)), np.zeros((200, 50), np.float32)
        numbers = rules.uniform(seed, anchors, documents)
        return rules.select(rows, scores, np.ones(200, np.float32), np.zeros((200, 50), np.uint8), numbers, applied)

    one, other = draw(1) == Fate.TAKEN, draw(2) == Fate.TAKEN
    assert np.array_equal(one, draw(1) == Fate.TAKEN)
    assert (one & other).sum() < 0.2 * one.sum()  # a tenth is chance


# sentence-transformers


class Stub:
    """A model of given vectors. Scores are plain dot products; nothing is normalised."""

    device = "cpu"

    def __init__(self, vectors: dict[str, Any]) -> None:
        self.vectors = vectors

    def encode_query(self, texts: list[str], **_: Any) -> Any:
        return np.stack([self.vectors[text] for text in texts])

    encode_document = encode_query

    def similarity(self, left: Any, right: Any) -> Any:
        import torch

        return torch.as_tensor(left) @ torch.as_tensor(right).T

    def similarity_pairwise(self, left: Any, right: Any) -> Any:
        import torch

        return (torch.as_tensor(left) * torch.as_tensor(right)).sum(dim=1)


def parity_case(seed: int) -> SimpleNamespace:
    """Anchors are unit vectors, so that documents spell out the scores: in 64ths, distinct for one anchor, from
    -1 to 1. So margins are met with equality often, and no order hangs on a tie."""
    rng = np.random.default_rng(seed)
    anchors, documents = int(rng.integers(2, 7)), int(rng.integers(6, 40))
    scores = np.stack([rng.permutation(np.arange(-64, 65))[:documents] / 64 for _ in range(anchors)]).astype(np.float32)
    if seed % 3 == 0:
        scores = rng.uniform(-1, 1, scores.shape).astype(np.float32)
    positives = [rng.choice(documents, int(rng.integers(1, 4)), replace=False).tolist() for _ in range(anchors)]
    num = int(rng.integers(1, 5))
    range_min = int(rng.integers(0, 4))

    def maybe(*choices: float) -> float | None:
        return float(rng.choice(choices)) if rng.random() < 0.5 else None

    return SimpleNamespace(
        scores=scores,
        positives=positives,
        rules={
            "range_min": range_min,
            "range_max": range_min + num + int(rng.integers(0, 2 * documents)),
            "num_negatives": num,
            "absolute_margin": maybe(0, 0.125, 0.05, -0.25),
            "relative_margin": maybe(0, 0.25, 0.05),
            "max_score": maybe(0.5, 0.3, 0.75),
            "min_score": maybe(-0.5, -0.3, -0.75),
        },
    )


def ours(case: SimpleNamespace, on_shortage: Any) -> list[tuple[str, str, list[str], list[float]]]:
    """(anchor, positive, negatives, scores) of every pair, searched as deep as sentence-transformers does."""
    depth = case.rules["range_max"] + max(map(len, case.positives))
    rows = np.argsort(-case.scores, axis=1, kind="stable")[:, :depth]
    scores = np.take_along_axis(case.scores, rows, axis=1)
    values, offsets = ragged(case.positives, np.int64)
    positive_scores = case.scores[np.repeat(np.arange(len(rows)), np.diff(offsets)), values]
    dropped = exclusions(rows.shape, {"positive_id": rules.contains(rows, values, offsets)})
    reference = rules.reference_scores(positive_scores, offsets, "min")
    fates = select(rows, scores, reference, dropped, None, case.rules | {"on_shortage": on_shortage})
    result = []
    for anchor, own in enumerate(case.positives):
        taken = fates[anchor] == Fate.TAKEN
        negatives = [f"d{row}" for row in rows[anchor][taken]]
        for positive in own:
            pair = [case.scores[anchor, positive].item(), *scores[anchor][taken].tolist()]
            result.append((f"q{anchor}", f"d{positive}", negatives, pair))
    return [entry for entry in result if entry[2]]


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(40))
def test_top_is_sentence_transformers_top(seed: int) -> None:
    from datasets import Dataset

    # Earlier versions fail if there are fewer documents than they search for.
    mine_hard_negatives = pytest.importorskip("sentence_transformers", minversion="5.7").util.mine_hard_negatives

    case = parity_case(seed)
    identity = np.eye(len(case.positives), dtype=np.float32)
    vectors = {f"q{i}": identity[i] for i in range(len(identity))}
    vectors |= {f"d{j}": column for j, column in enumerate(np.ascontiguousarray(case.scores.T))}
    pairs = [(f"q{i}", f"d{j}") for i, own in enumerate(case.positives) for j in own]

    def theirs(output_format: str) -> list[dict[str, Any]]:
        mined = mine_hard_negatives(
            Dataset.from_dict({"anchor": [a for a, _ in pairs], "positive": [p for _, p in pairs]}),
            Stub(vectors),
            corpus=[f"d{j}" for j in range(case.scores.shape[1])],
            output_format=output_format,
            output_scores=True,
            verbose=False,
            **case.rules,
        )
        return list(mined)

    complete = [
        {"anchor": a, "positive": p, **{f"negative_{i}": d for i, d in enumerate(negatives, 1)}, "scores": scores}
        for a, p, negatives, scores in ours(case, "drop")
    ]
    assert theirs("n-tuple") == complete
    partial = [
        {"anchor": a, "positive": p, "negative": d, "scores": [scores[0], score]}
        for a, p, negatives, scores in ours(case, "keep")
        for d, score in zip(negatives, scores[1:], strict=True)
    ]
    assert theirs("triplet") == partial
