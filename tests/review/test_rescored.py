"""Candidates that a Python program scored are what every command selects, explains and measures by."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import small_source as small

import negpipe
from negpipe import graph
from negpipe.config.file import load_config
from negpipe.stages.rescore import rescore

BY_TEACHER = ["mining.score=teacher", "mining.num_negatives=2", "mining.relative_margin=null", "index.kind=flat"]


def teacher(pairs: Sequence[tuple[str, str]]) -> npt.NDArray[np.float32]:
    """An order of its own: by the numbers in both texts."""
    numbers = [[int(text.rsplit(" ", 1)[1]) for text in pair] for pair in pairs]
    return np.array([((7 * anchor + 3 * document) % 41) / 41 for anchor, document in numbers], np.float32)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((run_dir / "triplets").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def mined(folder: Path, *overrides: str) -> Path:
    """The config of a run whose candidates the teacher scored."""
    small.build(folder)
    settings = small.settings(folder)
    settings["mining"] = settings.get("mining", {}) | {"range_max": 10}
    path = folder / "config.yaml"
    path.write_text(json.dumps(load_config(settings, BY_TEACHER).model_dump(mode="json", exclude_unset=True)))
    graph.mine(load_config(path, [*overrides]), rescore=rescore(teacher, "of numbers"))
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mined(tmp_path_factory.mktemp("rescored"))


def test_rows_are_those_of_the_teacher(config: Path) -> None:
    found = rows(config.parent / "run")
    assert len(found) == 2 * small.QUERIES
    for row in found:
        assert row["negative_score"] == pytest.approx(teacher([(row["anchor"], row["negative"])])[0])


@pytest.mark.slow
def test_every_command_reads_its_scores(config: Path) -> None:
    alone = [[name] for name in ("status", "verify", "quality", "report", "audit")]
    calibrate = ["calibrate", "--near-anchors", "0.1"]
    for words in [*alone, calibrate, ["explain", "--anchor", "q3"], ["diff", str(config)]]:
        outcome = small.run(*words[:1], config, *words[1:])
        assert outcome.code == 0, (words, outcome.err)
        assert "stale" not in outcome.out, (words, outcome.out, outcome.err)
    made = rows(config.parent / "run")
    of_teacher = {side: teacher([(row["anchor"], row[side]) for row in made]) for side in ("positive", "negative")}
    above = int(np.count_nonzero(of_teacher["negative"] > of_teacher["positive"]))
    assert 0 < above < len(made)

    def said(*words: object) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(small.run(words[0], config, *words[1:], "--format", "json").out)
        return document

    quality, (own, *_) = said("quality"), said(*calibrate)["calibration"]["estimates"]
    assert said("audit")["checks"]["above_positive"]["count"] == above
    assert quality["outscored"] == pytest.approx(above / len(made))
    for side, scores in of_teacher.items():
        assert quality["scores"][side]["mean"] == pytest.approx(scores.mean(), abs=1e-6)
    # Without hidden positives among them, calibrate takes the negatives that were mined.
    assert own["score"] == pytest.approx(of_teacher["negative"].mean(), abs=0.02)
    page = (config.parent / "run/report.html").read_text(encoding="utf-8")
    assert f"{above / len(made):.1%}" in page
    chosen = [row for row in rows(config.parent / "run") if row["anchor"] == "query 3"]
    explained = small.run("explain", config, "--anchor", "q3", "--format", "json")
    for row in chosen:
        assert f"{row['negative_score']:.4f}"[:5] in explained.out


@pytest.mark.slow
def test_another_margin_is_selected_from_the_same_scores(config: Path, tmp_path: Path) -> None:
    shutil.copytree(config.parent, tmp_path / "copy")
    text = (tmp_path / "copy/config.yaml").read_text().replace(str(config.parent), str(tmp_path / "copy"))
    (tmp_path / "copy/config.yaml").write_text(text)
    margin = "mining.relative_margin=0.3"
    selected = negpipe.Run(tmp_path / "copy/run").select(relative_margin=0.3).rows.to_pylist()
    outcome = small.run("mine", tmp_path / "copy/config.yaml", "--set", margin)
    assert outcome.code == 0, outcome.err
    fresh = mined(tmp_path / "fresh", margin)
    assert rows(tmp_path / "copy/run") == rows(fresh.parent / "run") == selected != rows(config.parent / "run")


def test_a_command_cannot_score_what_the_program_has_not(config: Path, tmp_path: Path) -> None:
    shutil.copytree(config.parent, tmp_path / "copy")
    text = (tmp_path / "copy/config.yaml").read_text().replace(str(config.parent), str(tmp_path / "copy"))
    (tmp_path / "copy/config.yaml").write_text(text)
    for path in (tmp_path / "copy/run/rescore").iterdir():
        path.unlink()
    outcome = small.run("mine", tmp_path / "copy/config.yaml")
    assert outcome.code != 0
    assert "come from a function in Python (of numbers)" in outcome.err and "run the program" in outcome.err


def test_candidates_of_an_approximate_index_say_so_when_rescored(tmp_path: Path) -> None:
    config = mined(tmp_path, "index.kind=SQ8")
    for part in (config.parent / "run/rescore").glob("*.parquet"):
        assert pq.read_schema(part).metadata[b"negpipe.ann.approximate"] == b"SQ8"
