"""No rows, or few, are not "done": the rule that dropped most is named, and what gives more."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import small_source as small

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.errors import InputError

pytestmark = pytest.mark.cases

RULES = {
    "relative_margin": (
        ["mining.relative_margin=1", "mining.num_negatives=40", "mining.range_max=40"],
        "a smaller mining.relative_margin",
    ),
    "absolute_margin": (["mining.absolute_margin=9"], "a smaller mining.absolute_margin"),
    "max_score": (["mining.max_score=-9"], "a higher mining.max_score"),
    "min_score": (["mining.min_score=9"], "a lower mining.min_score"),
    "before_window": (["mining.range_min=39", "mining.range_max=60"], "a smaller mining.range_min"),
}


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_the_rule_that_dropped_most_is_named_with_what_helps(
    rule: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small.build(tmp_path)
    overrides, helps = RULES[rule]
    graph.mine(load_config(small.settings(tmp_path), ["mining.max_depth=0", "output.min_rows=0", *overrides]))
    (warning,) = [record.message for record in caplog.records if "candidates dropped" in record.message]
    assert f"dropped: {rule.replace('_', ' ')}" in warning and helps in warning


def test_a_margin_wider_than_scores_differ_is_told_with_the_scores(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small.build(tmp_path)
    overrides = [*RULES["relative_margin"][0], "search.depth=40", "mining.max_depth=0", "output.min_rows=0"]
    graph.mine(load_config(small.settings(tmp_path), overrides))
    asked, corpus = (np.load(tmp_path / f"{side}.npy").astype(np.float64) for side in ("anchors", "corpus"))
    asked, corpus = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (asked, corpus))
    scores, positive = asked @ corpus.T, np.mean([asked[n] @ corpus[3 * n] for n in range(len(asked))])
    (warning,) = [record.message for record in caplog.records if "candidates dropped" in record.message]
    said = re.search(r"candidates score from (.+) to (.+), positives (.+) on average, .* up to (.+?)\. Set", warning)
    assert said and [float(number) for number in said.groups()] == pytest.approx(
        [scores.min(), scores.max(), positive, positive - abs(positive)], abs=0.002
    )


def test_positives_that_were_asked_for_are_not_cut_off(tmp_path: Path) -> None:
    small.build(tmp_path)
    overrides = [
        "output.format=n-tuple",
        "output.include_positives=true",
        "mining.num_negatives=1",
        "mining.min_score=9",
    ]
    result = graph.mine(load_config(small.settings(tmp_path), overrides))
    rows = pq.read_table(result.triplets).to_pylist()
    assert rows and all(row["negative_1_id"] == row["positive_id"] for row in rows)


def test_ids_that_went_through_pandas_get_the_hint(tmp_path: Path) -> None:
    small.build(tmp_path)
    small.write_qrels(tmp_path / "data/qrels/train.tsv", [("1.0", "d1", 1)])
    with pytest.raises(InputError, match=r"unknown query id '1\.0'.*dtype=str"):
        graph.mine(load_config(small.settings(tmp_path)), only="ingest")


def test_enough_rows_are_not_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small.build(tmp_path)
    result = graph.mine(load_config(small.settings(tmp_path), ["mining.relative_margin=null"]))
    assert result.stats["triplets"]["negatives"] == result.stats["triplets"]["wanted"]
    assert "candidates dropped" not in caplog.text


def test_fewer_rows_than_asked_for_are_a_failure_that_repeats_nothing(tmp_path: Path) -> None:
    small.build(tmp_path)
    config = small.write_config(tmp_path)
    most = graph.mine(load_config(str(config))).stats["triplets"]["rows"]
    for least, code in ((most, 0), (most + 1, 1), (0, 0)):
        done = small.run("mine", config, "--set", f"output.min_rows={least}")
        assert done.code == code
        assert "triplets: up to date" in done.err  # it is no part of what rows are
    assert (
        f"{most} rows, but output.min_rows is {most + 1}"
        in small.run("triplets", config, "--set", f"output.min_rows={most + 1}").err
    )


def test_rows_that_are_not_enough_replace_nothing(tmp_path: Path) -> None:
    """Neither the rows nor the config of the run; what was made is there once fewer rows are enough."""
    small.build(tmp_path)
    config, run = small.write_config(tmp_path), tmp_path / "run"
    graph.mine(load_config(str(config)))
    before = {path.name: path.read_bytes() for path in sorted((run / "triplets").iterdir())}
    kept = (run / ".negpipe/config.yaml").read_text(encoding="utf-8")
    none = ("--set", "mining.max_score=-9")
    done = small.run("mine", config, *none)
    assert done.code == 1 and "output.min_rows" in done.err and "Next" not in done.out
    assert {path.name: path.read_bytes() for path in sorted((run / "triplets").iterdir())} == before
    assert (run / ".negpipe/config.yaml").read_text(encoding="utf-8") == kept
    assert small.run("mine", run).code == 0
    assert small.run("commit", "triplets", config, *none, "--shards", "1").code == 1
    assert small.run("mine", config, *none, "--set", "output.min_rows=0").code == 0
    assert pq.read_table(run / "triplets").num_rows == 0


def test_of_no_rows_the_rule_that_let_nothing_pass_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not the one before it, which dropped more."""
    corpus = [{**row, "kind": "a" if at % 3 else "b"} for at, row in enumerate(small.documents())]
    small.build(tmp_path, corpus)
    settings = small.settings(tmp_path)
    settings["data"]["extra"] = {"corpus": ["kind"]}
    rules = ["mining.only_same=kind", "mining.where=candidate.kind = 'c'", "mining.max_depth=0", "mining.range_max=40"]
    rules += ["output.min_rows=0"]
    graph.mine(load_config(settings, rules))
    (warning,) = [record.message for record in caplog.records if "candidates dropped" in record.message]
    assert "Relax mining.where" in warning
