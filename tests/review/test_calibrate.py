"""Leak, hardness and coverage are those of a plain program that hides positives one trial at a time."""

from __future__ import annotations

import csv
import json
import math
import re
import unicodedata
from dataclasses import astuple, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from beir_data import numbered_folder, precomputed_config, tricky_folder, write_vectors
from real_runs import Run
from small_source import run as negpipe

from negpipe.config.file import load_config
from negpipe.config.schema import Config
from negpipe.errors import InputError
from negpipe.review import calibrate, measures
from negpipe.review.calibrate import Calibration, Estimate, Setting
from negpipe.review.calibrate.estimate import bootstrap


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The folder full of traps, with vectors of which an anchor's lies near its positives'."""
    return made(tmp_path_factory.mktemp("calibrate"), seed=1)


def made(folder: Path, seed: int) -> Run:
    data = tricky_folder(folder / "beir")
    documents, queries = (lines(data / f"{name}.jsonl") for name in ("corpus", "queries"))
    write_vectors(data, len(documents), len(queries), seed=seed)
    vectors, draw = np.load(data / "corpus.npy"), np.random.default_rng(seed)
    at = {row["_id"]: number for number, row in enumerate(documents)}
    judged = judgments(data)
    asked = np.stack(
        [
            sum((vectors[at[name]] for name in judged.get(row["_id"], [])), draw.standard_normal(vectors.shape[1]))
            for row in queries
        ]
    )
    np.save(data / "queries.npy", asked.astype(np.float32))
    run = Run(precomputed_config(folder / "run", data))
    for stage in ("ingest", "encode", "index", "search"):
        run.mine(only=stage)
    return run


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def judgments(data: Path) -> dict[str, list[str]]:
    """Query → its documents of both splits."""
    found: dict[str, list[str]] = {}
    for split in ("train", "test"):
        for line in (data / "qrels" / f"{split}.tsv").read_text("utf-8").splitlines()[1:]:
            query, document, grade = line.split("\t")
            if grade != "0":
                found.setdefault(query, []).append(document)
    return found


def normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


# --- a plain program --------------------------------------------------------------------------------------


def plain(run: Run, setting: Setting, wanted: int) -> dict[str, float]:
    """The estimate of one setting, from the source's files and the stored candidates."""
    data = Path(run.config["data"]["path"])
    rows = run.tables("documents")
    texts = [normal(text) for text in rows["text"].to_pylist()]
    names = zip(rows["id"].to_pylist(), rows["other_ids"].to_pylist(), strict=True)
    row_of = {name: at for at, (first, others) in enumerate(names) for name in [first, *(others or [])]}
    asked = {row["_id"]: normal(row["text"]) for row in lines(data / "queries.jsonl")}
    judged = judgments(data)
    candidates = [row for path in run.files("search") for row in pq.read_table(path).to_pylist()]
    anchors = run.tables("anchors")["id"].to_pylist()
    false, taken, scores, ranks, distances = [], [], [], [], []
    covered: dict[str, bool] = {}
    for anchor, found in zip(anchors, candidates, strict=True):
        known = {texts[row_of[name]] for name in judged[anchor]}
        namesakes = [name for name, text in asked.items() if text == asked[anchor] and name != anchor]
        shared = {texts[row_of[name]] for other in namesakes for name in judged.get(other, [])}
        for positive, reference in zip(found["positives"], found["positive_score_dense"], strict=True):
            hidden = known - {texts[positive]}
            if not hidden:
                continue
            barred = {texts[positive], asked[anchor]} | (shared - known)
            survivors = [
                (rank, texts[row] in hidden, score)
                for rank, (row, score) in enumerate(zip(found["rows"], found["score_dense"], strict=True))
                if row >= 0 and texts[row] not in barred and passes(score, reference, setting)
            ]
            window = survivors[setting.range_min : setting.range_max]
            draws = [tuple(window[:wanted])]
            if setting.sampling_strategy == "random" and len(window) > wanted:
                draws = list(combinations(window, wanted))
            for draw in draws:
                share = 1 / len(draws)
                false.append(share * sum(is_hidden for _, is_hidden, _ in draw))
                taken.append(share * len(draw))
                scores.append(share * sum(score for _, _, score in draw))
                ranks.append(share * sum(rank for rank, _, _ in draw))
                distances.append(share * sum(reference - score for _, _, score in draw))
            covered[anchor] = covered.get(anchor, True) and len(window) >= wanted
    total = sum(taken)
    return {
        "leak": sum(false) / total,
        "score": sum(scores) / total,
        "rank": sum(ranks) / total,
        "distance": sum(distances) / total,
        "coverage": float(np.mean(list(covered.values()))),
        "negatives": total,
    }


def passes(score: float, reference: float, setting: Setting) -> bool:
    s, p = np.float32(score), np.float32(reference)
    relative, absolute = setting.relative_margin, setting.absolute_margin
    if setting.max_score is not None and s > np.float32(setting.max_score):
        return False
    if absolute is not None and s + np.float32(absolute) > p:
        return False
    return relative is None or bool(s <= p - abs(p) * np.float32(relative))


SETTINGS = [
    Setting(0, 40, "top"),
    Setting(3, 40, "top"),
    Setting(0, 40, "top", relative_margin=0.05),
    Setting(2, 40, "top", absolute_margin=0.1),
    Setting(0, 40, "top", max_score=0.5),
    Setting(0, 7, "random"),
    Setting(1, 8, "random", relative_margin=0.3),
]


def test_agrees_with_a_plain_program(searched: Run) -> None:
    found = measures.calibrate_settings(load_config(searched.config), lambda _: SETTINGS)
    assert found.method == "hidden"
    for setting, estimate in zip(SETTINGS, found.estimates, strict=True):
        own = plain(searched, setting, wanted=3)
        assert estimate.setting == setting
        for name, value in own.items():
            assert getattr(estimate, name) == pytest.approx(value, abs=1e-5), (setting, name)
    leaks = [estimate.leak for estimate in found.estimates]
    assert leaks[0] is not None and leaks[0] > 0.1
    assert found.anchors < found.all_anchors


def test_random_is_the_mean_of_the_products_own_draws(searched: Run) -> None:
    """simans with a = 0 draws every candidate alike, by the seeds of the product."""
    settings = [Setting(0, 12, "random"), Setting(0, 12, "simans")]
    found = measures.calibrate_settings(load_config(searched.config, ["mining.simans_a=0"]), lambda _: settings)
    exact, drawn = (estimate.leak for estimate in found.estimates)
    assert exact is not None and drawn is not None
    # 16 draws of some 250 negatives: the standard error is below a hundredth.
    assert drawn == pytest.approx(exact, abs=0.03)
    assert found.estimates[1].negatives == found.estimates[0].negatives


def test_margin_reference_and_threads_change_nothing(searched: Run) -> None:
    def estimates(*changes: str) -> list[Any]:
        found = measures.calibrate_settings(load_config(searched.config, list(changes)), lambda _: SETTINGS)
        return [astuple(estimate) for estimate in found.estimates]

    one = estimates("resources.cpus=1")
    assert one == estimates("resources.cpus=3")
    assert one == estimates("mining.margin_reference=each")
    assert one == estimates("mining.margin_reference=max", "mining.on_shortage=drop", "output.format=n-tuple")


def test_interval_is_that_of_scipy() -> None:
    from scipy import stats

    draw = np.random.default_rng(0)
    taken = draw.integers(1, 4, size=(1, 200)).astype(np.float32)
    suspects = draw.binomial(taken.astype(int), 0.2).astype(np.float32)
    ((low, high),) = bootstrap(suspects, taken, seed=1)

    def leak(some: Any, all_taken: Any, axis: int) -> Any:
        return some.sum(axis=axis) / all_taken.sum(axis=axis)

    theirs = stats.bootstrap(
        (suspects[0], taken[0]), leak, paired=True, vectorized=True, method="percentile", n_resamples=5000, rng=2
    ).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.006)
    assert low < suspects.sum() / taken.sum() < high
    assert np.isnan(bootstrap(np.zeros((1, 3), np.float32), np.zeros((1, 3), np.float32), 0)).all()
    assert (bootstrap(suspects, taken, 1) == bootstrap(suspects, taken, 1)).all()


# --- stand-ins ---------------------------------------------------------------------------------------------


def test_positives_of_near_anchors(tmp_path: Path) -> None:
    """Anchors 2i and 2i+1 have one vector and different positives: each one's positive is the other's leak."""
    data = numbered_folder(tmp_path / "beir", 60, 20, dimension=64)
    corpus, draw = np.load(data / "corpus.npy"), np.random.default_rng(0)
    queries = np.stack([corpus[2 * (i // 2)] + corpus[2 * (i // 2) + 1] for i in range(20)])
    np.save(data / "queries.npy", (queries + 1e-4 * draw.standard_normal(queries.shape)).astype(np.float32))
    run = Run(precomputed_config(tmp_path / "run", data))
    for stage in ("ingest", "encode", "index", "search"):
        run.mine(only=stage)
    config = load_config(run.config, ["mining.num_negatives=2"])
    with pytest.raises(InputError, match=r"none of 20 anchors has two different positives.*--near-anchors.*--second"):
        measures.calibrate_settings(config)
    found = measures.calibrate_settings(config, lambda _: [Setting(0, 40, "top"), Setting(2, 40, "top")], near=0.99)
    assert (found.method, found.anchors) == ("near_anchors", 20)
    # The other's positive is among the first two of each anchor, and behind none of them.
    assert [estimate.leak for estimate in found.estimates] == [0.5, 0.0]
    # Resampling says 0 to 0 of no false negative; that 20 anchors have none does not prove that at most 5 % have one.
    assert (found.estimates[1].lo, found.estimates[1].hi) == (0.0, 3 / 20)
    advice = calibrate.recommend(found, coverage=0, max_leak=0.05)
    assert not advice.allowed and advice.sure[-1] == "too few anchors to show that a leak is within 5.0%: it takes 60"
    assert calibrate.recommend(found, coverage=0, max_leak=0.15).allowed
    with pytest.raises(InputError, match=r"a cosine of 1\.1 or more"):
        measures.calibrate_settings(config, near=1.1)


def test_second_opinion(searched: Run, tmp_path: Path) -> None:
    other = made(tmp_path, seed=9)
    setting = Setting(0, 40, "top")
    found = measures.calibrate_settings(
        load_config(searched.config), lambda _: [setting], second=load_config(other.config)
    )
    mine, theirs = (
        [row for path in run.files("search") for row in pq.read_table(path).to_pylist()] for run in (searched, other)
    )
    searched.mine()
    rows = [row for path in searched.paths("triplets", "rows") for row in pq.read_table(path).to_pylist()]
    assert rows
    texts = [normal(text) for text in searched.tables("documents")["text"].to_pylist()]
    judged = judgments(Path(searched.config["data"]["path"]))
    ids = {name: at for at, name in enumerate(searched.tables("documents")["id"].to_pylist())}
    ids |= {f"e{i}": ids[f"d{i}"] for i in range(15)}
    suspected = {}
    for anchor, second in zip(searched.tables("anchors")["id"].to_pylist(), theirs, strict=True):
        least = min(second["positive_score_dense"])
        known = {texts[ids[name]] for name in judged[anchor]}
        pairs = zip(second["rows"], second["score_dense"], strict=True)
        suspected[anchor] = {texts[row] for row, score in pairs if row >= 0 and score > least} - known
    # What is taken is what the product takes with these settings.
    run = searched.copied(tmp_path / "taken")
    run.mine("mining.relative_margin=null", "mining.max_depth=0")
    rows = [row for path in run.paths("triplets", "rows") for row in pq.read_table(path).to_pylist()]
    taken = {(row["anchor_id"], row["negative_id"]) for row in rows}
    false = sum(texts[ids[negative]] in suspected[anchor] for anchor, negative in taken)
    (estimate,) = found.estimates
    assert estimate.leak == pytest.approx(false / len(taken))
    assert 0.0 < false < len(taken)
    assert len(mine) == found.anchors


def test_second_run_of_other_data(searched: Run, tmp_path: Path) -> None:
    other = Run(precomputed_config(tmp_path / "run", numbered_folder(tmp_path / "beir", 20, 4)))
    other.mine()
    with pytest.raises(InputError, match="made from other data"):
        measures.calibrate_settings(load_config(searched.config), second=load_config(other.config))


# --- what is recommended -----------------------------------------------------------------------------------


def estimate(leak: float, score: float, coverage: float = 1.0, width: float = 0.01, **changes: Any) -> Estimate:
    one = Estimate(
        Setting(round(leak * 100), 192, "top"), leak, leak - width, leak + width, 5, 300.0, score, 9.0, 0.1, coverage
    )
    return replace(one, **changes)


def test_frontier_and_choice() -> None:
    easy, better, worse, hard, rare = (
        estimate(0.01, 0.3),
        estimate(0.03, 0.5),
        estimate(0.035, 0.4),
        estimate(0.2, 0.6),
        estimate(0.001, 0.9, coverage=0.5),
    )
    made = Calibration("hidden", 500, 800, 900, 3, [hard, worse, rare, better, easy])
    advice = calibrate.recommend(made, coverage=0.9, max_leak=0.05)
    assert advice.frontier == [easy, better, hard]
    assert (advice.chosen, advice.allowed) == (better, True)
    assert "500 of 800 anchors" in advice.sure[0]
    strict = calibrate.recommend(made, coverage=0.9, max_leak=0.001)
    assert (strict.chosen, strict.allowed) == (easy, False)
    assert calibrate.recommend(made, coverage=1.1, max_leak=0.1).chosen is None
    none = calibrate.recommend(
        replace(made, anchors=30, estimates=[estimate(0.0, 0.3, leaking=0)]), coverage=0, max_leak=1
    )
    assert "30 anchors are few" in none.sure[1]
    assert "rule of three" in none.sure[2]


def test_what_is_pasted_is_what_was_tried(searched: Run) -> None:
    config = load_config(searched.config)
    setting = Setting(3, 40, "random", absolute_margin=0.1)
    pasted = load_config({**searched.config, **yaml.safe_load(setting.yaml())})
    assert calibrate.of_config(pasted) == setting
    assert calibrate.of_config(load_config(searched.config, setting.changes(calibrate.of_config(config)))) == setting
    assert setting.applied(config).mining == pasted.mining.model_copy(update={"on_shortage": "keep"})


def test_grid_begins_with_the_configs_own(searched: Run) -> None:
    config: Config = load_config(searched.config)
    settings = calibrate.grid(
        config, range_min=[0, 5, 900], relative_margin=[0.1], absolute_margin=[], sampling=["top"]
    )
    assert settings[0] == Setting(0, 40, "top", relative_margin=0.05)
    assert settings[1:] == [Setting(first, 40, "top", relative_margin=m) for m in (None, 0.1) for first in (0, 5)]


# --- the command -------------------------------------------------------------------------------------------


def test_command(searched: Run, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(searched.config), "utf-8")
    options = ["--range-min", "0,5", "--relative-margin", "none,0.05", "--absolute-margin", "none", "--coverage", "0.5"]
    plots = [tmp_path / "leak.svg", tmp_path / "leak.png"]
    made_before = {stage: searched.content(stage) for stage in ("ingest", "encode", "index", "search")}
    shown = negpipe("calibrate", config, *options, "--plot", plots[0])
    again = negpipe("calibrate", config, *options, "--plot", plots[1], "--json")
    assert (shown.code, again.code) == (0, 0), shown.err
    assert "mining:\n  range_min: " in shown.out
    assert "hidden positives: one positive is shown" in shown.out
    document = json.loads(again.out)
    stored = pq.read_table(searched.folder / "calibration.parquet").to_pylist()
    assert [row["leak"] for row in stored] == [one["leak"] for one in document["calibration"]["estimates"]]
    assert len(stored) == 8
    assert {"lo", "hi", "score", "coverage", "sampling_strategy", "range_min", "method"} <= set(stored[0])
    assert plots[0].read_text("utf-8").lstrip().startswith("<?xml")
    assert plots[1].read_bytes().startswith(b"\x89PNG")
    assert all(math.isfinite(row["score"]) for row in stored)
    own, chosen = stored[0], document["recommendation"]["chosen"]["setting"]
    assert f"Your setting: leak {own['leak']:.1%}, with 95 % confidence {own['lo']:.1%} to {own['hi']:.1%}" in shown.out
    wanted = " ".join(
        f"--set mining.{name}={'null' if value is None else value}"
        for name, value in chosen.items()
        if value != own[name]
    )
    assert wanted and re.search(rf"^Next: negpipe mine \S+ {re.escape(wanted)}$", shown.out, re.MULTILINE)
    # Nothing was encoded or searched again.
    assert {stage: searched.content(stage) for stage in made_before} == made_before


def test_the_table_is_short_and_csv_has_all(searched: Run, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(searched.config), "utf-8")
    shown = negpipe("calibrate", config, "--coverage", "0.3")
    every = [*csv.DictReader(negpipe("calibrate", config, "--coverage", "0.3", "--format", "csv").out.splitlines())]
    lines = re.findall(r"^(?:top|random) +\d+ .*%.*$", shown.out, re.MULTILINE)
    assert 2 <= len(lines) <= 12 and len(every) > 40
    assert re.search(rf"^Shown: yours, and {len(lines) - 1} of {len(every)} settings: .* --format csv", shown.out, re.M)
    assert lines[0].endswith("config") and sum("chosen" in line for line in lines) == 1

    def cell(row: dict[str, str]) -> str:
        return f"{float(row['leak']):.1%} {float(row['lo']):.1%} {float(row['hi']):.1%} {float(row['score']):.3f}"

    # Shown are settings that no other surpasses.
    rated = [row for row in every if row["leak"] and float(row["coverage"]) >= 0.3]
    surpassed = {
        cell(one)
        for one in rated
        for other in rated
        if float(other["leak"]) <= float(one["leak"]) and float(other["score"]) > float(one["score"])
    }
    best = {cell(row) for row in rated} - surpassed
    assert {" ".join(re.findall(r"\S+%|0\.\d{3}", line)[:4]) for line in lines[1:]} <= best


@pytest.mark.parametrize(
    ("option", "label"),
    [
        (
            "--near-anchors",
            "stand-in, not hidden positives: a negative counts as false if it is a positive of an anchor",
        ),
        ("--second", "stand-in, not hidden positives: a negative counts as suspect if the second run's model ranks"),
    ],
)
def test_stand_ins_are_labelled_as_what_they_are(searched: Run, tmp_path: Path, option: str, label: str) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(searched.config), "utf-8")
    value = "0.5" if option == "--near-anchors" else config
    shown = negpipe("calibrate", config, "--range-min", "0", "--absolute-margin", "none", option, value)
    assert shown.code == 0, shown.err
    assert label in " ".join(shown.out.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--range-min", "0,x"], "--range-min 0,x: expected comma-separated numbers"),
        (["--sampling", "best"], "'best' is not one of top"),
        (["--plot", "leak.pdf"], "ending in .svg or .png"),
        (["--near-anchors", "0.9", "--second", "x.yaml"], "use only one"),
        (["--set", "mining.num_negatives=0", "--set", "mining.num_random=2"], "only mined negatives can be calibrated"),
    ],
)
def test_wrong_options(searched: Run, tmp_path: Path, options: list[str], message: str) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(searched.config), "utf-8")
    done = negpipe("calibrate", config, *options)
    assert (done.code, message in done.err) == (2, True), done.err


def test_before_search(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    run = Run(precomputed_config(tmp_path / "run", numbered_folder(tmp_path / "beir", 20, 4)))
    config.write_text(json.dumps(run.config), "utf-8")
    run.mine(only="ingest")
    done = negpipe("calibrate", config)
    assert (done.code, "`negpipe encode" in done.err) == (3, True)
