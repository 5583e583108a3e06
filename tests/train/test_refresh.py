"""Rounds of mining and training: what they make and tell, when they stop, and what becomes of them when run again."""

from __future__ import annotations

import csv
import errno
import io
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import learnable
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_source as small
from real_runs import Run, kill, wait
from tiny_model import build_tiny_model

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.errors import ConfigError, LockedError
from negpipe.store.lock import run_lock
from negpipe.train.comparison import METRICS
from negpipe.train.refresh import Refreshed, refresh

pytestmark = pytest.mark.slow

RISING = {"steps": 30, "batch_size": 8, "learning_rate": 0.003, "warmup": 0, "checkpoint_steps": 5}
"""Each of the first rounds raises the score."""
HARDLY = {**RISING, "steps": 4, "learning_rate": 0.0001}
"""The first one does, the second one does not."""


def made_of(run: Run, rounds: int, *overrides: str) -> Refreshed:
    with learnable.training_here():
        return refresh(load_config(run.config, list(overrides)), rounds)


def round_of(run: Run, number: int) -> Run:
    """A round as a run: its records, and its files in the store."""
    return Run({"run_dir": str(run.folder / "rounds" / str(number))})


def stored(run: Run, number: int, stage: str, kind: str, role: str) -> Path:
    (part,) = round_of(run, number).parts(stage, kind)
    (path,) = (file["path"] for file in part["files"] if file["role"] == role)
    return run.folder / "rounds/store" / str(path)


def scores(run: Run, number: int) -> pa.Table:
    return pq.read_table(stored(run, number, "train", "evaluation", "scores"))


def table(run: Run) -> list[dict[str, Any]]:
    return pq.read_table(run.folder / "rounds/rounds.parquet").to_pylist()  # type: ignore[no-any-return]  # pyarrow


def negatives(run: Run, number: int) -> set[tuple[str, str]]:
    rows = pq.read_table(run.folder / f"rounds/{number}/triplets", columns=["anchor_id", "negative_id"])
    return {*zip(*(rows[name].to_pylist() for name in rows.column_names), strict=True)}


def times(run: Run) -> dict[Path, int]:
    """When everything was written that rounds made."""
    files = [path for path in (run.folder / "rounds").glob("*/**/*") if path.is_file()]
    return {path: path.stat().st_mtime_ns for path in files if path.suffix != ".lock" and path.parent.name != "runs"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With some anchors that have two positives, so that a leak rate can be estimated."""
    data = learnable.build(tmp_path_factory.mktemp("source") / "beir")
    train = [(f"q{i}", f"d{i}", 1) for i in range(learnable.TRAINED)]
    small.write_qrels(data / "qrels/train.tsv", [*train, *((f"q{i}", f"d{i + 1}", 1) for i in range(12))])
    return data


@pytest.fixture(scope="module")
def one(source: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A single round."""
    settings = learnable.settings(tmp_path_factory.mktemp("one") / "run", source, tiny)
    run = Run({**settings, "train": RISING})
    made_of(run, 1)
    return run


@pytest.fixture(scope="module")
def two(one: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Refreshed]:
    """The same, gone on with: the second round."""
    run = one.copied(tmp_path_factory.mktemp("two") / "run")
    return run, made_of(run, 2)


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, logger="negpipe"):
        yield caplog


# --- what a round is ----------------------------------------------------------------------------------


def test_a_round_mines_with_the_model_of_the_one_before_and_trains_it_on(two: tuple[Run, Refreshed]) -> None:
    from sentence_transformers import SentenceTransformer

    run, _ = two
    texts = [json.loads(line)["text"] for line in (Path(run.config["data"]["path"]) / "corpus.jsonl").open()]
    for number, model in ((1, run.config["encoder"]["model"]), (2, run.folder / "rounds/1/model")):
        parts = [part for part in round_of(run, number).parts("encode") if part["kind"] != "anchors"]
        files = [run.folder / "rounds/store" / part["files"][0]["path"] for part in parts]
        vectors = np.concatenate([np.load(file).astype(np.float32) for file in files])
        theirs = SentenceTransformer(str(model)).encode(texts, normalize_embeddings=True)
        assert np.allclose(vectors, theirs, atol=2e-3)  # they are stored in float16
    for metric in METRICS:
        before, after = scores(run, 2)[f"{metric}_before"], scores(run, 1)[f"{metric}_after"]
        assert before.equals(after)


def test_the_table_is_what_the_rounds_files_give(two: tuple[Run, Refreshed], tmp_path: Path) -> None:
    from scipy import stats

    run, _ = two
    rows = table(run)
    assert [row["number"] for row in rows] == [1, 2]
    for row in rows:
        found = scores(run, row["number"])
        for metric in METRICS:
            before, after = (found[f"{metric}_{side}"].to_numpy() for side in ("before", "after"))
            interval = stats.ttest_rel(after, before).confidence_interval(0.95)
            expected = (before.mean(), after.mean(), interval.low, interval.high)
            told = [row[f"{metric}_{name}"] for name in ("before", "after", "low", "high")]
            assert told == pytest.approx(expected, abs=1e-12, nan_ok=True)
        assert row["rows"] == pq.read_table(run.folder / f"rounds/{row['number']}/triplets").num_rows
        assert row["dimension"] == row["trained_dimension"] == 32
        # The round's config is one for every command.
        path = run.folder / f"rounds/{row['number']}.yaml"
        tried = json.loads(small.run("calibrate", path, "--json").out)["calibration"]
        leak = [tried["estimates"][0][name] for name in ("leak", "lo", "hi")]
        assert [row["leak"], row["leak_low"], row["leak_high"], row["leak_anchors"]] == [*leak, tried["anchors"]]
        assert row["leak"] > 0 and row["leak_missing"] is None
    first, second = (negatives(run, number) for number in (1, 2))
    assert [row["changed"] for row in rows] == [None, pytest.approx(len(second - first) / len(second))]
    assert 0 < rows[1]["changed"] < 1


def test_the_best_is_compared_to_the_base(two: tuple[Run, Refreshed]) -> None:
    from scipy import stats

    run, made = two
    assert made.stopped is None and made.best is made.rounds[1]
    before, after = scores(run, 1)["nDCG@10_before"].to_numpy(), scores(run, 2)["nDCG@10_after"].to_numpy()
    interval = stats.ttest_rel(after, before).confidence_interval(0.95)
    first = made.compared[0]
    assert (first.before, first.after) == pytest.approx((before.mean(), after.mean()))
    assert (first.low, first.high) == pytest.approx((interval.low, interval.high))
    assert made.model == run.folder / "rounds/best/model"
    assert (made.model / "model.safetensors").samefile(run.folder / "rounds/2/model/model.safetensors")


# --- run again ----------------------------------------------------------------------------------------


def test_rounds_that_are_done_cost_nothing(two: tuple[Run, Refreshed], told: pytest.LogCaptureFixture) -> None:
    run, made = two
    before, rows = times(run), table(run)
    again = made_of(run, 2)
    assert again == made and times(run) == before and table(run) == rows
    lines = [record.getMessage() for record in told.records]
    assert not [line for line in lines if ": starting, " in line or "reading " in line]
    assert [line.split(":")[0] for line in lines if " of 2: " in line] == ["round 1 of 2", "round 2 of 2"]


def test_more_rounds_go_on_and_read_no_source(
    two: tuple[Run, Refreshed], tmp_path: Path, told: pytest.LogCaptureFixture
) -> None:
    run, made = two[0].copied(tmp_path / "run"), two[1]
    rows = table(run)
    more = made_of(run, 3)
    ran = [record.getMessage().split(":")[0] for record in told.records if ": starting, " in record.getMessage()]
    assert ran == ["encode", "index", "search", "triplets", "train"]
    assert more.rounds[:2] == made.rounds and table(run)[:2] == rows and len(table(run)) == 3


def test_the_same_seed_gives_the_same_table(two: tuple[Run, Refreshed], tmp_path: Path) -> None:
    run = two[0].at(tmp_path / "run")
    made_of(run, 2)
    assert table(run) == table(two[0])


def test_killed_in_the_second_round(two: tuple[Run, Refreshed], one: Run, tmp_path: Path) -> None:
    run = one.copied(tmp_path / "run")
    rounds = ["--rounds", "2"]
    process = run.start("refresh", "executor.kind=local", flags=rounds)
    try:
        begun = run.folder / "rounds/2/.negpipe/train"
        assert wait(process, lambda: any(begun.glob("begun-*/checkpoint-*/whole"))), run.log.read_text()
    finally:
        kill(process)
    assert not round_of(run, 2).complete("train")
    before = times(run)
    code, out, log = run.command("refresh", "executor.kind=local", flags=rounds)
    assert code == 0, log
    assert out.rstrip().splitlines()[-1].startswith("RESULT: ")
    assert table(run) == table(two[0])
    first = {path: time for path, time in before.items() if path.is_relative_to(run.folder / "rounds/1")}
    assert first and first.items() <= times(run).items()
    (model,) = round_of(run, 2).parts("train", "model")
    assert model["provenance"]["resumed_at_step"] >= 5


def test_other_settings_make_other_rounds(two: tuple[Run, Refreshed], tmp_path: Path) -> None:
    run, made = two[0].copied(tmp_path / "run"), two[1]
    shutil.rmtree(run.folder / "rounds/store/.negpipe/runs")  # those copied from have the parts too
    other = made_of(run, 2, "mining.range_min=3")
    assert {one.mined for one in other.rounds}.isdisjoint(one.mined for one in made.rounds)
    configs = [load_config(run.folder / f"rounds/{number}.yaml") for number in (1, 2)]
    assert [graph.clean(config) > 0 for config in configs] == [True, False]
    assert {state.state for config in configs for state in graph.status(config)} == {"current"}
    assert made_of(run, 2, "mining.range_min=3") == other


def test_a_run_whose_parts_are_in_a_shared_store_is_the_first_round(
    one: Run, tmp_path: Path, told: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", link)  # the store is on another disk
    run = Run({**one.at(tmp_path / "run").config, "store": str(tmp_path / "store")})
    with learnable.training_here():
        graph.train(load_config(run.config))
    told.clear()
    made_of(run, 1)
    ran = [record.getMessage() for record in told.records if ": starting, " in record.getMessage()]
    parts = [record.getMessage() for record in told.records if "parts already exist" in record.getMessage()]
    assert [line.split(":")[0] for line in ran] == ["encode", "index", "search", "triplets", "train"]
    assert len(parts) >= 5 and all(there == of for there, _, of in (line.split()[1:4] for line in parts))
    made_of(run, 1)
    with learnable.training_here():
        assert graph.train(load_config(run.config)).ran == ()


# --- when it ends -------------------------------------------------------------------------------------


def test_it_stops_where_the_score_does_not_rise(mined: Run, tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    run = Run({**mined.config, "run_dir": str(tmp_path / "run"), "train": HARDLY})
    made = made_of(run, 4)
    assert [one.number for one in made.rounds] == [1, 2] and made.best is made.rounds[0]
    base, first, second = made.rounds[0].compared[0].before, *(one.score for one in made.rounds)
    assert base < first >= second
    assert made.stopped and f"{second:.4f}" in made.stopped and f"round 1 has {first:.4f}" in made.stopped
    assert made.stopped in told.records[-1].getMessage()
    assert (run.folder / "rounds/best").readlink() == Path("1")
    # No anchor of this source has two positives.
    assert all(one.leak is None and "two different positives" in str(one.leak_missing) for one in made.rounds)
    worse = made_of(run, 4, "train.learning_rate=0.1")
    assert len(worse.rounds) == 1 and worse.stopped and "the base has" in worse.stopped


@pytest.mark.parametrize("width", [32, 8], ids=["of a model", "brought along"])
def test_a_base_of_another_width_is_said(
    width: int, one: Run, tmp_path: Path, told: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    from negpipe.cli.printed import show_rounds

    base = build_tiny_model(tmp_path / "wide", dim=48)
    run = Run({**one.at(tmp_path / "run").config, "train": {**RISING, "base": str(base)}})
    if width == 8:
        files = {
            "corpus_vectors": learnable.DOCUMENTS,
            "anchor_vectors": learnable.DOCUMENTS + learnable.BOTH_POSITIVES,
        }
        for name, count in files.items():
            np.save(tmp_path / f"{name}.npy", small.vectors(count, seed=1))
        vectors = {name: str(tmp_path / f"{name}.npy") for name in files}
        run.config["encoder"] = {"backend": "precomputed", **vectors}
    made = made_of(run, 2)
    assert [(one.dimension, one.trained_dimension) for one in made.rounds] == [(width, 48), (48, 48)]
    warned = [record.getMessage() for record in told.records if "another dimension" in record.getMessage()]
    assert len(warned) == 1 and warned[0].startswith("round 1") and "48" in warned[0]
    assert scores(run, 2)["nDCG@10_before"].equals(scores(run, 1)["nDCG@10_after"])
    show_rounds(made)
    assert "model have 48 dimensions" in " ".join(capsys.readouterr().out.split())


# --- the command --------------------------------------------------------------------------------------


def test_command_refresh(two: tuple[Run, Refreshed], tmp_path: Path) -> None:
    run, made = two
    path = tmp_path / "config.json"
    path.write_text(json.dumps(run.config), encoding="utf-8")
    shown = small.run("refresh", path, "--rounds", "2")
    assert shown.code == 0, shown.err
    assert shown.out.rstrip().splitlines()[-1] == made.compared[0].line
    for one in made.rounds:
        assert f"{one.score:.4f}" in shown.out and f"{one.leak:.1%}" in shown.out
    document = json.loads(small.run("refresh", path, "--rounds", "2", "--json").out)
    assert document == json.loads(json.dumps(made.document()))
    assert document["best"] == 2 and document["verdict"] == made.compared[0].verdict
    as_csv = small.run("refresh", path, "--rounds", "2", "--format", "csv").out
    rows = [(row["number"], row["after"]) for row in csv.DictReader(io.StringIO(as_csv))]
    assert rows == [(str(one.number), str(one.score)) for one in made.rounds]


def test_a_model_worse_than_its_base_fails_a_nightly_job(mined: Run, tmp_path: Path) -> None:
    worse = {**RISING, "steps": 40, "learning_rate": 0.1}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**mined.config, "run_dir": str(tmp_path / "run"), "train": worse}), encoding="utf-8")
    with learnable.training_here():
        shown = small.run("refresh", path, "--fail-on", "loss")
    assert shown.code == 1 and "RESULT: LOSS" in shown.out
    assert small.run("refresh", path, "--fail-on", "tie").code == 2


def test_refused(mined: Run, tmp_path: Path) -> None:
    plain = {name: value for name, value in mined.at(tmp_path / "run").config.items() if name != "train"}
    with pytest.raises(ConfigError, match="train"):
        refresh(load_config(plain), 2)
    with pytest.raises(ConfigError, match="reranker"):
        refresh(load_config({**plain, "train": {}}, ["train.kind=reranker", "output.format=labeled-list"]), 2)
    assert not (tmp_path / "run").exists()
    with run_lock(tmp_path / "run/rounds"), pytest.raises(LockedError, match="rounds"):
        refresh(load_config({**plain, "train": RISING}), 2)
    shutil.rmtree(tmp_path / "run")
