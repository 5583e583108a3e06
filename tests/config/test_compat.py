"""What a preset stands for, what overrides it, and what waits for the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small_source as small
import yaml

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.config.presets import PRESETS
from negpipe.config.schema import Config, Mining
from negpipe.errors import ConfigError

LEAST: dict[str, Any] = {"run_dir": "run", "data": {"path": "set"}, "encoder": {"model": "some/model"}}


def load(**mining: Any) -> Config:
    return load_config({**LEAST, "mining": mining})


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_ordinary_settings(name: str) -> None:
    """The same settings written out give the same config, whatever else is set beside them."""
    named, written = (load(**settings, min_score=-0.5) for settings in ({"compat": name}, PRESETS[name]))
    assert named.mining.model_copy(update={"compat": None}) == written.mining
    assert not named.mining.max_depth


@pytest.mark.parametrize("name", PRESETS)
def test_what_the_config_says_wins(name: str) -> None:
    own = {"num_negatives": 7, "exclude": ["anchor_text"], "strict": True, "relative_margin": 0.3, "max_depth": 512}
    settings = load(compat=name, **own).mining
    assert {key: getattr(settings, key) for key in own} == {**own, "exclude": ("anchor_text",)}
    for key, value in PRESETS[name].items():
        assert key in own or getattr(settings, key) == value


def test_overrides_of_the_command_line_win_and_can_name_the_preset() -> None:
    config = load_config(LEAST, ["mining.compat=flagembedding", "mining.range_min=2"])
    assert (config.mining.range_min, config.mining.range_max, config.mining.num_negatives) == (2, 210, 15)
    assert load_config(LEAST).mining == Mining()


def test_no_such_preset() -> None:
    with pytest.raises(ConfigError, match=r"mining\.compat: .*'nemo' or 'nv-retriever' \(got 'tevatron'\)"):
        load(compat="tevatron")


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_survives_the_way_to_a_worker(name: str) -> None:
    config = load(compat=name).resolved(4)
    assert load_config(json.loads(config.model_dump_json())) == config


@pytest.mark.parametrize(
    ("mining", "range_max", "depth"),
    [
        # range_min + M * num_negatives + max_positives, M = 10 if a margin or max_score is set; 4 more are searched.
        ({}, 7, 11),
        ({"range_min": 5, "num_negatives": 2}, 11, 15),
        ({"relative_margin": 0.05}, 34, 38),
        ({"absolute_margin": 0.0}, 34, 38),
        ({"max_score": 0.9}, 34, 38),
        ({"min_score": 0.1}, 7, 11),
        ({"range_max": 500}, 500, 504),
        ({"depth": 20}, 7, 20),
    ],
)
def test_numbers_that_wait_for_the_data(mining: dict[str, Any], range_max: int, depth: int) -> None:
    config = load(compat="sentence-transformers", **mining).resolved(4)
    assert (config.mining.range_max, config.mining.depth) == (range_max, depth)
    assert config.depth % 64 == 0
    assert config.depth >= max(range_max + 64, depth)
    assert config.resolved(9) == config


def test_search_depth_must_reach_them() -> None:
    config = load_config({**LEAST, "mining": {"compat": "sentence-transformers"}, "search": {"depth": 9}})
    with pytest.raises(ConfigError, match=r"search\.depth \(9\) is below mining\.depth \(11\)"):
        config.resolved(4)
    with pytest.raises(ConfigError, match=r"search\.depth \(9\) is below mining\.depth \(10\)"):
        load_config({**LEAST, "mining": {"depth": 10, "range_max": 5}, "search": {"depth": 9}})


# --- in a run -------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """q0 has three positives, one of them judged twice, and q11 the same text with one: five rows in all."""
    asked = small.queries()
    asked[11]["text"] = asked[0]["text"]
    config = small.build(tmp_path, asked=asked)
    rows = [*small.judgments(), ("q0", "d1", 1), ("q0", "d2", 2), ("q0", "d2", 1), ("q0", "d4", 0)]
    small.write_qrels(tmp_path / "data/qrels/train.tsv", rows)
    small.write_qrels(tmp_path / "data/qrels/test.tsv", [("q0", f"d{i}", 1) for i in range(20, 30)])
    return config


def shown(config: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    outcome = small.run("config", "show", config, *arguments)
    assert outcome.code == 0
    return yaml.safe_load(outcome.out), outcome.err


def test_max_positives_are_counted_by_text_with_repeated_rows(source: Path) -> None:
    stats = graph.mine(load_config(source), only="ingest").stats["ingest"]
    assert stats["max_positives"] == 5


def test_config_show_resolved(source: Path) -> None:
    compat = ("--set", "mining.compat=sentence-transformers", "--set", "mining.range_max=null")
    plain, _ = shown(source, *compat)
    assert plain["mining"]["range_max"] is None
    assert plain["mining"]["exclude"] == ["positive_id", "positive_text"]
    before, note = shown(source, *compat, "--resolved")
    assert before == plain
    assert "run ingest first" in note
    graph.mine(load_config(source), only="ingest")
    after, note = shown(source, *compat, "--resolved")
    assert not note
    assert (after["mining"]["range_max"], after["mining"]["depth"], after["search"]["depth"]) == (8, 13, 128)
    # Nothing depends on the data here: no run is needed.
    settings = ("mining.compat=flagembedding", "mining.range_max=210", "run_dir=elsewhere")
    fixed, note = shown(source, "--resolved", *(word for setting in settings for word in ("--set", setting)))
    assert not note
    assert (fixed["mining"]["num_negatives"], fixed["search"]["depth"]) == (15, 320)


def test_resolved_numbers_are_what_stages_are_known_by(source: Path) -> None:
    """A preset and the same settings written out are one setting; the numbers, not the formula, decide what runs."""

    def mine(*overrides: str) -> tuple[str, ...]:
        return graph.mine(load_config(source, list(overrides))).ran

    named = ("mining.compat=sentence-transformers", "mining.range_max=null", "mining.relative_margin=null")
    assert mine(*named) == ("ingest", "encode", "index", "search", "triplets")
    assert mine(*named) == ()
    settings = {
        **PRESETS["sentence-transformers"],
        "range_max": 8,
        "depth": 13,
        "exclude": ["positive_id", "positive_text"],
    }
    assert mine(*(f"mining.{name}={json.dumps(value)}" for name, value in settings.items())) == ()
    assert mine(*named, "mining.num_negatives=4") == ("triplets",)
    assert mine(*named, "mining.range_max=200") == ("search", "triplets")
