"""Stages of very many tasks: what making, resuming and committing them takes grows as their number, no faster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import small_source as small
import yaml

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.config.schema import Config
from negpipe.engine import fingerprint
from negpipe.store.store import LocalStore

STAGES = ("encode", "search", "triplets")
FEW = 25
WORDS = ("names", "read", "size", "put", "replace", "delete")


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """What is asked of the store within it, calls by name, of a listed folder its entries; characters of what is
    digested to keys."""
    asked: Counter[str] = Counter()

    def watched(word: str) -> Callable[..., Any]:
        method = getattr(LocalStore, word)

        def call(*arguments: Any, **named: Any) -> Any:
            answer = method(*arguments, **named)
            asked[word] += len(answer) if word == "names" else 1
            return answer

        return call

    def written(values: Any) -> str:
        text = write(values)
        asked["digested"] += len(text)
        return text

    write = fingerprint._json
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprint, "_json", written)
        for word in WORDS:
            patch.setattr(LocalStore, word, watched(word))
        yield asked


def asked_for(folder: Path, tasks: int) -> dict[str, Counter[str]]:
    """What each step of so many tasks a stage asks of the store."""
    small.build(folder, small.documents(3 * tasks), small.queries(tasks))
    small.write_qrels(folder / "data/qrels/train.tsv", small.judgments(tasks))
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    settings["data"]["part_rows"] = 1
    settings["index"] = {"kind": "stream"}
    config: Config = load_config(settings)
    whole = graph.Shard.parse("0/1")
    graph.mine(config, only="ingest")
    found = {}
    for stage in STAGES:
        if stage == "search":
            graph.mine(config, only="index")
        books = folder / f"run/.negpipe/{stage}"
        with counted() as found[f"{stage}: made"]:
            graph.work(config, stage, whole)
        assert len(list(books.glob("*.json"))) >= tasks
        next(books.glob("*.json")).unlink()
        with counted() as found[f"{stage}: resumed"]:
            graph.work(config, stage, whole)
        with counted() as found[f"{stage}: committed"]:
            graph.commit(config, stage)
    with counted() as found["nothing to do"]:
        graph.mine(config)
    return found


@pytest.mark.slow
def test_twice_the_tasks_take_twice_as_much(tmp_path: Path) -> None:
    few, many = asked_for(tmp_path / "few", FEW), asked_for(tmp_path / "many", 2 * FEW)
    for step, asked in many.items():
        for word, count in asked.items():
            assert count <= 2.3 * few[step][word] + 10, (step, word, few[step], asked)
