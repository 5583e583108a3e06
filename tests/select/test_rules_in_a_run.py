"""Selection rules from the config to Parquet, each against numbers worked out here from texts and vectors alone."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import small_source as small
from beir_data import numbered_folder, precomputed_config, write_folder
from real_runs import Run
from test_parity import World, ranked

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.review import finished
from negpipe.rows import exports

Rows = list[dict[str, Any]]


def rows_of(folder: Path) -> Rows:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def negatives_of(rows: Rows, anchor: str) -> list[str]:
    """Negatives of an anchor as its first positive has them."""
    own = [row for row in rows if row["anchor_id"] == anchor]
    return [row["negative_id"] for row in own if row["positive_id"] == own[0]["positive_id"]]


# --- sampling -------------------------------------------------------------------------------------------

ANCHORS = 3000
COSINES = np.array([0.7, 0.9, 0.82, 0.75, 0.66, 0.6, 0.5, 0.45, 0.4, 0.3, 0.2, 0.1])  # of the positive, d0, first
WINDOW = slice(1, 9)


@pytest.fixture(scope="module")
def same_anchors(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """3,000 anchors of one vector: a draw of each is a draw from one urn."""
    folder = tmp_path_factory.mktemp("draws")
    write_folder(
        folder / "data",
        [(f"d{i}", "", f"document {i}") for i in range(len(COSINES))],
        [(f"q{i}", f"query {i}") for i in range(ANCHORS)],
        {"train": [(f"q{i}", "d0", 1) for i in range(ANCHORS)]},
    )
    np.save(folder / "data/corpus.npy", np.stack([COSINES, np.sqrt(1 - COSINES**2)], axis=1).astype(np.float32))
    np.save(folder / "data/queries.npy", np.tile(np.array([1, 0], np.float32), (ANCHORS, 1)))
    config = precomputed_config(folder / "run", folder / "data")
    config["encoder"]["storage"] = "float32"
    config["data"]["part_rows"] = 1024
    config["mining"] = {"range_max": 8, "num_negatives": 2, "relative_margin": None}
    return Run(config)


def chances(weights: npt.NDArray[np.float64]) -> dict[frozenset[str], float]:
    """How likely two draws without replacement make each pair, each draw by weight among those left."""
    total, found = weights.sum(), {}
    for (i, one), (j, other) in itertools.combinations(enumerate(weights, WINDOW.start), 2):
        chance = one / total * other / (total - one) + other / total * one / (total - other)
        found[frozenset((f"d{i}", f"d{j}"))] = float(chance)
    return found


def deviations(drawn: list[frozenset[str]], weights: npt.NDArray[np.float64]) -> list[float]:
    """By how many standard deviations the count of each pair is off."""
    return [
        abs(drawn.count(pair) - ANCHORS * p) / np.sqrt(ANCHORS * p * (1 - p) + 1e-9)
        for pair, p in chances(weights).items()
    ]


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        (["mining.sampling_strategy=random"], np.ones_like),
        (
            ["mining.sampling_strategy=simans", "mining.simans_a=30", "mining.simans_b=-0.15"],
            lambda s: np.exp(-30 * (s - 0.7 + 0.15) ** 2),
        ),
        (
            ["mining.sampling_strategy=simans", "mining.simans_a=30", "mining.simans_b=0.15"],
            lambda s: np.exp(-30 * (s - 0.7 - 0.15) ** 2),
        ),
        (["mining.sampling_strategy=weighted", "mining.temperature=0.2"], lambda s: np.exp(s / 0.2)),
        (["mining.sampling_strategy=weighted", "mining.temperature=1"], np.exp),
    ],
    ids=["random", "simans below", "simans above", "weighted", "weighted, warmer"],
)
def test_draws_follow_their_weights(same_anchors: Run, settings: list[str], weights: Any) -> None:
    def draw(*more: str) -> list[frozenset[str]]:
        rows = rows_of(same_anchors.mine(*settings, *more).triplets)
        assert len(rows) == 2 * ANCHORS
        assert [row["anchor_id"] for row in rows[::2]] == [row["anchor_id"] for row in rows[1::2]]
        return [frozenset((one["negative_id"], two["negative_id"])) for one, two in zip(*[iter(rows)] * 2, strict=True)]

    window, drawn = COSINES[WINDOW], draw()
    assert max(deviations(drawn, weights(window))) < 4.5
    # So many draws tell these weights from their neighbours'.
    scale = 1 if "weighted" in settings[0] else 30
    for other in (np.exp(-scale * (window - 0.7) ** 2), np.exp(2 * window)):
        assert max(deviations(drawn, other)) > 4.5
    assert draw("seed=7") != drawn


# --- margins ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("margin", [{"relative_margin": 0.1}, {"absolute_margin": 0.2, "relative_margin": None}])
def test_the_highest_positive_sets_the_margin(tmp_path: Path, margin: dict[str, float | None]) -> None:
    worlds = [World.make(seed, tmp_path / str(seed)) for seed in (2, 3, 6)]
    moved = 0
    for world in worlds:
        settings = {"num_negatives": 6, "max_depth": 0, **margin}
        found = world.mine({**settings, "margin_reference": "max"})
        expected = []
        for one in ranked(world):
            highest = max(one.positive_scores)
            relative, absolute = margin["relative_margin"] or 0, margin.get("absolute_margin") or 0
            cutoff = highest - abs(highest) * relative - absolute
            barred = {*one.positives, one.anchor}
            passed = [text for score, text in one.documents if text not in barred and score <= cutoff]
            expected += [(one.anchor, positive, text) for positive in one.positives for text in passed[:6]]
        assert [(row["anchor"], row["positive"], row["negative"]) for row in found] == expected
        moved += found != world.mine({**settings, "margin_reference": "min"})
    assert moved


# --- exclusions -------------------------------------------------------------------------------------------

# Why a document is no negative of q0; d9 has the text of d0 and goes by its id.
TEXTS = {
    "d0": "The known answer",
    "d1": "An answer that only the test split knows",
    "d2": "the  KNOWN answer",
    "d3": "What the same question in capitals is answered by",
    "d4": "how tall is  the TOWER",
    "d5": "One plain document",
    "d6": "Another plain document",
    "d9": "The known answer",
}
BARRED = {
    "positive_id": {"d0", "d1"},
    "positive_text": {"d0", "d1"},  # one text is one row, so either bars what the other does
    "positive_normalized": {"d0", "d1", "d2"},
    "shared_anchor": {"d3"},
    "anchor_text": {"d4"},
}


@pytest.fixture(scope="module")
def excluding(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("exclude")
    data = write_folder(
        folder / "data",
        [(name, "", text) for name, text in TEXTS.items()],
        [("q0", "How tall is the tower"), ("q1", "HOW TALL IS THE TOWER"), ("q2", "Something else")],
        {"train": [("q0", "d0", 1), ("q1", "d3", 1), ("q2", "d5", 1)], "test": [("q0", "d1", 1)]},
    )
    draw = np.random.default_rng(0)
    vectors = draw.standard_normal((len(TEXTS), 8)).astype(np.float32)
    vectors[-1] = vectors[0]
    np.save(data / "corpus.npy", vectors)
    np.save(data / "queries.npy", draw.standard_normal((3, 8)).astype(np.float32))
    config = precomputed_config(folder / "run", data)
    config["mining"] = {"range_max": 20, "num_negatives": 20, "relative_margin": None}
    return Run(config)


@pytest.mark.parametrize("names", [[], *([name] for name in BARRED), list(BARRED)], ids="+".join)
def test_each_exclusion_alone(excluding: Run, names: list[str]) -> None:
    result = excluding.mine(f"mining.exclude=[{', '.join(names)}]")
    barred = {document for name in names for document in BARRED[name]}
    assert set(negatives_of(rows_of(result.triplets), "q0")) == TEXTS.keys() - {"d9"} - barred
    ledger = [row for path in excluding.paths("triplets", "ledger") for row in pq.read_table(path).to_pylist()]
    own = next(row for row in ledger if row["anchor_id"] == "q0")
    assert sum(count for name, count in own.items() if name.startswith("dropped_")) == len(barred)
    assert own["taken"] + len(barred) == own["candidates"] == len(TEXTS) - 1


# --- the window -------------------------------------------------------------------------------------------


@pytest.mark.parity
def test_flagembedding_with_a_wider_window(tmp_path: Path) -> None:
    """Raw ranks 10 to 300, as a whole and drawn from."""
    folder = numbered_folder(tmp_path / "data", 400, 12)
    run = Run(precomputed_config(tmp_path / "run", folder))
    run.config["encoder"]["storage"] = "float32"
    corpus, queries = (np.load(folder / name).astype(np.float64) for name in ("corpus.npy", "queries.npy"))
    order = np.argsort(-(queries @ (corpus / np.linalg.norm(corpus, axis=1, keepdims=True)).T), axis=1)
    run.config["mining"] = {"compat": "flagembedding", "range_max": 300}
    whole = run.mine("mining.num_negatives=290", "mining.on_shortage=keep")
    assert whole.stats["search"]["depth"] == 384  # the least multiple of 64 that leaves 64 to spare
    windows = [[f"d{document}" for document in ranking[10:300] if document != at] for at, ranking in enumerate(order)]
    rows = rows_of(whole.triplets)
    assert [negatives_of(rows, f"q{at}") for at in range(12)] == windows
    drawn = run.mine()
    assert drawn.ran == ("triplets",)
    rows = rows_of(drawn.triplets)
    assert all(len(set(negatives_of(rows, f"q{at}")) & set(windows[at])) == 15 for at in range(12))
    assert len(rows) == 15 * 12
    assert any(row["negative_rank"] >= 210 for row in rows)


# --- what the summary says --------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["min", "each"])
def test_positives_in_a_ranking_are_not_counted_as_negatives(tmp_path: Path, reference: str) -> None:
    config = small.build(tmp_path)
    judged = [*small.judgments(), ("q0", "d1", 1), ("q0", "d2", 1)]
    small.write_qrels(tmp_path / "data/qrels/train.tsv", judged)
    ranking = ("output.format=n-tuple", "output.include_positives=true")
    settings = (*ranking, "mining.num_negatives=30", "mining.range_max=30", f"mining.margin_reference={reference}")
    outcome = small.run("mine", config, *(word for setting in settings for word in ("--set", setting)))
    assert outcome.code == 0
    rows = rows_of(tmp_path / "run/triplets")
    assert len(rows) == len(judged)
    positives = {(anchor, document) for anchor, document, _ in judged}
    taken = {
        # A unit: an anchor, whose positives share its ranking, or with `each` a row.
        (row["anchor_id"] if reference == "min" else at, n): (
            row["anchor_id"],
            row[f"negative_{n}_id"],
            row["scores"][n],
        )
        for at, row in enumerate(rows)
        for n in range(1, 31)
    }
    scores = [score for *pair, score in taken.values() if tuple(pair) not in positives]
    own = len(taken) - len(scores)
    assert own > 3
    stats = graph.mine(load_config(config, list(settings))).stats["triplets"]
    assert (stats["rows"], stats["negatives"], stats["own_positives"]) == (len(rows), len(scores), own)
    assert stats["candidates"] == stats["negatives"] + own + sum(stats["drops"].values())
    found = stats["scores"]["negative"]
    assert found["count"] == len(scores)
    assert (found["mean"], found["max"]) == pytest.approx((np.mean(scores), max(scores)), abs=1e-6)

    # Layouts of positives and negatives, unlike a ranking, have each on its side.
    export = exports.ExportOptions(to="flagembedding", out=tmp_path / "train.jsonl")
    finished.export(load_config(config, list(settings)), export)
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sum(len(line["neg"]) for line in lines) == len(scores)
    assert not any(set(line["pos"]) & set(line["neg"]) for line in lines)

    assert f"{len(rows)} rows in 2 Parquet files" in outcome.out
    assert re.search(rf"negatives +{len(scores)} +{np.mean(scores):.3f}", outcome.out)
    assert re.search(rf"ranked: own positives +{own} ", outcome.out)
    # Samples: the first row is of q0, whose positives are named for what they are.
    _, anchor, *sample = outcome.out.split("Samples")[1].split("\n\n")[0].splitlines()
    assert re.fullmatch(r" +anchor +q0  query 0", anchor)  # with its id, as `negpipe explain` takes it
    shown = [rows[0]["positive"], *(rows[0][f"negative_{n}"] for n in range(1, 31))]
    known = {rows[at]["positive"] for at in range(3)}
    assert [line.split()[0] for line in sample] == ["positive" if t in known else "negative" for t in shown][:4]


def test_the_cost_of_near_duplicates_and_the_commands_to_run_next(tmp_path: Path) -> None:
    config = small.build(tmp_path)
    plain = small.run("mine", config)
    assert "near duplicates" not in plain.out
    assert f"negpipe status {tmp_path / 'run'}\n" in plain.out
    overrides = ("--set", "mining.near_duplicate=0.99", "--set", "output={format: labeled-pair}")
    outcome = small.run("mine", config, *overrides)
    # q0 to q11 have one positive each, and every candidate of the window (10) but it is compared.
    pairs = re.search(r"([\d,]+) pairs of texts compared for near duplicates, in [\d.]+ s\.", outcome.out)
    assert pairs is not None
    assert 12 * 3 <= int(pairs[1].replace(",", "")) <= 12 * 39
    # The run keeps its settings: they need not be typed again.
    assert f"negpipe mine {tmp_path / 'run'} --set mining.relative_margin=0.1\n" in outcome.out
    assert f"negpipe status {tmp_path / 'run'}\n" in outcome.out
