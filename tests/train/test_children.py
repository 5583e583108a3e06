"""Configs of the runs that a larger job is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from negpipe.config.file import load_config
from negpipe.config.schema import Config
from negpipe.errors import ConfigError
from negpipe.train.children import child

PLAIN: dict[str, Any] = {"run_dir": "run", "data": {"path": "data"}, "encoder": {"model": "m", "revision": "1"}}


def config_of(changes: dict[str, Any]) -> Config:
    return load_config({**PLAIN, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"store": "parts"},
        {"train": {"steps": 3}},
        {"mining": {"compat": "nemo", "relative_margin": 0.3}},
        {"mining": {"compat": "sentence-transformers"}},
        {"output": {"format": "n-tuple", "include_positives": True}},
        {
            "resources": {"memory_budget": "3GiB"},
            "executor": {"task_timeout": "30min"},
            "data": {"format": "columns", "corpus": "c.jsonl", "queries": {"path": ["q"], "split": "x"}, "qrels": "r"},
        },
    ],
)
def test_nothing_changes_but_where_it_runs(changes: dict[str, Any]) -> None:
    config = config_of(changes)
    expected = {"run_dir": Path("runs/1"), "store": config.store or Path("runs/store")}
    assert child(config, Path("runs/1"), {}) == config.model_copy(update=expected)


def test_keys_and_whole_sections_are_changed() -> None:
    config = config_of({"train": {"base": "b"}})
    before = config.model_dump()
    changed = child(config, Path("runs/1"), {"encoder": {"model": "n"}, "train.base": None, "mining.range_min": 7})
    assert (changed.encoder.model, changed.encoder.revision, changed.mining.range_min) == ("n", None, 7)
    assert changed.train and changed.train.base is None
    assert config.model_dump() == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"encoder.batch": 3}, "batch_size"),
        ({"mining.range_max": 2}, "smaller than mining.num_negatives"),
        ({"train.eval_split": "train"}, "train.eval_split"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        child(config_of({}), Path("runs/1"), changes)
