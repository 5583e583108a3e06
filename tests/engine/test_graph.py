"""Stages are a graph that the engine is given: two of one kind are two stages like any others."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_source as small
from real_runs import sealed

from negpipe import engine
from negpipe import graph as front
from negpipe.config.file import load_config
from negpipe.config.schema import Config
from negpipe.engine import pipeline, upkeep
from negpipe.engine.executors.crew import environment
from negpipe.engine.fingerprint import DigestCache
from negpipe.engine.manifest import Books
from negpipe.engine.stage import Context, Graph
from negpipe.errors import ConfigError
from negpipe.stages import STAGES
from negpipe.stages.rescore import rescore
from negpipe.stages.search import SLICES


def two_chains() -> Graph:
    """The five stages, and a second retriever's three before the last."""
    second = {
        "encode": replace(STAGES["encode"], name="encode-b", kind="encode"),
        "index": replace(
            STAGES["index"],
            name="index-b",
            kind="index",
            inputs=("ingest", "encode-b"),
            reads={"encode": "encode-b"},
        ),
        "search": replace(
            STAGES["search"],
            name="search-b",
            kind="search",
            inputs=("ingest", "encode-b", "index-b"),
            reads={"encode": "encode-b", "index": "index-b"},
        ),
    }
    first = {name: stage for name, stage in STAGES.items() if name != "triplets"}
    every = [*first.values(), *second.values(), STAGES["triplets"]]
    return {stage.name: stage for stage in every}


def config_in(folder: Path) -> Config:
    small.build(folder)
    return load_config(small.settings(folder), ["index.kind=flat"])


def names(config: Config, stage: str) -> set[str]:
    return {path.name for path in (config.run_dir / stage).iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["inline", "local"])
def test_two_stages_of_one_kind_make_parts_under_their_own_names(executor: str, tmp_path: Path) -> None:
    workers = [f"executor.kind={executor}", "executor.workers=2", "resources.cpus=2"]
    config, graph = load_config(config_in(tmp_path).model_dump(mode="json"), workers), two_chains()
    made = pipeline.mine(config, graph)
    assert made.ran == tuple(graph)
    for kind in ("encode", "index"):
        assert names(config, f"{kind}-b") == names(config, kind)
    contents = [
        [(config.run_dir / file.path).read_bytes() for part in books.parts() for file in part.files]
        for books in (Books(config.run_dir, name) for name in ("search", "search-b"))
    ]
    assert sorted(contents[0]) == sorted(contents[1])
    assert pipeline.mine(config, graph).ran == ()
    assert {state.stage: state.state for state in pipeline.status(config, graph)} == dict.fromkeys(graph, "current")


def test_a_change_of_one_chain_is_no_change_of_the_other(tmp_path: Path) -> None:
    config, graph = config_in(tmp_path), two_chains()
    pipeline.mine(config, graph)
    other = dict(graph)
    other["encode-b"] = replace(other["encode-b"], version=other["encode-b"].version + 1)
    assert pipeline.mine(config, other).ran == ("encode-b",)  # the same vectors: what reads them is current


def test_damage_is_found_and_made_good_by_the_stage_that_has_it(tmp_path: Path) -> None:
    config, graph = config_in(tmp_path), two_chains()
    pipeline.mine(config, graph)
    path = next((config.run_dir / "encode-b").iterdir())
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (problem,) = upkeep.verify(config, upkeep.inventory(config, graph))
    assert f"encode-b/{path.name}" in problem
    ran = pipeline.mine(config, graph, repair=True).ran
    assert "encode-b" in ran and "encode" not in ran and "search" not in ran
    assert path.read_bytes() == content
    assert upkeep.superseded(config, graph) == []


def test_the_order_of_files_in_a_part_means_nothing(tmp_path: Path) -> None:
    """Records and manifests with their files in reverse: nothing runs again, and a reader finds each by its role."""
    small.build(tmp_path)
    config = load_config(small.settings(tmp_path), ["index.kind=SQ8", "mining.relative_margin=0.9"])
    before, several = front.mine(config), 0
    rows = [path.read_bytes() for path in sorted(before.triplets.iterdir())]
    for path in config.run_dir.glob(".negpipe/*/*.json"):
        book = json.loads(path.read_text(encoding="utf-8"))
        for part in book.get("parts", [book]):
            several += len(part["files"]) > 1
            part["files"].reverse()
        path.write_text(json.dumps(sealed(book)), encoding="utf-8")
    assert several > 4
    after = front.mine(config)
    assert after.ran == () and after.stats == before.stats
    assert front.mine(load_config(config.model_dump(mode="json"), ["output.grades=true"])).ran == ("triplets",)
    assert front.mine(config).ran == ("triplets",)  # from the parts that search and index made
    assert [path.read_bytes() for path in sorted(after.triplets.iterdir())] == rows


def test_the_engine_knows_no_stage_by_name() -> None:
    known = {
        *front.stages(Config.model_validate(small.settings(Path("any")) | {"train": {"base": "model"}})),
        SLICES.name,
    }
    assert len(known) > 7
    for path in Path(engine.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Constant) and node.value in known), f"{path}:{node.lineno}"


def test_a_worker_sees_what_its_tasks_were_granted(tmp_path: Path) -> None:
    """Threads of its share, and its own GPU alone."""
    config = load_config(
        config_in(tmp_path).model_dump(mode="json"), ["executor.kind=local", "executor.workers=2", "resources.cpus=6"]
    )
    context = Context(config, config.run_dir, DigestCache(tmp_path / "digests.json"))
    for stage in STAGES.values():
        budget = stage.within(context).budget
        shown = environment(budget)
        assert shown["OMP_NUM_THREADS"] == str(budget.threads) == ("6" if stage.name == "ingest" else "3")
        assert shown["CUDA_VISIBLE_DEVICES"] == ""
    assert environment(context.on("cuda:1").budget)["CUDA_VISIBLE_DEVICES"] == "1"


def test_random_negatives_are_refused_beside_another_score(tmp_path: Path) -> None:
    config = load_config(small.settings(tmp_path), ["mining.score=teacher", "mining.num_random=1"])
    with pytest.raises(ConfigError, match="random negatives have no teacher score"):
        front.mine(config, rescore=rescore(lambda pairs: np.zeros(len(pairs), np.float32), "zeros"))
