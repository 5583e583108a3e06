"""Whatever kills a run, and wherever: what was committed stays, and the next run ends with the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import real_runs
from befalls import Control
from beir_data import numbered_folder, precomputed_config, tricky_folder
from ray_nodes import ACTOR, Nodes
from real_runs import PATIENCE, STAGES, Run, interrupted, kill, programs, wait
from torture import (
    WORKERS,
    Boundary,
    alive,
    blow,
    boundaries,
    forget,
    killed_after,
    killed_at,
    seconds_of,
    sidecars,
    survives,
)

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]

KILLS = 200  # at random moments
MOMENTS = ("ingest", "index", "search", "triplets", "encode", "ingest", "search", "triplets")  # encode loads models


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All boundaries and KILLS moments with --torture, a few of each without."""
    full = metafunc.config.getoption("--torture")
    if "boundary" in metafunc.fixturenames:
        every = list(boundaries())
        metafunc.parametrize("boundary", every if full else every[::9], ids=str)
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(KILLS) if full else (3,))


@pytest.fixture(scope="session")
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An undisturbed run to lose and to get back: of a model with --torture, of brought vectors without."""
    folder = tmp_path_factory.mktemp("whole")
    if not request.config.getoption("--torture"):
        run = Run(precomputed_config(folder / "run", numbered_folder(folder / "beir", 240, 96)))
        run.mine()
        return run
    run = Run(
        {
            "run_dir": str(folder / "run"),
            "data": {"path": str(numbered_folder(folder / "beir", 240, 96)), "part_rows": 16},
            "encoder": {"model": str(request.getfixturevalue("tiny")), "batch_size": 8, "passage_max_length": 32},
            "mining": {"range_max": 40},
            "executor": {"kind": "local", "workers": WORKERS},
            "resources": {"cpus": 2},
        }
    )
    assert run.command("mine")[0] == 0
    return run


@pytest.fixture(scope="session")
def durations(whole: Run, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], float]:
    """Seconds that a run takes that lacks a stage, measured once."""
    known: dict[str, float] = {}

    def seconds(stage: str) -> float:
        if stage not in known:
            known[stage] = seconds_of(whole, stage, tmp_path_factory.mktemp(stage) / "run")
        return known[stage]

    return seconds


@pytest.mark.torture
def test_enough_parts_to_lose(whole: Run) -> None:
    counts = [len(whole.parts(stage)) for stage in STAGES]
    assert sum(counts) >= 40 and min(counts) >= 5


@pytest.mark.guarantee(
    "a run is killed at a write",
    "what was committed stays, `status` is right, the same bytes after resuming",
)
@pytest.mark.torture
def test_killed_at_a_write_boundary(
    boundary: Boundary, whole: Run, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    run = whole.copied(tmp_path / "run")
    forget(run, boundary.stage)
    killed_at(run, boundary)
    survives(run, whole, by_command=boundary.nth % 2 == 0)
    record_property("count: kills survived", 1)


@pytest.mark.guarantee(
    "a run is killed at any moment",
    "what was committed stays, `status` is right, the same bytes after resuming; at most one task per "
    "worker is done again",
)
@pytest.mark.torture
def test_killed_at_a_random_moment(
    seed: int,
    whole: Run,
    durations: Callable[[str], float],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    draw = random.Random(seed)
    stage = MOMENTS[seed % len(MOMENTS)]
    run = whole.copied(tmp_path / "run")
    for _ in range(10):
        forget(run, stage)
        if killed_after(run, draw.uniform(0, durations(stage))):
            break
    else:
        pytest.fail("the run was always over before it was killed")
    survives(run, whole, by_command=draw.random() < 0.3)
    record_property("count: kills survived", 1)


# --- the driver of every executor -------------------------------------------------------------------------

FOLDERS = {"encode": "encode", "search": "search", "triplets": "rows"}
"""Where the stages in which it is killed publish."""
SHARDED = ("-o", ".venv/.ready-mining", "mine-shards", "SHARDS=2", "SET=executor.kind=inline")


def driver(
    executor: str, run: Run, folder: Path, fixture: Callable[[str], Any]
) -> tuple[Control, Callable[[], subprocess.Popen[str]]]:
    """What befalls the tasks of an executor, two at a time, and how its driver is started."""
    if executor == "ray":
        nodes: Nodes = fixture("nodes")
        nodes.fill(2)
        return nodes.control, partial(run.start, "mine", *ACTOR, nodes.address, "executor.workers=2")
    (folder / "control").mkdir()
    control = Control(folder / "control/told")
    if executor == "shards":
        tools = programs(folder / "bin")
        command = ["make", "-C", str(ROOT), *SHARDED, f"CONFIG={run.file()}", f"BIN={tools}"]
        return control, partial(run.started, command, control.environment)
    kinds = {
        "inline": ["executor.kind=inline"],
        "local": ["executor.workers=2", "resources.cpus=2"],
        "slurm": ["executor.kind=slurm", "executor.slurm.shards=2"],
    }
    environment = {**control.environment, **({"SLURM_CONF": str(fixture("box"))} if executor == "slurm" else {})}
    return control, partial(run.start, "mine", *kinds[executor], environment=environment)


@pytest.mark.guarantee(
    "the driver of any executor is killed in `encode`, then in `search`, then in `triplets`",
    "no finished part is made again, at most one task per worker is; the same bytes after resuming",
)
@pytest.mark.slow
@pytest.mark.parametrize(
    "executor",
    ["inline", "local", "shards", *(pytest.param(name, marks=pytest.mark.cluster) for name in ("ray", "slurm"))],
)
def test_the_driver_is_killed_in_three_stages(
    executor: str, whole: Run, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_runs, "PATIENCE", 5 * PATIENCE)  # for clusters on a busy machine
    run = whole.at(tmp_path / "run")
    control, start = driver(executor, run, tmp_path, request.getfixturevalue)
    made: Counter[str] = Counter()
    finished: dict[str, tuple[int, int]] = {}
    for stage, folder in FOLDERS.items():
        control.tell(**{name: {"sleeps": 0.5 * (name == folder)} for name in FOLDERS.values()})
        process = start()
        try:
            assert wait(process, run.begun(stage, 2)), run.log.read_text(encoding="utf-8")
            if executor != "shards":  # a shard has no driver: all of them are killed
                process.kill()
                process.wait(PATIENCE)
                deadline = time.monotonic() + real_runs.PATIENCE
                while executor != "slurm" and (left := alive([pid for _, pid in control.notes()])):
                    assert time.monotonic() < deadline, left
                    time.sleep(0.1)
        finally:
            kill(process)
        assert not run.complete(stage)
        finished |= sidecars(run)
        made.update(name for name, _ in control.notes())
    control.tell(**{name: {} for name in FOLDERS.values()})
    process = start()
    try:
        assert process.wait(real_runs.PATIENCE) == 0, run.log.read_text(encoding="utf-8")
    finally:
        kill(process)
    assert run.content() == whole.content()
    assert finished.items() <= sidecars(run).items()
    made.update(name for name, _ in control.notes())
    assert sum(made.values()) - len(made) <= (0 if executor == "slurm" else 2 * len(FOLDERS))


# --- workers ----------------------------------------------------------------------------------------------


@pytest.mark.guarantee("a worker dies or runs out of memory")
def test_a_worker_out_of_memory_is_tried_again(whole: Run, tmp_path: Path) -> None:
    run = whole.copied(tmp_path / "run")
    forget(run, "search")
    what = {"stage": "search", "what": "part", "boundary": "memory", "nth": 1}
    code, _, log = run.command("search", "executor.workers=1", environment=blow(**what, once=str(tmp_path / "struck")))
    assert code == 0, log
    assert (tmp_path / "struck").exists()
    run.mine()
    assert run.content() == whole.content()


@pytest.mark.guarantee("a worker dies or runs out of memory")
def test_a_task_that_never_fits_into_memory_is_named(whole: Run, tmp_path: Path) -> None:
    run = whole.copied(tmp_path / "run")
    forget(run, "search")
    what = {"stage": "search", "what": "part", "boundary": "memory", "nth": 1}
    code, _, log = run.command("search", "executor.workers=1", environment=blow(**what))
    assert code == 1
    log = log.replace("\n", "")
    died = [part["key"] for part in whole.parts("search") if f"part {part['key']} (candidates" in log]
    assert len(died) == 1
    assert "died 3 times; last cause: exit code 12 (out of memory?" in log
    assert "MemoryError" in log and "Traceback" not in log and len(log) < 2_000
    run.mine()
    assert run.content() == whole.content()


@pytest.mark.guarantee(
    "a worker dies or runs out of memory",
    "tried three times, then the error names the task",
)
@pytest.mark.slow
def test_a_dead_worker_is_replaced(whole: Run, tmp_path: Path) -> None:
    run = whole.at(tmp_path / "run")
    run.mine(only="ingest")
    for _ in range(10):
        before = {part["key"] for part in run.committed("encode")}
        process = run.start("encode", "executor.workers=2")
        wait(process, run.begun("encode", len(before) + 2))
        worker = max(run.committed("encode"), key=lambda part: part["key"] not in before)["provenance"]["pid"]
        if Path(f"/proc/{worker}").exists():
            os.kill(worker, signal.SIGKILL)
        assert process.wait(PATIENCE) == 0
        kill(process)
        if len({part["provenance"]["pid"] for part in run.parts("encode") if part["key"] not in before}) > 1:
            break
        run.forget("encode")
    else:
        pytest.fail("the worker was always done before it could be killed")
    run.mine()
    assert run.content() == whole.content()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trained", "shard"])
def test_killed_between_the_rounds_of_an_approximate_index(whole: Run, tmp_path: Path, kind: str) -> None:
    lists = ("index.kind=IVF2,Flat", "index.shard_size=4000", "index.recall_anchors=20")
    run = whole.copied(tmp_path / "run")
    run.mine(*lists)
    content, kinds = run.content(), [part["kind"] for part in run.parts("index")]
    assert kinds.count("shard") > 1
    for stage in ("index", "search", "triplets"):
        run.forget(stage)
    interrupted(run, "index", *lists, parts=kinds.index(kind) + 1, how=kill)
    run.mine(*lists)
    assert run.content() == content


def committed_inodes(run: Run, stage: str) -> dict[str, int]:
    """Inodes of the files of committed parts, by path."""
    files = [file["path"] for part in run.committed(stage) for file in part["files"]]
    return {path: (run.folder / path).stat().st_ino for path in files}


@pytest.mark.slow
@pytest.mark.torture
def test_sigkill_while_a_model_encodes_then_more_documents_and_another_instruction(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Resumed on a grown corpus with another query instruction, it equals a run from nothing."""
    if not request.config.getoption("--torture"):
        pytest.skip("takes long: make torture")
    golden: Run = request.getfixturevalue("golden")
    smaller = tricky_folder(tmp_path / "smaller", appended=False)
    run = golden.at(tmp_path / "run")
    before = Run(
        run.config
        | {
            "data": run.config["data"] | {"path": str(smaller)},
            "encoder": run.config["encoder"] | {"query_instruction": "file: "},
        }
    )
    before.mine(only="ingest")
    texts = before.inodes("ingest")
    corpus = len(before.parts("ingest", "corpus"))
    assert corpus >= 6
    interrupted(before, "encode", parts=corpus + 1, how=kill)
    encoded = committed_inodes(before, "encode")
    anchors = [part["files"][0]["path"] for part in before.committed("encode") if part["kind"] == "anchors"]
    assert anchors

    code, _, log = run.command("mine")
    assert code == 0
    assert "encoder.query_instruction" not in log  # the interrupted stage has no manifest to differ from
    assert run.content() == golden.content()
    after = run.inodes()
    # The part that was last has grown; every other part of the corpus is the one made before the crash.
    assert len(texts.items() & after.items()) >= corpus - 1
    kept = encoded.items() & after.items()
    assert len(kept) >= corpus - 1
    assert not kept & {(path, encoded[path]) for path in anchors}


# --- the swap of triplets/ --------------------------------------------------------------------------------

# In a process of its own: run the stage, and die before the n-th change to the disk after the old manifest went.
DYING = """
import os, signal, sys
from negpipe import graph
from negpipe.config.file import load_config
import pyarrow.parquet, numpy

config, folders = sys.argv[1], sys.argv[2:]
for folder in folders:
    n = int(folder.rpartition("step")[2])
    if os.fork():
        _, status = os.wait()
        print(folder, os.waitstatus_to_exitcode(status), flush=True)
        continue
    left = None

    def watch(event, arguments):
        global left
        if event not in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink"):
            return
        if left is None and event == "os.mkdir" and "/.triplets/" in str(arguments[0]):
            left = n
        if left is not None:
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(watch)
    graph.mine(load_config(config, [f"run_dir={folder}", "mining.relative_margin=0.3", "executor.kind=inline"]))
    os._exit(0)
"""


@pytest.mark.guarantee(
    "a run is killed while `triplets/` changes",
    "the old or the new rows, never a mixture and never none",
)
@pytest.mark.slow
@pytest.mark.torture
def test_swap_cut_short_at_any_step(
    request: pytest.FixtureRequest, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    old = Run(precomputed_config(tmp_path / "old", numbered_folder(tmp_path / "beir", 60, 30)))
    old.mine()
    new = old.copied(tmp_path / "new")
    new.mine("mining.relative_margin=0.3")
    versions = [published(old), published(new)]
    different = [name for name in versions[1] if versions[0].get(name) != versions[1][name]]
    assert different
    full = request.config.getoption("--torture")
    steps = [old.copied(tmp_path / f"step{n}") for n in range(0, 48, 1 if full else 6)]
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(old.config), encoding="utf-8")
    command = [sys.executable, "-c", DYING, str(config), *(str(run.folder) for run in steps)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    codes = [int(line.split()[-1]) for line in output]
    deaths = codes.index(0)
    assert codes == [-signal.SIGKILL] * deaths + [0] * (len(steps) - deaths)
    assert len(steps) // 3 < deaths < len(steps)
    record_property("count: kills survived", deaths)
    for run in steps[: deaths + 1]:
        # What a reader of triplets/ finds is the one or the other.
        assert published(run) in versions
        made = {path.read_bytes(): path.stat().st_ino for path in run.folder.glob("rows/*")}
        run.mine("mining.relative_margin=0.3")
        for path in (run.folder / "triplets" / name for name in different):
            assert path.stat().st_ino == made[path.read_bytes()]
        assert published(run) == versions[1]
        assert run.content() == new.content()
        assert not [path for path in run.folder.glob(".*") if path.name not in (".negpipe", ".triplets")]
        assert not list((run.folder / ".negpipe" / "triplets").glob("swap*"))


def published(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run.folder / "triplets").glob("*")}


# --- clean, verify, status --------------------------------------------------------------------------------


def test_clean_leaves_a_current_run_current(whole: Run, tmp_path: Path) -> None:
    run = whole.copied(tmp_path / "run")
    run.mine("mining.relative_margin=0.3", "index.kind=stream")
    run.mine()
    current = run.inodes()
    spare = {path for path in data_files(run) if str(path.relative_to(run.folder)) not in current}
    assert spare
    code, output, _ = run.command("clean", flags=["--yes"])
    assert code == 0
    assert "Freed" in output
    assert {str(path.relative_to(run.folder)) for path in data_files(run)} == set(current)
    assert run.inodes() == current
    assert {state.state for state in run.states().values()} == {"current"}
    assert run.mine().ran == ()
    assert run.mine("mining.relative_margin=0.3", "index.kind=stream").ran == ("index", "search", "triplets")


def data_files(run: Run) -> set[Path]:
    others = {".negpipe", ".triplets", "triplets"}
    return {path for path in run.folder.rglob("*") if path.is_file() and others.isdisjoint(path.parts)}
