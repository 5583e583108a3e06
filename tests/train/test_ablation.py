"""`negpipe ablate`: every arm a run of its own, what they share made once, and a table that their files bear out."""

from __future__ import annotations

import csv
import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import learnable
import markupsafe
import numpy as np
import pyarrow.parquet as pq
import pytest
import small_source as small
from real_runs import Run, kill, wait
from scipy import stats
from statsmodels.stats.multitest import multipletests

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.errors import ConfigError, InputError
from negpipe.train import ablation, ablation_page
from negpipe.train.arms import arms
from negpipe.train.children import child
from negpipe.train.comparison import METRICS
from negpipe.train.effects import Effect, effects, verdict

pytestmark = pytest.mark.slow

SEEDS = [1, 2]
_OWN = {"rank 10": {"mining.range_min": 10, "mining.range_max": 60}}
SETTINGS: dict[str, Any] = {"sets": ["in-batch", "random"], "arms": _OWN, "seeds": SEEDS}
ARMS = ["in-batch", "random", "rank 10"]


def ablated(run: Run, **changed: Any) -> dict[str, Any]:
    return {**run.config, "ablate": {**SETTINGS, **changed}}


@pytest.fixture(scope="module")
def made(mined: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, ablation.Ablation]:
    run = mined.at(tmp_path_factory.mktemp("ablated") / "run")
    with learnable.training_here():
        return run, ablation.ablate(load_config(ablated(run)))


def cell(run: Run, arm: str, seed: int) -> Run:
    return run.at(run.folder / "ablation" / f"{arm.replace(' ', '-')}-{seed}")


def scores(run: Run) -> Any:
    (part,) = (part for part in run.manifest("train")["parts"] if part["kind"] == "evaluation")
    (file,) = (file for file in part["files"] if file["role"] == "scores")
    return pq.read_table(run.folder.parent / "store" / file["path"])


def test_means_and_spreads_are_those_of_the_cells(made: tuple[Run, ablation.Ablation]) -> None:
    run, found = made
    assert sorted(one.arm for one in found.effects) == sorted(ARMS)
    assert all(a.means[METRICS[0]] >= b.means[METRICS[0]] for a, b in pairwise(found.effects))
    for one in found.effects:
        tables = [scores(cell(run, one.arm, seed)) for seed in SEEDS]
        for name in METRICS:
            means = [np.mean(table[f"{name}_after"].to_numpy()) for table in tables]
            assert one.means[name] == pytest.approx(np.mean(means))
            assert one.spreads[name] == pytest.approx(np.std(means, ddof=1))
            assert found.bases[one.arm][name] == pytest.approx(np.mean(tables[0][f"{name}_before"].to_numpy()))
        rows = [cell(run, one.arm, seed).manifest("triplets")["stats"]["rows"] for seed in SEEDS]
        assert found.facts[one.arm]["rows"] == np.mean(rows)
    table = pq.read_table(found.folder / ablation.TABLE)
    assert table["arm"].to_pylist() == [one.arm for one in found.effects]
    assert table[METRICS[0]].to_pylist() == [one.means[METRICS[0]] for one in found.effects]


def test_the_page_and_its_table_say_what_was_found(made: tuple[Run, ablation.Ablation]) -> None:
    _, found = made
    text = (found.folder / ablation_page.MARKDOWN).read_text(encoding="utf-8")
    page = (found.folder / ablation_page.PAGE).read_text(encoding="utf-8")
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    assert [line[0] for line in lines] == ["arm", "base", *(one.arm for one in found.effects)]
    for line, one in zip(lines[2:], found.effects, strict=True):
        assert line[1] == f"{one.means[METRICS[0]]:.4f} ±{one.spreads[METRICS[0]]:.4f}"
        assert all(f">{cell}<" in page for cell in line[1:4])
    assert found.verdict in text and markupsafe.escape(found.verdict) in page
    assert page.count("<svg") == page.count("</svg>") == len([*ablation_page._figures(found)])
    assert page.count('<figure class="wide"><h3>Effect</h3>') == page.count('class="wide"') == 1
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script" not in page


def test_texts_are_encoded_and_the_base_is_judged_once(made: tuple[Run, ablation.Ablation]) -> None:
    run, _ = made
    for stage, kinds in {"ingest": None, "encode": None, "held_out": None, "train": {"base"}}.items():
        keys = {
            tuple(
                part["key"]
                for part in cell(run, arm, seed).manifest(stage)["parts"]
                if kinds is None or part["kind"] in kinds
            )
            for arm in ARMS
            for seed in SEEDS
        }
        assert len(keys) == 1, stage


def test_seeds_and_arms_differ(made: tuple[Run, ablation.Ablation]) -> None:
    run, _ = made
    models = {
        next(part["key"] for part in cell(run, arm, seed).manifest("train")["parts"] if part["kind"] == "model")
        for arm in ARMS
        for seed in SEEDS
    }
    assert len(models) == len(ARMS) * len(SEEDS)


def test_in_batch_learns_from_no_mined_negative(made: tuple[Run, ablation.Ablation], tmp_path: Path) -> None:
    """The same model comes of rows whose negatives are others."""
    run, _ = made
    own = cell(run, "in-batch", 1)
    losses = []
    for first in (0, 20):
        config = {
            **run.config,
            "run_dir": str(tmp_path / str(first)),
            "seed": 1,
            "mining": {"num_negatives": 1, "relative_margin": None, "range_min": first},
            "train": {**run.config["train"], "seed": 1, "negatives": False},
        }
        with learnable.training_here():
            losses.append(graph.train(load_config(config)).stats["train"]["loss"])
    assert losses[0] == losses[1] == own.manifest("train")["stats"]["loss"]


def test_again_makes_nothing_and_says_the_same(made: tuple[Run, ablation.Ablation], tmp_path: Path) -> None:
    run, found = made
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("manifest.json")}
    with learnable.training_here():
        again = ablation.ablate(load_config(ablated(run)))
        path = tmp_path / "config.json"
        path.write_text(json.dumps(ablated(run)), encoding="utf-8")
        as_json, as_csv = (small.run("ablate", path, "--format", form).out for form in ("json", "csv"))
    assert again.document() == found.document()
    assert json.loads(as_json) == json.loads(json.dumps(found.document()))
    rows = [*csv.DictReader(io.StringIO(as_csv))]
    assert [row["arm"] for row in rows] == [one.arm for one in found.effects]
    for row, one in zip(rows, found.effects, strict=True):
        assert {name: float(row[name]) for name in METRICS} == {**one.means}
        assert {name: float(row[f"{name}_base"]) for name in METRICS} == found.bases[one.arm]
    # One more arm leaves the others alone.
    with learnable.training_here():
        more = ablation.ablate(load_config(ablated(run, arms={**SETTINGS["arms"], "more": {"train.steps": 1}})))
    assert len(more.effects) == len(ARMS) + 1
    assert before and all(path.stat().st_mtime_ns == when for path, when in before.items())


def test_an_arm_that_cannot_be_trained_leaves_the_others(mined: Run, tmp_path: Path) -> None:
    settings = {"sets": ["default"], "arms": {"large": {"train.batch_size": 5000}}, "seeds": [1]}
    run = Run(ablated(mined.at(tmp_path / "run"), **settings))
    code, out, log = run.command("ablate")
    assert code == 1
    assert "too few for a batch of 5,000" in out and "large, seed 1" in log
    assert out.rstrip().splitlines()[-1].startswith("RESULT: ")


def test_what_is_wrong_with_an_arm_is_known_first(mined: Run, tmp_path: Path) -> None:
    run = mined.at(tmp_path / "run")
    for own, sets, words in (
        ({"a": {"seed": 7}}, ["default"], "'a' sets seed, which is set by ablate.seeds"),
        ({"a": {"train": {"split": {"test": 0.5}}}}, ["default"], "train.split.test, which would judge"),
        ({"a": {"run_dir": "elsewhere"}}, ["default"], "which is set separately for every cell"),
        ({"a": {"mining.no_such": 1}}, ["default"], "the arm 'a'"),
        ({"default": {}}, ["default"], "rename it"),
        ({"a b": {}, "a-b": {}}, ["default"], "share the folder"),
    ):
        with pytest.raises(ConfigError, match=words):
            ablation.ablate(load_config(ablated(run, arms=own, sets=sets)))
    assert not run.folder.exists()
    with pytest.raises(InputError, match="no cell"), learnable.training_here():
        ablation.ablate(load_config(ablated(run, arms={"a": {"train.batch_size": 5000}}, sets=[])))


def test_a_section_in_an_arm_changes_what_it_names_and_nothing_else(mined: Run, tmp_path: Path) -> None:
    """As --set would, not in the section's place. The sets replace the rules, and keep what is known of the data."""
    run = mined.at(tmp_path / "run")
    run.config["mining"] = {**run.config["mining"], "exclude_file": "verdicts.jsonl", "near_duplicate": 0.9}
    config = load_config(ablated(run, sets=["default", "peers"], arms={"small": {"train": {"batch_size": 4}}}))
    found = arms(config, lambda: None)
    cells = {name: child(config, tmp_path / name, changes) for name, changes in found.items()}
    changed = cells["small"]
    assert changed.train and config.train
    assert changed.train == config.train.model_copy(update={"batch_size": 4}) and changed.mining == config.mining
    default, peer = cells["default"].mining, cells["sentence-transformers"].mining
    assert (default.relative_margin, default.range_max) == (0.05, 192) != (config.mining.relative_margin, 60)
    for mining in (default, peer):
        assert (mining.exclude_file, mining.near_duplicate, mining.num_negatives) == ("verdicts.jsonl", 0.9, 2)
    assert peer.relative_margin is None and peer.exclude == ("positive_id", "positive_text")


def test_arms_of_different_bases_are_compared_with_their_own(mined: Run, tmp_path: Path) -> None:
    run = mined.at(tmp_path / "run")
    other = {"shorter": {"encoder.passage_max_length": 8}}
    with learnable.training_here():
        found = ablation.ablate(load_config(ablated(run, sets=["default"], arms=other, seeds=[1])))
    assert found.bases["default"] != found.bases["shorter"]
    for one in found.effects:
        table = scores(cell(run, one.arm, 1))
        means = [np.mean(table[f"{METRICS[0]}_{side}"].to_numpy()) for side in ("before", "after")]
        assert one.difference == pytest.approx(means[1] - means[0])
    text = (found.folder / ablation_page.MARKDOWN).read_text(encoding="utf-8")
    assert "| base of default |" in text and "| base of shorter |" in text
    # Every command can be asked of a cell.
    assert small.run("verify", found.folder / "default-1.yaml").code == 0


def test_killed(mined: Run, tmp_path: Path) -> None:
    whole, run = (Run(ablated(mined.at(tmp_path / name), sets=["random"], seeds=[1])) for name in ("whole", "run"))
    process = run.start("ablate")
    try:
        done = run.folder / "ablation/random-1/.negpipe/train"
        assert wait(process, done.is_dir), run.log.read_text(encoding="utf-8")
    finally:
        kill(process)
    with learnable.training_here():
        documents = [ablation.ablate(load_config(each.config)).document() for each in (run, whole)]
    for document in documents:
        for arm in document["arms"]:
            del arm["seconds"]
    assert documents[0] == documents[1]


# --- what can be said ---------------------------------------------------------------------------------


def drawn(*shifts: float, anchors: int = 200, seeds: int = 2) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values of arms by name and metric, and the base of each."""
    draw = np.random.default_rng(0)
    base = draw.random(anchors)
    arms = {
        f"arm {at}": dict.fromkeys(METRICS, base + shift + draw.normal(0, 0.1, (seeds, anchors)))
        for at, shift in enumerate(shifts)
    }
    return arms, dict.fromkeys(arms, base)


def test_tests_are_paired_and_corrected() -> None:
    arms, base = drawn(0.005, 0.02, 0.04)
    found = effects(arms, base, seed=0)
    assert [one.arm for one in found] == ["arm 2", "arm 1", "arm 0"]
    means = {name: values[METRICS[0]].mean(axis=0) for name, values in arms.items()}
    # With this many anchors, the permutation test and Student's agree but for chance.
    paired = [stats.ttest_rel(means[one.arm], base[one.arm]).pvalue for one in found]
    assert [one.p_base for one in found] == pytest.approx(multipletests(paired, method="holm")[1], abs=0.03)
    paired = [stats.ttest_rel(means["arm 2"], means[one.arm]).pvalue for one in found[1:]]
    assert [one.p_leader for one in found[1:]] == pytest.approx(multipletests(paired, method="holm")[1], abs=0.03)
    assert found[0].p_leader is None


def test_a_winner_is_named_only_where_there_is_one() -> None:
    assert verdict(effects(*drawn(0.01, 0.1), seed=0)).startswith("'arm 1' wins")
    assert verdict(effects(*drawn(0.1, 0.1), seed=0)).startswith("No difference found between")
    assert verdict(effects(*drawn(-0.1, -0.2), seed=0)).startswith("No arm is better")
    assert verdict(effects(*drawn(0.008, -0.2), seed=0)).startswith("No difference from the base found")
    assert verdict(effects(*drawn(0.1), seed=0)).startswith("'arm 0' wins")


def test_the_smallest_difference_that_could_be_seen_is_seen_in_four_of_five_cases() -> None:
    draw = np.random.default_rng(1)
    base = draw.random(100)

    def compared(shift: float) -> Effect:
        pair = {"better": base + draw.normal(shift, 0.1, (1, 100)), "worse": base + draw.normal(0, 0.1, (1, 100))}
        arms = {name: dict.fromkeys(METRICS, values) for name, values in pair.items()}
        return effects(arms, dict.fromkeys(arms, base), seed=0)[1]

    smallest = np.mean([compared(0.02).seen for _ in range(4)])
    found = np.mean([(compared(float(smallest)).p_leader or 0.0) < 0.05 for _ in range(40)])
    assert 0.65 < found < 0.95
