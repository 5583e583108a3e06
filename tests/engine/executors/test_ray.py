"""Runs on a cluster of Ray, and whatever befalls its nodes, actors and driver: the bytes of an ordinary run."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import real_runs
import small_source as small
from real_runs import PATIENCE, Run, kill, wait

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.engine import devices
from negpipe.engine.executors import cluster
from negpipe.engine.executors.cluster import Demand
from negpipe.engine.fingerprint import DigestCache
from negpipe.engine.stage import Context
from negpipe.errors import ConfigError, TaskFailedError, VersionsError
from negpipe.stages import STAGES

INJECTED = Path(__file__).parents[2] / "injected_nodes"
ACTOR = ("executor.kind=ray", "executor.workers=null", "resources.cpus=1", "resources.memory_budget=64MiB")

pytestmark = pytest.mark.cluster


@pytest.fixture(autouse=True)
def more_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each node is six processes, and takes half a minute to start on a busy machine."""
    monkeypatch.setattr(real_runs, "PATIENCE", 5 * PATIENCE)


@dataclass
class Nodes:
    """A cluster of a head without cores and nodes of one core each, and the file that says what befalls them."""

    cluster: Any
    control: Path

    def fill(self, count: int = 3) -> None:
        """Have so many nodes."""
        for node in [*self.cluster.worker_nodes]:
            if any(kind == "raylet" for kind, _ in node.dead_processes()):
                self.cluster.remove_node(node, allow_graceful=False)
        while len(self.cluster.worker_nodes) < count:
            patiently(lambda: self.cluster.add_node(num_cpus=1, memory=2 * 2**30, object_store_memory=80 * 2**20))

    def tell(self, **what: Any) -> None:
        for path in self.control.parent.iterdir():
            path.unlink()
        self.control.write_text(json.dumps(what), encoding="utf-8")

    def notes(self, stage: str) -> list[tuple[str, int]]:
        """Files that workers published, and their processes."""
        path = Path(f"{self.control}.notes")
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [(name, int(pid)) for at, name, pid in lines if at == stage]

    @property
    def address(self) -> str:
        return f"executor.ray.address={self.cluster.address}"

    def mine(self, run: Run, *overrides: str, **options: Any) -> graph.Result:
        return graph.mine(load_config(run.config, [*ACTOR, self.address, *overrides]), **options)


def patiently(start: Callable[[], Any]) -> Any:
    """Ray gives a node 30 seconds to start, which a busy machine may not do."""
    for _ in range(3):
        try:
            return start()
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
    return start()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    control = tmp_path_factory.mktemp("control") / "told"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(INJECTED), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("NODE_CONTROL", str(control))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # A dead node is to be missed soon, and one of a busy machine not to be taken for dead.
        system = {"health_check_period_ms": 1000, "health_check_initial_delay_ms": 5000}
        system |= {"prestart_worker_first_driver": False}
        head = {"num_cpus": 0, "object_store_memory": 80 * 2**20, "_system_config": system}
        head |= {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
        made = patiently(lambda: cluster_utils.Cluster(initialize_head=True, head_node_args=head))
        try:
            yield Nodes(made, control)
        finally:
            made.shutdown()


def tried_again(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "retrying its task" in record.message]


def done_again(nodes: Nodes, stage: str) -> int:
    """Files of parts that were published a second time."""
    return sum(count - 1 for count in Counter(name for name, _ in nodes.notes(stage)).values())


# --- without a cluster ------------------------------------------------------------------------------------


def loaded(folder: Path, *overrides: str) -> Context:
    small.build(folder)
    config = load_config(small.settings(folder), ["executor.kind=ray", "resources.cpus=null", *overrides])
    return Context(config, config.run_dir, DigestCache(folder / "digests.json"))


@pytest.mark.parametrize(
    ("overrides", "there", "budget"),
    [
        ((), [(8, 0), (4, 0), (0, 0)], (4, "cpu")),
        ((), [(8, 2), (64, 0)], (4, "cuda:0")),
        (("search.device=cpu",), [(8, 2), (64, 0)], (8, "cpu")),
        (("search.device=cuda",), [(64, 0)], (1, "cuda:0")),
        (("resources.cpus=3",), [(64, 0)], (3, "cpu")),
        (("executor.workers=9",), [(2, 0)], (2, "cpu")),
    ],
)
def test_an_actor_gets_a_gpu_or_a_node_and_what_that_has(
    overrides: tuple[str, ...],
    there: list[tuple[int, int]],
    budget: tuple[int, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster, "alive", lambda: [{"CPU": cpus, "GPU": gpus} for cpus, gpus in there])
    context = STAGES["search"].within(loaded(tmp_path, *overrides))
    granted = cluster.granted(context)
    assert (granted.threads, granted.device) == budget
    assert granted.memory == context.config.resources.memory_budget  # of each, however many there are
    assert cluster.demand(granted) == Demand(budget[0], int(budget[1] != "cpu"), granted.memory + 2**30)


def test_how_many_fit() -> None:
    node = {"CPU": 16.0, "GPU": 2.0, "memory": 20e9}
    assert [Demand(*each).fits(node) for each in ((4, 0, 10**9), (4, 1, 10**9), (4, 0, 9 * 10**9), (17, 0, 1))] == [
        4, 2, 2, 0,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("executor.ray.address=ray://head:10001", r"address: 'ray://head:10001' is not an address: use auto, local"),
        ("executor.ray.address=head", "is not an address"),
        ("executor.ray.address=head:99999", "is not an address"),
        ("executor.ray.wait=0", "wait"),
        ("encoder.devices=[cuda:0]", r"encoder\.devices are those of one machine; .*set encoder\.device: cuda"),
        ("search.device=cuda:1", r"search\.device: 'cuda:1' is a device of one machine; .*use cpu or cuda"),
    ],
)
def test_what_is_no_setting_of_a_cluster_is_refused(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, override)


def test_without_the_extra_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"executor\.kind: ray needs Ray .*pip install 'negpipe\[ray\]'"):
        graph.mine(loaded(tmp_path).config)
    assert not (tmp_path / "run/ingest").exists()


def test_a_device_that_is_rays_to_decide_is_the_cores_here() -> None:
    assert (devices.same(devices.ANY), devices.visible(devices.ANY)) == ("cpu", "")


@pytest.mark.slow
@pytest.mark.parametrize("address", ["127.0.0.1:9", "no-such-host.invalid:6379"])
def test_where_no_ray_answers_is_named_in_time(address: str, tmp_path: Path) -> None:
    small.build(tmp_path)
    run = Run(small.settings(tmp_path))
    began = time.monotonic()
    code, _, log = run.command("mine", *ACTOR, f"executor.ray.address={address}", "executor.ray.wait=3s")
    assert code == 2, log
    assert f"executor.ray.address: no Ray cluster answers at {address}" in " ".join(log.split())
    assert time.monotonic() - began < 60  # Ray alone takes minutes
    assert not (run.folder / "ingest").exists()


# --- on one -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_cluster_of_this_machine_alone_makes_what_a_run_makes(whole: Run, tmp_path: Path) -> None:
    """By the command, its triplets too; whatever it started ends with it."""
    run = whole.at(tmp_path / "run")
    code, output, log = run.command("mine", *ACTOR, "executor.ray.address=local", "executor.workers=2")
    assert code == 0, log
    assert "raylet" not in output
    assert run.content() == whole.content()
    for stage in ("encode", "search", "triplets"):
        first = (run.folder / f".negpipe/logs/{stage}-0.log").read_text(encoding="utf-8").splitlines()[0]
        assert re.search(r"process \d+ on ", first)
    code, _, log = run.command("mine", *ACTOR, "executor.ray.address=local")
    assert code == 0 and "ray:" not in log  # nothing to run, nothing started


@pytest.mark.guarantee(
    "Ray loses a node, an actor or the driver, or an actor is slow",
    "at most one task per lost worker is done again; the bytes of an ordinary run",
)
@pytest.mark.slow
def test_a_node_that_is_lost_in_encode_and_one_in_search(
    whole: Run, tmp_path: Path, nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    nodes.fill(3)
    lost = {"first": True, "kills": "node", "sleeps": 60}
    nodes.tell(encode=lost, search=lost)
    run = whole.at(tmp_path / "run")
    with caplog.at_level(logging.INFO):
        nodes.mine(run)
    assert run.content() == whole.content()
    told = tried_again(caplog)
    assert len(told) == 2 and [message.partition(":")[0] for message in told] == ["encode", "search"]
    assert all("died: its " in message and " was lost: " in message for message in told)
    assert max(done_again(nodes, stage) for stage in ("encode", "search")) <= 1
    assert "3 nodes with 3 cores" in caplog.text or "4 nodes with 3 cores" in caplog.text


@pytest.mark.guarantee("Ray loses a node, an actor or the driver, or an actor is slow")
@pytest.mark.slow
def test_an_actor_that_is_killed_and_one_that_is_slow(
    whole: Run, tmp_path: Path, nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    nodes.fill(2)
    nodes.tell(encode={"first": True, "kills": "process"}, search={"first": True, "waits": 4})
    run = whole.at(tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        nodes.mine(run)
    assert run.content() == whole.content()
    assert len(tried_again(caplog)) == 1 and done_again(nodes, "encode") <= 1
    counts = Counter(pid for _, pid in nodes.notes("search"))
    assert len(counts) == 2 and min(counts.values()) < max(counts.values())
    assert done_again(nodes, "search") == 0


@pytest.mark.guarantee("Ray loses a node, an actor or the driver, or an actor is slow")
@pytest.mark.slow
def test_a_driver_that_is_killed_and_a_run_that_goes_on(whole: Run, tmp_path: Path, nodes: Nodes) -> None:
    nodes.fill(2)
    nodes.tell(search={"sleeps": 3})
    run = whole.at(tmp_path / "run")
    process = run.start("mine", *ACTOR, nodes.address)
    try:
        assert wait(process, run.begun("search", 1)), run.log.read_text(encoding="utf-8")
    finally:
        kill(process)
    orphans = {int(re.findall(r"process (\d+) on", log.read_text())[0]) for log in run.folder.glob(".negpipe/logs/s*")}
    deadline = time.monotonic() + real_runs.PATIENCE
    while left := [pid for pid in orphans if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    assert orphans and not run.complete("search")
    made = {part["key"] for part in run.committed("search")}
    nodes.tell(search={})
    nodes.mine(run)
    assert run.content() == whole.content()
    again = {name.partition("-")[0] for name, _ in nodes.notes("search")}
    assert made and not made & again


@pytest.mark.slow
def test_nodes_with_other_versions_are_refused(whole: Run, tmp_path: Path, nodes: Nodes) -> None:
    nodes.fill(2)
    nodes.tell(older="numpy", encode={"sleeps": 1})
    run = whole.at(tmp_path / "run")
    with pytest.raises(VersionsError) as refused:
        nodes.mine(run)
    said = str(refused.value)
    assert "encode: its workers started with numpy" in said and "0.0.1" in said and version("numpy") in said
    assert not run.complete("encode")


@pytest.mark.slow
def test_a_gpu_that_is_not_there_is_named_before_anything_runs(whole: Run, tmp_path: Path, nodes: Nodes) -> None:
    nodes.fill(2)
    run = whole.at(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"index: a worker needs 1 cores, 1 GPUs and .* no node of the cluster has"):
        nodes.mine(run, "search.device=cuda", "executor.ray.wait=1s")
    with pytest.raises(ConfigError, match=r"encode: a worker needs 7 cores, .*lower resources"):
        nodes.mine(run, "resources.cpus=7", "executor.ray.wait=1s")
    assert not (run.folder / "ingest").exists()


@pytest.mark.slow
def test_an_actor_that_always_dies_is_a_named_error(whole: Run, tmp_path: Path, nodes: Nodes) -> None:
    nodes.fill(2)
    nodes.tell(encode={"kills": "process"})
    run = whole.at(tmp_path / "run")
    with pytest.raises(TaskFailedError, match=r"encode: the worker for part .* died 3 times; .*encode-\d\.log, ends"):
        nodes.mine(run, "executor.workers=1")


@pytest.mark.slow
def test_an_actor_that_is_silent_is_ended_by_the_timeout(
    whole: Run, tmp_path: Path, nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    nodes.fill(2)
    nodes.tell(search={"first": True, "sleeps": 300})
    run = whole.copied(tmp_path / "run")
    run.forget("search")
    with caplog.at_level(logging.WARNING):
        nodes.mine(run, "executor.task_timeout=20s")
    assert run.content() == whole.content()
    assert "_watched_replace (sitecustomize.py" in caplog.text and "executor.task_timeout (20 s" in caplog.text


@pytest.mark.slow
def test_a_model_is_loaded_once_for_many_parts_and_no_faiss_beside_it(
    golden: Run, tmp_path: Path, nodes: Nodes
) -> None:
    nodes.fill(2)
    nodes.tell(encode={})
    run = golden.at(tmp_path / "run")
    nodes.mine(run, "executor.workers=1", "resources.cpus=1")
    assert run.content() == golden.content()
    assert len({part["provenance"]["pid"] for part in run.parts("encode")}) == 1 < len(run.parts("encode"))
