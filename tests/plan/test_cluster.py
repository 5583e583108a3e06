"""What a run would take on a described cluster: by hand, by what a real run wrote, and what more nodes change."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_source as small
import yaml

from negpipe import graph
from negpipe.config.cluster import Cluster, Rates
from negpipe.config.file import load_cluster, load_config
from negpipe.config.schema import Config
from negpipe.engine.shards import shard_of
from negpipe.engine.stage import Workload
from negpipe.errors import ConfigError
from negpipe.plan.cluster import Forecast, forecast, fullest_shard

ROOT = Path(__file__).parents[2]
RATES = {
    "ingest_rows": 100,
    "ingest_bytes": 1e4,
    "checked_bytes": 1e3,
    "ids_rows": 500,
    "products": 1e4,
    "loaded": 1e6,
    "pairs": 1e4,
    "looked_at": 1000,
    "negatives": 100,
    "opened": 2000,
    "start": 1,
    "torch": 3,
    "task": 0.1,
}
NODE = {"cores": 2, "memory": "64GiB", "disk_bandwidth": "1MB/s", "texts_per_second": 10}
SHARED = {"network_bandwidth": "25Gbit/s", "storage_bandwidth": "20GB/s"}
JOB: dict[str, Any] = {"documents": 100_000_000, "anchors": 1_000_000, "dimension": 768, "text_bytes": 600}


def config(**sections: Any) -> Config:
    about = {
        "run_dir": "run",
        "data": {"path": "data"},
        "encoder": {"model": "some/model"},
        "index": {"kind": "stream"},
        "search": {"depth": 64},
        "mining": {"range_max": 20, "num_negatives": 4},
    }
    return Config.model_validate(about | sections)


def stages(settings: Config, cluster: Cluster, job: Workload, nodes: int) -> dict[str, Forecast]:
    return {one.stage: one for one in forecast(settings, cluster, job, nodes).stages}


def test_a_tiny_job_takes_what_it_takes_by_hand() -> None:
    node = Cluster.model_validate({**NODE, "rates": RATES})
    job = Workload(1000, 100, 10, 100.0, 1.0, 10.0)
    found = stages(config(data={"path": "data", "part_rows": 50}), node, job, 1)
    # start + (rows / 100 + bytes / 10,000)
    assert found["ingest"].seconds == pytest.approx(1 + 11 + 10)
    # two starts + texts / 10 + vectors of 20 bytes / 1,000 + 22 tasks
    assert found["encode"].seconds == pytest.approx(2 + 110 + 20 + 2.2)
    assert found["index"].seconds == pytest.approx(1 + 2 + 20 * 0.1)
    # products and pairs of 100 anchors by two threads; 10,000 numbers read by one, twice
    pairs = 100 * 64 * (1 + math.log(1000 / 64))
    assert found["search"].seconds == pytest.approx(2 + 3 + (1000 * 100 * 10 / 1e4 + pairs / 1e4) / 2 + 2 * 0.01 + 0.2)
    # 6,400 candidates, 400 negatives, and 1,000 documents opened, by one
    assert found["triplets"].seconds == pytest.approx(1 + 6.4 + 4 + 0.5 + 0.2)
    assert [one.tasks for one in found.values()] == [0, 22, 20, 2, 2]
    assert found["encode"].disk == 1100 * 20
    assert [one.bound for one in found.values()] == [
        "one process",
        "one thread per worker",
        "one thread per worker",
        "processors",
        "one thread per worker",
    ]


def test_more_nodes_are_never_slower_and_ingest_stays() -> None:
    node = Cluster.model_validate({**NODE, **SHARED, "cores": 32, "texts_per_second": 2000, "disk_bandwidth": "3GB/s"})
    job = Workload(**JOB, positives=1.0, speed=2000.0)
    before = stages(config(), node, job, 2)
    for nodes in (3, 4, 8, 16, 33, 64, 100, 256):
        now = stages(config(), node, job, nodes)
        assert now["ingest"].seconds == before["ingest"].seconds
        for name in ("encode", "index", "search", "triplets"):
            assert (now[name].seconds or 0) <= (before[name].seconds or 0) + 1e-9, (name, nodes)
        before = now
    slow = node.model_copy(update={"storage_bandwidth": 10**9})
    assert stages(config(), slow, job, 64)["search"].bound == "shared storage"  # every task reads 154 GB
    wide = node.model_copy(update={"storage_bandwidth": 10**13, "network_bandwidth": 10**12, "memory": 2**38})
    assert stages(config(), wide, job, 64)["search"].bound.startswith("62 tasks, ")
    # What a node's memory keeps is read once by it, not by each of its tasks.
    assert stages(config(), wide, job, 8)["search"].moved < stages(config(), node, job, 8)["search"].moved / 5


def test_slices_give_more_tasks_that_read_less() -> None:
    node = Cluster.model_validate({**NODE, **SHARED, "cores": 32, "memory": "128GiB"})
    job = Workload(**JOB, positives=1.0, speed=2000.0)
    in_slices = config(search={"depth": 64, "slice_documents": 10**7})
    whole, sliced = stages(config(), node, job, 64), stages(in_slices, node, job, 64)
    assert (whole["search"].tasks, sliced["slices"].tasks, sliced["search"].tasks) == (62, 620, 62)
    assert (sliced["slices"].seconds or 0) < 0.6 * (whole["search"].seconds or 0)
    # A node's memory has room for a slice, and its tasks are in their order.
    assert stages(in_slices, node, job, 8)["slices"].moved < stages(config(), node, job, 8)["search"].moved / 5
    assert sliced["slices"].disk == 10**6 * 64 * 8 * 10
    assert sliced["triplets"] == whole["triplets"]


@pytest.mark.parametrize(("tasks", "nodes"), [(62, 8), (62, 64), (6166, 64), (500, 7)])
def test_the_fullest_shard_is_what_keys_make_of_it(tasks: int, nodes: int) -> None:
    draw = np.random.default_rng(0)

    def fullest() -> int:
        shards = [shard_of(f"{int(key):016x}", nodes) for key in draw.integers(2**63, size=tasks)]
        return int(np.bincount(shards).max())

    assert fullest_shard(tasks, nodes) == pytest.approx(np.mean([fullest() for _ in range(20)]), rel=0.1, abs=1)


def test_a_slow_disk_bounds_and_a_small_memory_refuses() -> None:
    job = Workload(**JOB, positives=1.0, speed=1e6)
    slow = Cluster.model_validate({**NODE, "cores": 32, "disk_bandwidth": "1MB/s", "memory": "128GiB"})
    assert stages(config(), slow, job, 1)["search"].bound == "disk"
    small_node = slow.model_copy(update={"memory": 2**30})
    assert "lower resources.memory_budget" in stages(config(), small_node, job, 1)["search"].refusal
    narrow = stages(config(resources={"memory_budget": "64MiB"}), slow, job, 1)
    assert "raise resources.memory_budget" in narrow["search"].refusal and not narrow["encode"].refusal


def test_what_is_not_known_is_not_guessed() -> None:
    node = Cluster.model_validate({**NODE, "texts_per_second": None})
    job = Workload(10_000, 100, 64, 100.0, 1.0)
    found = stages(config(index={"kind": "IVF64,Flat"}), node, job, 1)
    assert found["encode"].seconds is None and "texts_per_second" in found["encode"].note
    assert found["search"].seconds is None and "not modelled" in found["search"].note
    outlook = forecast(config(index={"kind": "IVF64,Flat"}), node, job, 1)
    assert outlook.seconds == sum(one.seconds or 0 for one in outlook.stages)


@pytest.mark.slow
def test_bytes_are_those_of_a_real_run(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    words = ["".join(map(chr, draw.integers(97, 123, 7))) for _ in range(3000)]
    texts = [" ".join(draw.choice(words, 25)) for _ in range(2000)]
    path = small.build(
        tmp_path,
        [{"_id": f"d{row}", "title": "", "text": text} for row, text in enumerate(texts)],
        small.queries(500),
    )
    small.write_qrels(tmp_path / "data/qrels/train.tsv", [(f"q{row}", f"d{row}", 1) for row in range(500)])
    settings = yaml.safe_load(path.read_text()) | {"index": {"kind": "stream"}}
    settings["data"] |= {"text": "{text}", "part_rows": 4000}
    found = load_config(settings)
    graph.mine(found)
    node = Cluster.model_validate(NODE)
    job = Workload(2000, 500, small.DIMENSION, float(np.mean([len(text) for text in texts])), 1.0)
    said = stages(found.resolved(1), node, job, 1)
    for name in ("ingest", "encode", "search", "triplets"):
        made = json.loads((tmp_path / f"run/.negpipe/{name}/manifest.json").read_text())
        written = sum(file["bytes"] for part in made["parts"] for file in part["files"])
        assert said[name].disk == pytest.approx(written, rel=0.25), name


def test_the_command_plans_before_and_after_ingest(tmp_path: Path) -> None:
    path = small.build(tmp_path)
    file = tmp_path / "nodes.yaml"
    file.write_text(yaml.safe_dump({**NODE, **SHARED}))
    outcome = small.run("plan", path, "--cluster", file)
    assert outcome.code == 2
    assert (
        "job.documents, job.anchors, job.dimension, job.text_bytes: not counted by this run: set them in the cluster"
        in outcome.err
    )
    file.write_text(yaml.safe_dump({**NODE, **SHARED, "job": JOB}))
    outcome = small.run("plan", path, "--cluster", file, "--nodes", "1,8,64", "--set", "index.kind=stream")
    assert outcome.code == 0, outcome.err
    assert "100,000,000 documents x 768 numbers, 1,000,000 anchors" in outcome.out
    for heading in ("1 node ", "8 nodes", "64 nodes", "bound by", "total"):
        assert heading in outcome.out

    file.write_text(yaml.safe_dump({**NODE, **SHARED}))
    graph.mine(load_config(yaml.safe_load(path.read_text())), only="ingest")
    counted = json.loads(small.run("plan", path, "--cluster", file, "--json").out)["job"]
    assert (counted["documents"], counted["anchors"], counted["dimension"]) == (small.DOCUMENTS, small.QUERIES, 8)
    texts = [f"Title {row} document {row}" for row in range(small.DOCUMENTS)]
    assert counted["text_bytes"] == pytest.approx(np.mean([len(text) for text in texts]))
    assert counted["positives"] == 1.0


def test_the_page_shows_what_is_planned(tmp_path: Path) -> None:
    """100 million documents on 1, 8 and 64 nodes, by the rates that come with negpipe."""
    path = tmp_path / "config.yaml"
    about = {
        "run_dir": "run",
        "data": {"path": "data"},
        "encoder": {"model": "some/model"},
        "index": {"kind": "stream"},
    }
    path.write_text(yaml.safe_dump(about))
    outcome = small.run("plan", path, "--cluster", ROOT / "configs/cluster/nodes.yaml", "--nodes", "1,8,64")
    assert outcome.code == 0, outcome.err
    blocks = (ROOT / "docs/how-to/plan-a-cluster.md").read_text(encoding="utf-8").split("```\n")
    (shown,) = [block for block in blocks if block.startswith("100,000,000 documents")]
    assert " ".join(outcome.out.split()) == " ".join(shown.split())


@pytest.mark.slow
def test_texts_a_second_are_measured_here_where_the_file_does_not_say(tmp_path: Path, tiny: Path) -> None:
    path = small.build(tmp_path)
    settings = yaml.safe_load(path.read_text()) | {"index": {"kind": "stream"}}
    path.write_text(yaml.safe_dump(settings | {"encoder": {"model": str(tiny), "pooling": "mean"}}))
    file = tmp_path / "nodes.yaml"
    file.write_text(yaml.safe_dump({**NODE, "texts_per_second": None}))
    assert small.run("ingest", path).code == 0
    outcome = small.run("plan", path, "--cluster", file, "--json")
    assert outcome.code == 0, outcome.err
    planned = json.loads(outcome.out)
    assert planned["job"]["speed"] > 0 and planned["job"]["dimension"] == 32
    assert planned["job"]["source"].startswith("measured")
    encode = next(one for one in planned["outlooks"][0]["stages"] if one["stage"] == "encode")
    assert encode["seconds"] > (small.DOCUMENTS + small.QUERIES) / planned["job"]["speed"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"core": 2}, "core: unknown key. Did you mean 'cores'?"),
        ({"cores": None}, "cores: "),
        ({"cores": 0}, "cores: must be greater than or equal to 1"),
        ({"disk_bandwidth": "fast"}, "disk_bandwidth: 'fast' is not a bandwidth: write for example 25Gbit/s"),
        ({"nodes": 8, "network_bandwidth": None}, "network_bandwidth: required, as 8 nodes share one run directory"),
        ({"job": {"anchors": -1}}, "job.anchors: "),
        ({"rates": {"products": 0}}, "rates.products: "),
        ({"rates": {"products": 1e-308}}, "rates.products: "),
        ({"job": {"anchors": 10**18}}, "job.anchors: "),
        ({"disk_bandwidth": "1.2.3Gbit/s"}, "disk_bandwidth: '1.2.3Gbit/s' is not a bandwidth"),
        ({"disk_bandwidth": "9" * 400 + "Gbit/s"}, "is not a bandwidth"),
    ],
)
def test_a_description_that_cannot_be_meant_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    file = tmp_path / "nodes.yaml"
    file.write_text(yaml.safe_dump({**NODE, **SHARED, **change}))
    with pytest.raises(ConfigError, match=re.escape(f"{file}: ")) as refused:
        load_cluster(file)
    assert said in str(refused.value)


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = small.build(tmp_path)
    file = tmp_path / "nodes.yaml"
    file.write_text(yaml.safe_dump({**NODE, "job": JOB}))
    for options, said in (
        (("--nodes", "8"), "--nodes requires --cluster FILE"),
        (("--cluster", file, "--nodes", "9" * 5_000), "expected node counts"),
        (("--cluster", file, "--nodes", "8,x"), "--nodes 8,x: expected node counts"),
        (("--cluster", file, "--nodes", "8"), "network_bandwidth: required, as 8 nodes share one run directory"),
        (("--cluster", tmp_path / "none.yaml"), "none.yaml cannot be read"),
    ):
        outcome = small.run("plan", path, *options)
        assert outcome.code == 2 and said in outcome.err, outcome.err


def test_amounts_are_read_as_people_write_them() -> None:
    node = Cluster.model_validate({**NODE, "network_bandwidth": "25Gbit/s", "storage_bandwidth": "20GB", "disk": "4TB"})
    assert (node.network_bandwidth, node.storage_bandwidth, node.disk) == (3_125_000_000, 20 * 10**9, 4 * 10**12)
    assert node.disk_bandwidth == 10**6 and node.rates == Rates()
