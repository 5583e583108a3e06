"""Runs that many tests look at: each is made once a session, and copied by whoever changes it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ceph_server
import learnable
import object_server
import pytest
import small_source as small
from beir_data import numbered_folder, precomputed_config, tricky_folder
from object_server import Bucket
from real_runs import Run
from tiny_model import build_tiny_model

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.store import opening, s3, unfinished

SCRIPT = """
import json, sys
import negpipe

result = negpipe.mine(json.loads(sys.argv[1]))
print(json.dumps([str(result.triplets), result.stats, result.ran]))
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--torture", action="store_true", help="the tests marked torture at full size: make torture")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First the files that run a model here: one of two processes then imports its library, for ten seconds."""
    models = {item.path for item in items if "tiny" in getattr(item, "fixturenames", ())}
    models |= {item.path for item in items if item.path.stem in ("test_parity", "test_drop_in")}
    items.sort(key=lambda item: item.path not in models)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Add up what tests counted with `record_property("count: kills survived", 1)`."""
    counts: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name.startswith("count: "):
                counts[name.removeprefix("count: ")] += value
    if counts and terminalreporter.config.getoption("--torture"):
        terminalreporter.section("torture")
        for name, count in sorted(counts.items()):
            terminalreporter.write_line(f"{name} {count:,}")


@pytest.fixture(scope="session", autouse=True)
def nothing_has_to_survive_a_power_cut() -> Iterator[None]:
    """In this process no file waits for the disk. Processes that tests start sync theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose run, of a small source and brought vectors, is complete."""
    folder = tmp_path_factory.mktemp("finished")
    outcome = small.run("mine", small.build(folder))
    assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real BERT, small."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def golden(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The folder full of traps, mined with the tiny model through FlagEmbedding."""
    folder = tmp_path_factory.mktemp("golden")
    run = Run(
        {
            "run_dir": str(folder / "run"),
            "data": {"path": str(tricky_folder(folder / "beir")), "part_rows": 12},
            "encoder": {
                "model": str(tiny),
                "query_instruction": "list: ",
                "query_max_length": 48,
                "passage_max_length": 64,
                "batch_size": 8,
            },
            "mining": {"range_max": 60, "num_negatives": 4},
            "resources": {"cpus": 2},
        }
    )
    run.mine()
    return run


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[object]]:
    """Vectors that the user brings, mined by a script without a main guard; with what it printed."""
    folder = tmp_path_factory.mktemp("scripted")
    run = Run(precomputed_config(folder / "run", numbered_folder(folder / "beir", 400, 160)))
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, str(folder / "script.py"), json.dumps(run.config)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return run, json.loads(done.stdout)


@pytest.fixture(scope="session")
def undisturbed(scripted: tuple[Run, list[object]]) -> Run:
    """The run of the vectors that the user brings, from nothing and without a disturbance."""
    return scripted[0]


@pytest.fixture(scope="session")
def mined(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Rows to train on, and nothing trained."""
    folder = tmp_path_factory.mktemp("mined")
    run = Run(learnable.settings(folder / "run", learnable.build(folder / "beir"), tiny))
    with learnable.training_here():
        graph.mine(load_config(run.config))
    return run


@pytest.fixture(scope="session")
def trained(mined: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same, trained for two steps."""
    run = mined.copied(tmp_path_factory.mktemp("trained") / "run")
    with learnable.training_here():
        graph.train(load_config(run.config))
    return run


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    """A new folder on another file system than `tmp_path`: no hard link leads there."""
    place = Path("/dev/shm") / unfinished.owner()
    if not place.parent.is_dir() or place.parent.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    yield place
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="session")
def still(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without dropout, whose loss can be computed again."""
    folder = build_tiny_model(tmp_path_factory.mktemp("still") / "model", seed=3)
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    path.write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def moto() -> Iterator[Bucket]:
    """A server of S3 with one bucket, a stand-in."""
    with object_server.served() as bucket:
        yield bucket


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    """A server of S3 with one bucket, a real one."""
    with ceph_server.served(tmp_path_factory.mktemp("ceph")) as bucket:
        yield bucket


@pytest.fixture
def reach(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Bucket], Bucket]]:
    """(server) → its bucket, where boto3 finds it, and not what this machine has settings for; then it is emptied."""
    with ExitStack() as after:

        def to(server: Bucket) -> Bucket:
            nobodys = {"AWS_CONFIG_FILE": "none", "AWS_SHARED_CREDENTIALS_FILE": "none"}
            for name, value in {**server.environment, **nobodys}.items():
                monkeypatch.setenv(name, value)
            monkeypatch.delenv("AWS_PROFILE", raising=False)
            for cached in (s3._client, opening._objects):
                cached.cache_clear()
                after.callback(cached.cache_clear)
            after.callback(server.clear)
            return server

        yield to


@pytest.fixture
def bucket(request: pytest.FixtureRequest, reach: Callable[[Bucket], Bucket]) -> Bucket:
    """An empty bucket of moto, or of the server that `on_both` names."""
    return reach(request.getfixturevalue(getattr(request, "param", "moto")))
