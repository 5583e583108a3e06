"""Runs on a cluster of Ray, and whatever befalls its nodes, actors and driver: the bytes of an ordinary run."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
import real_runs
import small_source as small
from ray_nodes import ACTOR, Nodes
from real_runs import PATIENCE, Run

from negpipe import graph
from negpipe.cli import console
from negpipe.config.file import load_config
from negpipe.engine import devices
from negpipe.engine.executors import cluster
from negpipe.engine.executors.cluster import Demand
from negpipe.engine.fingerprint import DigestCache
from negpipe.engine.stage import Context
from negpipe.errors import ConfigError, TaskFailedError, VersionsError
from negpipe.review import progress
from negpipe.stages import STAGES

pytestmark = pytest.mark.cluster
GPUS = Path(__file__).parents[2] / "injected_gpus"


@pytest.fixture(autouse=True)
def more_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each node is six processes, and takes half a minute to start on a busy machine."""
    monkeypatch.setattr(real_runs, "PATIENCE", 5 * PATIENCE)


def tried_again(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "retrying its task" in record.message]


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


def clusters() -> int:
    """How many run on this machine."""
    return sum(process.info["name"] == "gcs_server" for process in psutil.process_iter(["name"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("left", "named", "said"),
    [("", "", "auto: "), ("127.0.0.1:9", "", "auto: "), ("", "127.0.0.1:9", "127.0.0.1:9 (RAY_ADDRESS): ")],
    ids=["none", "one that is gone", "one that is named"],
)
def test_auto_without_a_cluster_says_what_to_start(left: str, named: str, said: str, tmp_path: Path) -> None:
    """Also where one that is gone has left its address."""
    if clusters() and not named:
        pytest.skip("a Ray cluster runs on this machine, and auto is that one")
    small.build(tmp_path)
    run = Run(small.settings(tmp_path))
    (tmp_path / "ray").mkdir()
    if left:
        (tmp_path / "ray/ray_current_cluster").write_text(left, encoding="utf-8")
    environment = {"RAY_TMPDIR": str(tmp_path), "RAY_ADDRESS": named}
    overrides = ("executor.ray.address=auto", "executor.ray.wait=3s")
    code, _, log = run.command("mine", *ACTOR, *overrides, environment=environment)
    assert code == 2, log
    log = " ".join(log.split())
    assert f"executor.ray.address: no Ray cluster answers at {said}" in log
    assert "Start one (ray start --head) with this machine as one of its nodes, correct the address, or set" in log
    assert not [*(tmp_path / "ray").glob("session_*")], "a cluster of its own"
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


@pytest.mark.slow
@pytest.mark.parametrize("named", [True, False], ids=["the environment names", "runs on this machine"])
def test_auto_is_the_cluster_that(named: bool, whole: Run, tmp_path: Path, nodes: Nodes) -> None:
    """Only its own workers note what they publish."""
    if not named and clusters() > 1:
        pytest.skip("other clusters run on this machine")
    nodes.fill(2)
    nodes.control.tell(encode={}, search={})
    run, address = whole.at(tmp_path / "run"), nodes.cluster.address
    environment = {"RAY_ADDRESS": address if named else "", "HOME": str(tmp_path)}
    code, _, log = run.command("mine", *ACTOR, "executor.ray.address=auto", environment=environment)
    assert code == 0 and f"ray: connected to {address} in " in log, log
    assert run.content() == whole.content()
    for stage in ("encode", "search"):
        assert {Path(path).name for path in run.content(stage)} == {name for name, _ in nodes.control.notes(stage)}


@pytest.mark.slow
def test_a_cluster_started_without_the_token_of_this_process(whole: Run, tmp_path: Path, nodes: Nodes) -> None:
    """Ray cancels every actor then, and does not say why."""
    nodes.fill(2)
    run = whole.at(tmp_path / "run")
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": 64 * "a"}
    code, _, log = run.command("mine", *ACTOR, nodes.address, environment=environment)
    assert code == 1, log
    assert "Was the cluster started without token authentication? This process uses it" in " ".join(log.split())
    code, _, log = run.command("mine", *ACTOR, nodes.address, environment={"RAY_AUTH_MODE": "disabled"})
    assert code == 0 and run.content() == whole.content(), log


@pytest.mark.slow
def test_a_cluster_of_its_own_leaves_no_token(
    whole: Run, tmp_path: Path, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in the home folder nor in this process, whose next run connects to a cluster without one."""
    monkeypatch.setenv("HOME", str(tmp_path))
    before = dict(os.environ)
    own = whole.at(tmp_path / "own")
    graph.mine(load_config(own.config, [*ACTOR, "executor.ray.address=local", "executor.workers=1"]))
    assert not (tmp_path / ".ray").exists()
    assert {name for name in os.environ.keys() - before.keys() if "AUTH" in name} == set()
    nodes.fill(2)
    run = whole.at(tmp_path / "run")
    nodes.mine(run)
    assert own.content() == run.content() == whole.content()


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
    nodes.control.tell(encode=lost, search=lost)
    run = whole.at(tmp_path / "run")
    with caplog.at_level(logging.INFO):
        nodes.mine(run)
    assert run.content() == whole.content()
    told = tried_again(caplog)
    assert len(told) == 2 and [message.partition(":")[0] for message in told] == ["encode", "search"]
    assert all("died: its " in message and " was lost: " in message for message in told)
    assert max(nodes.control.done_again(stage) for stage in ("encode", "search")) <= 1
    assert "3 nodes with 3 cores" in caplog.text or "4 nodes with 3 cores" in caplog.text


@pytest.mark.guarantee("Ray loses a node, an actor or the driver, or an actor is slow")
@pytest.mark.slow
def test_an_actor_that_is_killed(whole: Run, tmp_path: Path, nodes: Nodes, caplog: pytest.LogCaptureFixture) -> None:
    nodes.fill(2)
    nodes.control.tell(encode={"first": True, "kills": "process"})
    run = whole.at(tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        nodes.mine(run)
    assert run.content() == whole.content()
    assert len(tried_again(caplog)) == 1 and nodes.control.done_again("encode") <= 1
    assert nodes.control.threads() == {"1"}  # by `resources.cpus`, also of the actor in its place


@pytest.mark.guarantee("Ray loses a node, an actor or the driver, or an actor is slow")
@pytest.mark.slow
def test_a_node_that_takes_ten_times_as_long(
    whole: Run, tmp_path: Path, nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    """One of three, for each task, in each stage: the others take over what remains, and nobody does one again."""
    nodes.fill(2)
    run = whole.at(tmp_path / "run")
    with nodes.one_more(WORKER_PACE="10") as node, caplog.at_level(logging.WARNING):
        slow, all_of_them = node.all_processes["raylet"][0].process.pid, len(nodes.cluster.worker_nodes)
        slowed = {"sleeps": 0.4, "together": all_of_them}  # each makes a part, however late it starts
        nodes.control.tell(encode=slowed, search=slowed)
        nodes.mine(run)
    assert run.content() == whole.content()
    assert not tried_again(caplog) and not nodes.control.done_again()
    for stage in ("encode", "search"):
        made = nodes.control.parents(stage)
        assert len(made) == all_of_them and made.total() == len(run.parts(stage))
        assert 0 < made[slow] == min(made.values()) and 5 * made[slow] <= made.total(), made


@pytest.mark.slow
def test_nodes_with_other_versions_are_refused(whole: Run, tmp_path: Path, nodes: Nodes) -> None:
    nodes.fill(2)
    nodes.control.tell(older="numpy", encode={"sleeps": 1})
    run = whole.at(tmp_path / "run")
    with pytest.raises(VersionsError) as refused:
        nodes.mine(run)
    said = str(refused.value)
    assert "encode: its workers started with numpy" in said and "0.0.1" in said and version("numpy") in said
    assert not run.complete("encode")


@pytest.mark.guarantee(
    "`encode` runs on the GPUs of a Ray cluster",
    "an actor for each GPU, which sees no other; one that is not there is named before anything runs (on stand-ins)",
)
@pytest.mark.slow
def test_each_gpu_has_an_actor_that_sees_no_other(golden: Run, tmp_path: Path, nodes: Nodes) -> None:
    """A node of two: the actor on the first is busy with its first part until the other has made the rest."""
    nodes.fill(1)
    run, notes = golden.at(tmp_path / "run"), tmp_path / "notes"
    others = len(golden.parts("encode")) - 1
    told = {"notes": str(notes), "dies": "", "waits": "0", "for": [str(run.folder / ".negpipe/encode"), others]}
    path = os.pathsep.join([str(GPUS), os.environ.get("PYTHONPATH", "")])
    with nodes.one_more(gpus=2, PYTHONPATH=path, GPUS=json.dumps(told)):
        nodes.mine(run, only="ingest")
        nodes.mine(run, "encoder.device=cuda", only="encode")
    assert sorted(notes.read_text().splitlines()) == ["0 cuda:0 float32", "1 cuda:0 float32"]
    made = Counter(part["provenance"]["pid"] for part in run.parts("encode"))
    assert sorted(made.values()) == [1, others]
    assert run.content("encode") == golden.content("encode")


@pytest.mark.guarantee("`encode` runs on the GPUs of a Ray cluster")
@pytest.mark.slow
def test_a_gpu_that_is_not_there_is_named_before_anything_runs(
    whole: Run, golden: Run, tmp_path: Path, nodes: Nodes
) -> None:
    nodes.fill(2)
    run = whole.at(tmp_path / "run")
    no_gpu = r": a worker needs 1 core, 1 GPU and .* no node of the cluster has .* set encoder\.device and search\.dev"
    with pytest.raises(ConfigError, match=f"encode{no_gpu}"):
        nodes.mine(golden.at(run.folder), "encoder.device=cuda", "executor.ray.wait=1s")
    with pytest.raises(ConfigError, match=f"index{no_gpu}"):
        nodes.mine(run, "search.device=cuda", "executor.ray.wait=1s")
    with pytest.raises(ConfigError, match=r"encode: a worker needs 7 cores, .*lower resources"):
        nodes.mine(run, "resources.cpus=7", "executor.ray.wait=1s")
    assert not (run.folder / "ingest").exists()


@pytest.mark.slow
def test_an_actor_that_always_dies_is_a_named_error(whole: Run, tmp_path: Path, nodes: Nodes) -> None:
    nodes.fill(2)
    nodes.control.tell(encode={"kills": "process"})
    run = whole.at(tmp_path / "run")
    with pytest.raises(TaskFailedError, match=r"encode: the worker for part .* died 3 times; .*encode-\d\.log, ends"):
        nodes.mine(run, "executor.workers=1")


@pytest.mark.slow
def test_an_actor_that_is_silent_is_ended_by_the_timeout(
    whole: Run, tmp_path: Path, nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    nodes.fill(2)
    nodes.control.tell(search={"first": True, "sleeps": 300})
    run = whole.copied(tmp_path / "run")
    run.forget("search")
    with caplog.at_level(logging.WARNING):
        nodes.mine(run, "executor.task_timeout=20s")
    assert run.content() == whole.content()
    assert "_watched_replace (sitecustomize.py" in caplog.text and "executor.task_timeout (20 s" in caplog.text


@pytest.mark.slow
def test_a_model_is_loaded_once_for_many_parts_and_its_speed_is_shown(
    golden: Run, tmp_path: Path, nodes: Nodes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    nodes.fill(2)
    nodes.control.tell(encode={})
    run = golden.at(tmp_path / "run")
    with caplog.at_level(logging.INFO):
        nodes.mine(run, "executor.workers=1", "resources.cpus=1", reporter=console.reporter("plain"))
    assert run.content() == golden.content()
    assert len({part["provenance"]["pid"] for part in run.parts("encode")}) == 1 < len(run.parts("encode"))
    assert re.search(r"encode: [\d,]+ of \d+ texts, about \d+ s left \([\d,]+ texts/s, [\d,]+ tokens/s\)", caplog.text)
