"""Deeper candidates, random negatives and near duplicates, each beside a plain computation."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
from beir_data import tricky_folder, write_folder, write_vectors
from real_runs import Run

from negpipe.config.file import load_config
from negpipe.data import candidates
from negpipe.data.texts import normalize
from negpipe.errors import ConfigError
from negpipe.select import deeper, randoms

DOCUMENTS = 278  # rows of the folder full of traps; 15 of its 293 documents are copies
LEVELS = (64, 128, 256, DOCUMENTS)


def made(folder: Path, data: Path, **settings: Any) -> Run:
    """A config over the vectors that `write_vectors` left beside the data."""
    return Run(
        {
            "run_dir": str(folder / "run"),
            "data": {"path": str(data), "part_rows": 24, **settings.pop("data", {})},
            "encoder": {
                "backend": "precomputed",
                "corpus_vectors": str(data / "corpus.npy"),
                "anchor_vectors": str(data / "queries.npy"),
            },
            "mining": {"range_max": 64, "num_negatives": 3, "relative_margin": 0.6, **settings.pop("mining", {})},
            "search": {"depth": 64},
            "executor": {"kind": "inline"},
            "resources": {"cpus": 1},
            **settings,
        }
    )


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The folder full of traps, with vectors that leave many anchors short; mined without a second search."""
    folder = tmp_path_factory.mktemp("selection")
    data = tricky_folder(folder / "beir")
    counts = [len((data / f"{name}.jsonl").read_text("utf-8").splitlines()) for name in ("corpus", "queries")]
    write_vectors(data, *counts, seed=3)
    run = made(folder, data)
    run.mine("mining.max_depth=null")
    return run


@pytest.fixture
def run(searched: Run, tmp_path: Path) -> Run:
    return searched.copied(tmp_path / "run")


def rows(run: Run) -> list[dict[str, Any]]:
    return [row for path in run.files("triplets") for row in pq.read_table(path).to_pylist()]


def ledger(run: Run) -> dict[str, dict[str, Any]]:
    files = [file["path"] for part in run.parts("triplets") for file in part["files"]]
    tables = [pq.read_table(run.folder / path) for path in files if path.startswith("ledger/")]
    return {row["anchor_id"]: row for table in tables for row in table.to_pylist()}


def stats(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = run.manifest("triplets")["stats"]
    return found


# --- adaptive depth -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["min", "each"])
def test_deeper_candidates_are_those_of_a_deep_search(run: Run, tmp_path: Path, reference: str) -> None:
    run.mine(f"mining.margin_reference={reference}", "mining.max_depth=300")
    deep = run.copied(tmp_path / "deep")
    deep.mine(f"mining.margin_reference={reference}", "mining.max_depth=0", "search.depth=300")
    assert rows(run) == rows(deep)
    assert 0 < stats(run)["searched_deeper"] < stats(run)["short_anchors"] + len(ledger(run))


def test_depth_is_doubled_as_far_as_an_anchor_needs(run: Run, tmp_path: Path) -> None:
    shallow = ledger(run)
    run.mine("mining.max_depth=300")
    deep = run.copied(tmp_path / "deep")
    deep.mine("mining.max_depth=null", "search.depth=300")
    enough = {name: row["deepest_rank"] if not row["short"] else DOCUMENTS - 1 for name, row in ledger(deep).items()}
    seen = {name: row["candidates"] for name, row in ledger(run).items()}
    assert seen == {name: next(depth for depth in LEVELS if depth > rank) for name, rank in enough.items()}
    assert len(set(seen.values())) >= 3, "too little happens to show anything"
    assert {name for name, depth in seen.items() if depth > 64} == {
        name for name, row in shallow.items() if row["short"]
    }


def test_random_ones_fill_up_only_what_deeper_candidates_leave(run: Run) -> None:
    run.mine("mining.max_depth=300")
    mined = {name: row["taken"] for name, row in ledger(run).items()}
    run.mine("mining.max_depth=300", "mining.on_shortage=random")
    filled = ledger(run)
    assert {name: row["taken"] for name, row in filled.items()} == mined
    assert stats(run)["searched_deeper"] > 0
    for name, row in filled.items():
        assert not row["random"] or mined[name] < row["taken"] + row["random"]
    assert {row["negative_rank"] is None for row in rows(run) if row["source"] == "random"} <= {True}


@pytest.mark.slow
def test_why_an_anchor_is_short_does_not_depend_on_its_neighbours(run: Run) -> None:
    """One searched deeper widens the slice for all who stand in it; who cannot gain by that is not out of corpus."""
    settings = ["mining.max_depth=200", "mining.min_score=0.21", "mining.num_negatives=40"]
    together, reasons = Counter[str](), {}
    for part_rows in (4, 500):
        run.mine(*settings, f"data.part_rows={part_rows}")
        reasons[part_rows] = {name: row["shortage_reason"] for name, row in ledger(run).items() if row["short"]}
        together.update(reasons[part_rows].values())
        assert len({row["candidates"] for row in ledger(run).values() if row["short"]}) > 1
    assert reasons[4] == reasons[500]
    assert set(together) == {"depth"}
    run.mine("mining.max_depth=300", "mining.num_negatives=40", "mining.relative_margin=0.9")
    assert {row["shortage_reason"] for row in ledger(run).values() if row["candidates"] == DOCUMENTS} <= {
        "corpus",
        None,
    }


def test_candidates_of_a_deeper_run_are_looked_at_no_deeper_than_those_of_a_fresh_one(run: Run, tmp_path: Path) -> None:
    settings = ("mining.max_depth=0", "mining.num_negatives=9")
    fresh = run.copied(tmp_path / "fresh")
    fresh.mine(*settings)
    run.mine(*settings, "search.depth=256")
    assert rows(run) != rows(fresh)
    assert run.mine(*settings).ran == ("triplets",)
    assert (rows(run), ledger(run)) == (rows(fresh), ledger(fresh))


def test_depth_has_a_limit_and_search_is_left_alone(run: Run) -> None:
    before = run.content("search")
    run.mine("mining.max_depth=100")
    assert {row["candidates"] for row in ledger(run).values()} == {64, 100}
    assert run.content("search") == before


@pytest.mark.parametrize(
    "overrides",
    [
        ("mining.max_depth=0",),
        ("mining.max_depth=64",),
        ("mining.depth=64",),
        ("mining.rank_over=raw",),
        ("mining.relative_margin=null",),  # nobody is short
        ("mining.min_score=0.5", "output.min_rows=0"),  # what lies deeper scores less
        ("search.depth=300",),
    ],
)
def test_no_second_search_where_it_cannot_help(run: Run, overrides: tuple[str, ...]) -> None:
    run.mine(*overrides)
    assert stats(run)["searched_deeper"] == 0
    assert not (run.folder / "deeper").exists()


@pytest.mark.slow
@pytest.mark.guarantee("workers, threads, blocks and memory change no byte")
def test_bytes_do_not_depend_on_workers(run: Run, tmp_path: Path) -> None:
    settings = ("mining.num_random=2", "mining.near_duplicate=0.7", "mining.max_depth=300")
    other = run.copied(tmp_path / "other")
    run.mine(*settings)
    process = other.start("triplets", *settings, "executor.kind=local", "executor.workers=2", "resources.cpus=4")
    process.communicate()
    assert process.returncode == 0, other.log.read_text("utf-8")
    assert run.content("triplets") == other.content("triplets")
    assert any(path.startswith("deeper/") for path in run.content("triplets"))


@pytest.mark.slow
def test_groups_of_anchors_searched_together_change_no_byte(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = run.copied(tmp_path / "other")
    whole = run.copied(tmp_path / "whole")
    whole.mine("mining.max_depth=300")
    for module in (deeper, candidates):
        monkeypatch.setattr(module, "CELLS", 4 * DOCUMENTS)
    run.mine("mining.max_depth=300")
    monkeypatch.setattr(deeper, "_CELL", 2**40)  # one group at a time
    other.mine("mining.max_depth=300")
    assert run.content("triplets") == other.content("triplets")
    assert rows(run) == rows(whole)
    assert ledger(run) == ledger(whole)
    groups = [pq.ParquetFile(path).metadata.num_row_groups for path in run.folder.glob("deeper/*")]
    assert max(groups) > 3


# --- random negatives -----------------------------------------------------------------------------------


def check_random(run: Run, chosen: list[dict[str, Any]]) -> None:
    """Never a positive of any split or its text, never the anchor, never twice; scores are those of the vectors."""
    documents, anchors = run.tables("documents"), {row["id"]: row for row in run.tables("anchors").to_pylist()}
    place = {name: row for row, name in enumerate(documents["id"].to_pylist())}
    texts = [normalize(text) for text in documents["text"].to_pylist()]
    vectors = [np.concatenate([np.load(path) for path in run.files("encode", kind)]) for kind in ("corpus", "anchors")]
    order, namesakes = {name: number for number, name in enumerate(anchors)}, run.namesakes()
    for row in chosen:
        anchor, negative = anchors[row["anchor_id"]], place[row["negative_id"]]
        shared = namesakes.get(anchor["normalized"], [])
        barred = {texts[known] for known in [*anchor["known"], *shared]} | {normalize(anchor["text"])}
        assert texts[negative] not in barred
        assert row["negative_rank"] is None
        one, other = vectors[0][negative].astype(np.float64), vectors[1][order[row["anchor_id"]]].astype(np.float64)
        assert row["negative_score"] == pytest.approx(one @ other, abs=1e-6)
    negatives = Counter((row["anchor_id"], row["positive_id"], row["negative_id"]) for row in rows(run))
    assert set(negatives.values()) == {1}


@pytest.mark.parametrize("mined", [0, 3])
def test_random_negatives_beside_and_instead_of_mined_ones(run: Run, tmp_path: Path, mined: int) -> None:
    before = rows(run)
    run.mine(f"mining.num_negatives={mined}", "mining.num_random=5", "mining.max_depth=0")
    found = rows(run)
    chosen = [row for row in found if row["source"] == "random"]
    check_random(run, chosen)
    assert set(Counter((row["anchor_id"], row["positive_id"]) for row in chosen).values()) == {5}
    assert stats(run)["random_negatives"] == 5 * len(ledger(run))
    kept = [
        {name: value for name, value in row.items() if name != "source"} for row in found if row["source"] == "mined"
    ]
    assert kept == (before if mined else [])
    drawn = {row["negative_id"] for row in chosen}
    assert len(drawn) > 0.7 * DOCUMENTS, "the draw leaves out much of the corpus"

    other = run.copied(tmp_path / "other")
    other.mine(f"mining.num_negatives={mined}", "mining.num_random=5", "mining.max_depth=0", "seed=7")
    again = [row["negative_id"] for row in rows(other) if row["source"] == "random"]
    assert again != [row["negative_id"] for row in chosen]


def test_random_negatives_do_not_depend_on_parts(run: Run, tmp_path: Path) -> None:
    settings = ("mining.num_random=2", "mining.on_shortage=random", "mining.max_depth=0")
    run.mine(*settings)
    other = run.at(tmp_path / "other")
    other.mine(*settings, "data.part_rows=400")
    assert len(other.files("triplets")) < len(run.files("triplets"))
    assert rows(other) == rows(run)


def test_shortage_is_filled_on_request(run: Run) -> None:
    short = {name: row["taken"] for name, row in ledger(run).items() if row["short"]}
    run.mine("mining.on_shortage=random", "mining.max_depth=0")
    check_random(run, [row for row in rows(run) if row["source"] == "random"])
    assert {name: row["random"] for name, row in ledger(run).items() if row["random"]} == {
        name: 3 - taken for name, taken in short.items()
    }
    assert stats(run)["short_anchors"] == 0


def test_dropped_anchors_get_no_random_negatives(run: Run) -> None:
    short = {name for name, row in ledger(run).items() if row["short"]}
    run.mine("mining.on_shortage=drop", "mining.num_random=1", "mining.max_depth=0")
    assert {row["anchor_id"] for row in rows(run)} == set(ledger(run)) - short


def test_a_tiny_corpus_gives_what_it_has(tmp_path: Path) -> None:
    documents = [(f"d{i}", "", f"text {i}") for i in range(5)]
    data = write_folder(
        tmp_path / "beir", documents, [("q0", "text 4"), ("q1", "other")], {"train": [("q0", "d0", 1), ("q1", "d1", 1)]}
    )
    write_vectors(data, 5, 2, seed=0)
    run = made(tmp_path, data, mining={"num_negatives": 1, "range_max": 1, "num_random": 9, "relative_margin": None})
    run.mine()
    found = {name: [row for row in rows(run) if row["anchor_id"] == name] for name in ("q0", "q1")}
    assert {row["negative_id"] for row in found["q0"]} == {"d1", "d2", "d3"}  # d4 is its own text
    assert {row["negative_id"] for row in found["q1"]} == {"d0", "d2", "d3", "d4"}
    assert [len(found[name]) for name in found] == [3, 4]
    assert all(row["short"] for row in ledger(run).values())


@pytest.mark.parametrize("corpus", [3, 40, 100_000])
def test_draws_are_the_first_admissible_of_a_sequence_of_its_own(corpus: int) -> None:
    anchors = np.arange(50, dtype=np.uint64) * np.uint64(2**40 + 3)
    wanted = np.arange(50) % 5
    barred_rows = np.arange(0, corpus, 2)

    def barred(units: npt.NDArray[np.int64], found: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        return np.isin(found, barred_rows)

    drawn, offsets = randoms.draw(1, anchors, wanted, corpus, barred)
    lists = [drawn[low:high].tolist() for low, high in pairwise(offsets)]
    for unit, own in enumerate(lists):
        assert len(own) == len(set(own)) == min(wanted[unit], corpus // 2)
        assert all(row % 2 and 0 <= row < corpus for row in own)
        # Alone it gets the same, and a smaller wish is a part of a larger one.
        alone, _ = randoms.draw(1, anchors[unit : unit + 1], wanted[unit : unit + 1], corpus, barred)
        assert alone.tolist() == own
    assert len({tuple(own) for own in lists if len(own) == 4}) > 5 or corpus < 10


def test_draws_reach_what_little_is_left() -> None:
    left = {123, 45_678}
    drawn, _ = randoms.draw(
        0, np.array([1], np.uint64), np.array([3]), 50_000, lambda units, found: ~np.isin(found, list(left))
    )
    assert set(drawn.tolist()) == left


def test_no_negatives_at_all_is_refused(searched: Run) -> None:
    with pytest.raises(ConfigError, match=r"mining\.num_negatives and mining\.num_random are both 0"):
        load_config(searched.config, ["mining.num_negatives=0"])


# --- near duplicates ------------------------------------------------------------------------------------


@cache
def similarity(one: str, other: str) -> float:
    """1 - (characters to insert or delete) / (length of both), by the longest common subsequence."""
    lengths = [0] * (len(other) + 1)
    for a in one:
        diagonal = 0
        for at, b in enumerate(other, 1):
            diagonal, lengths[at] = lengths[at], diagonal + 1 if a == b else max(lengths[at], lengths[at - 1])
    return 2 * lengths[-1] / (len(one) + len(other))


@pytest.fixture(scope="module")
def copied_texts(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Sixty documents, each positive with a dozen copies that differ a little, in case, or a lot."""
    folder, draw = tmp_path_factory.mktemp("copies"), random.Random(5)
    letters = "abcdefghij "

    def changed(text: str, edits: int) -> str:
        for _ in range(edits):
            at = draw.randrange(len(text))
            text = text[:at] + draw.choice(letters) + text[at + draw.randint(0, 1) :]
        return text

    documents = []
    for number in range(5):
        text = f"{number} " + "".join(draw.choices(letters, k=40))
        documents += [(f"d{number}.{copy}", "", changed(text, 2 * copy)) for copy in range(11)]
        documents.append((f"d{number}.upper", "", f"{text.upper()}!"))
    queries = [(f"q{i}", f"question {i}") for i in range(5)]
    qrels = [(f"q{i}", f"d{i}.{copy}", 1) for i in range(5) for copy in (0, 6)]
    data = write_folder(folder / "beir", documents, queries, {"train": qrels})
    write_vectors(data, 60, 5, seed=9)
    run = made(folder, data, mining={"num_negatives": 60, "range_max": 60, "relative_margin": None})
    run.mine()
    return run


@pytest.mark.parametrize("threshold", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("window", [(0, 3, 2), (2, 9, 4), (0, 60, 60)])
@pytest.mark.parametrize("reference", ["min", "each"])
def test_near_duplicates_of_positives_are_dropped(
    copied_texts: Run, tmp_path: Path, threshold: float, window: tuple[int, int, int], reference: str
) -> None:
    run = copied_texts.copied(tmp_path / "run")
    first, last, count = window
    texts = {row["id"]: normalize(row["text"]) for row in run.tables("documents").to_pylist()}
    expected = {}
    for anchor in run.tables("anchors").to_pylist():
        positives = [list(texts)[known] for known in anchor["known"]]
        passed = {row["negative_id"]: row for row in rows(copied_texts) if row["anchor_id"] == anchor["id"]}
        unlike = [n for n in passed if all(similarity(texts[n], texts[p]) < threshold for p in positives)]
        expected[anchor["id"]] = unlike[first:last][:count]
    names = ("range_min", "range_max", "num_negatives")
    settings = [f"mining.{name}={value}" for name, value in zip(names, window, strict=True)]
    run.mine(*settings, f"mining.near_duplicate={threshold}", f"mining.margin_reference={reference}")
    found: dict[str, list[str]] = {}
    for row in rows(run):
        found.setdefault(row["anchor_id"], []).append(row["negative_id"])
    assert {name: list(dict.fromkeys(negatives)) for name, negatives in found.items()} == expected
    # Who cannot be taken is not compared, and who is asked for twice is compared once.
    survivors = sum(
        len({row["negative_id"] for row in rows(copied_texts) if row["anchor_id"] == name}) for name in found
    )
    assert 0 < stats(run)["texts_compared"] <= (2 * survivors if count == 60 else survivors)
    assert all(part["provenance"]["seconds_comparing"] >= 0 for part in run.parts("triplets"))


def test_random_negatives_are_no_near_duplicates(copied_texts: Run, tmp_path: Path) -> None:
    run = copied_texts.copied(tmp_path / "run")
    run.mine("mining.num_negatives=0", "mining.num_random=60", "mining.near_duplicate=0.6")
    texts = {row["id"]: normalize(row["text"]) for row in run.tables("documents").to_pylist()}
    for anchor in run.tables("anchors").to_pylist():
        positives = [list(texts)[known] for known in anchor["known"]]
        unlike = {n for n in texts if all(similarity(texts[n], texts[p]) < 0.6 for p in positives)}
        assert {row["negative_id"] for row in rows(run) if row["anchor_id"] == anchor["id"]} == unlike
