"""Whatever becomes of arrays and of who submitted them: the bytes of an ordinary run, and no part is made twice."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_source as small
import unreliable_shards as unreliable
from beir_data import numbered_folder, precomputed_config
from real_runs import PATIENCE, Run, kill, wait
from torture import blow

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.engine import pipeline
from negpipe.engine.executors import slurm
from negpipe.engine.shards import shard_of
from negpipe.errors import ConfigError, InputError, LockedError, NegpipeError, TaskFailedError, VersionsError
from negpipe.plan import estimate
from negpipe.stages import STAGES

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.guarantee(
        "an array of Slurm is killed in part, always fails, or outlives who submitted it",
        "submitted again up to a limit; then what is missing and why; the same command waits for it",
    ),
]

HERE = Path(__file__).parent
SOURCES = HERE.parents[2]
LISTS = ("index.kind=IVF2,Flat", "index.shard_size=2000", "index.recall_anchors=10")
LARGEST = 4
"""MaxArraySize of slurm.conf."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An ordinary run, small, and of several parts."""
    folder = tmp_path_factory.mktemp("whole")
    run = Run(precomputed_config(folder / "run", numbered_folder(folder / "beir", 96, 32)))
    run.mine()
    return run


@pytest.fixture(params=["local", "slurm"])
def cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where array tasks run: as processes, or under a real Slurm."""
    if request.param == "slurm":
        monkeypatch.setenv("SLURM_CONF", str(request.getfixturevalue("box")))
        monkeypatch.setitem(slurm._HIDDEN, "slurm", 3.0)
    monkeypatch.setenv("PYTHONPATH", f"{SOURCES}:{SOURCES / 'tests'}")
    return str(request.param)


def of(cluster: str, shards: int, *others: str) -> list[str]:
    return ["executor.kind=slurm", f"executor.slurm.cluster={cluster}", f"executor.slurm.shards={shards}", *others]


def mined(run: Run, overrides: list[str], only: str | None = None) -> graph.Result:
    return graph.mine(load_config(run.config, overrides), only=only)


def mined_by(work: Callable[..., Any], run: Run, overrides: list[str], only: str) -> pipeline.Finished:
    """The same, with another function in the place of what array tasks run."""
    config = load_config(run.config, overrides)
    return pipeline.mine(config, STAGES, only=only, elsewhere={only: slurm.arrays(config, work)})


def keys(run: Run, stage: str) -> list[str]:
    return [part["key"] for part in run.parts(stage)]


def left(run: Run) -> list[Path]:
    """What only arrays need."""
    logs = [path for path in (run.folder / ".negpipe/logs").glob("*") if path.is_dir()]
    return [*logs, *(path for path in run.folder.rglob("*") if path.suffix in (".arrays", ".claim", ".versions"))]


def submitted(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if ": submitted " in record.getMessage()]


# --- the bytes --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_arrays_make_what_a_run_makes(whole: Run, tmp_path: Path, cluster: str, caplog: Any) -> None:
    """Every stage, one of them in rounds; each round is an array of its own, of those shards that have work in it."""
    usual, run = whole.copied(tmp_path / "usual"), whole.at(tmp_path / "run")
    usual.mine(*LISTS)
    with caplog.at_level(logging.INFO):
        result = mined(run, of(cluster, 2, *LISTS))
    assert result.ran == ("ingest", "encode", "index", "search", "triplets")
    assert run.content() == usual.content()
    stages = [line.partition(":")[0] for line in submitted(caplog)]
    assert stages == ["encode", "index", "index", "index", "search", "triplets"]
    assert not left(run)
    makers = {part["provenance"]["pid"] for stage in ("encode", "search") for part in run.parts(stage)}
    assert len(makers) == len({shard_of(key, 2) for key in keys(run, "encode")}) + len(
        {shard_of(key, 2) for key in keys(run, "search")}
    )
    assert os.getpid() not in makers
    assert mined(run, of(cluster, 2, *LISTS)).ran == ()


@pytest.mark.slow
@pytest.mark.parametrize("cluster", ["slurm"], indirect=True)
def test_more_shards_than_an_array_may_have(whole: Run, tmp_path: Path, cluster: str, caplog: Any) -> None:
    run = whole.copied(tmp_path / "run")
    run.forget("encode")
    count = len({shard_of(key, 50) for key in keys(whole, "encode")})
    assert count > LARGEST
    with caplog.at_level(logging.INFO):
        mined(run, of(cluster, 50), only="encode")
    line = submitted(caplog)[0]
    assert "submitted arrays " in line and f" ({count} tasks) " in line and f"{count} of 50 shards" in line
    assert run.content() == whole.content()
    assert not left(run)


def test_a_light_stage_of_one_part_waits_in_no_queue(tmp_path: Path, caplog: Any) -> None:
    small.build(tmp_path)
    run = Run(small.settings(tmp_path) | {"data": {"path": str(tmp_path / "data"), "part_rows": 1000}})
    run.mine("index.kind=stream")
    run.forget("triplets")
    with caplog.at_level(logging.INFO):
        assert mined(run, of("local", 2, "index.kind=stream"), only="triplets").ran == ("triplets",)
    assert not submitted(caplog)


def test_plan_knows_the_size_of_the_array(whole: Run, tmp_path: Path) -> None:
    run = whole.copied(tmp_path / "run")
    run.forget("search")
    steps = {step.stage: step for step in estimate.plan(load_config(run.config, of("local", 3))).steps}
    assert steps["search"].shards == len({shard_of(key, 3) for key in keys(whole, "search")})
    assert steps["encode"].shards is None


# --- who submitted it dies --------------------------------------------------------------------------------


def started(run: Run, overrides: list[str]) -> subprocess.Popen[str]:
    """`negpipe encode` whose array tasks each take four seconds for their second part."""
    struck = blow(stage="encode", what="part", then="thinks", nth=2)
    struck["PYTHONPATH"] += f":{os.environ['PYTHONPATH']}"
    return run.start("encode", *overrides, environment=struck)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cluster", "how"),
    [("local", signal.SIGKILL), ("slurm", signal.SIGINT)],
    indirect=["cluster"],
)
def test_a_run_that_ended_finds_its_array_at_work(
    whole: Run, tmp_path: Path, cluster: str, how: signal.Signals, caplog: Any
) -> None:
    run = whole.copied(tmp_path / "run")
    run.forget("encode")
    overrides = of(cluster, 2)
    process = started(run, overrides)
    try:
        assert wait(process, run.begun("encode", 1)), run.log.read_text(encoding="utf-8")
        for refused in (overrides, ["executor.kind=inline"]):
            with pytest.raises(LockedError, match="is in use by process"):
                mined(run, refused, only="encode")
        with pytest.raises(LockedError):
            graph.clean(load_config(run.config))
        process.send_signal(how)
        process.wait(PATIENCE)
        first = {part["key"]: part["provenance"]["pid"] for part in run.committed("encode")}
        assert 0 < len(first) < len(keys(whole, "encode")) and not run.complete("encode")
        with pytest.raises(LockedError):  # the array tasks hold the run directory
            mined(run, ["executor.kind=inline"], only="encode")
        with pytest.raises(LockedError):
            graph.mine(load_config(run.config, overrides), only="encode", repair=True)
        if how == signal.SIGINT:
            assert process.returncode == 130
            assert "Run the same command to wait for it, or `scancel " in run.log.read_text(encoding="utf-8")
        with caplog.at_level(logging.INFO):
            mined(run, overrides, only="encode")
    finally:
        kill(process)
    assert not submitted(caplog) and "submitted by an earlier run" in caplog.text
    assert run.content() == whole.content()
    made = {part["key"]: part["provenance"]["pid"] for part in run.parts("encode")}
    assert {key: made[key] for key in first} == first
    assert len({*made.values()}) == 2  # a worker of each array task
    assert not left(run)


@pytest.mark.slow
def test_a_run_that_ended_finds_what_its_array_made(whole: Run, tmp_path: Path, caplog: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{SOURCES}:{SOURCES / 'tests'}")
    run = whole.copied(tmp_path / "run")
    run.forget("encode")
    overrides = of("local", 2)
    process = started(run, overrides)
    try:
        assert wait(process, run.begun("encode", 1))
        process.kill()
        process.wait(PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while len(run.committed("encode")) < len(keys(whole, "encode")):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        with caplog.at_level(logging.INFO):
            mined(run, overrides, only="encode")
    finally:
        kill(process)
    assert not submitted(caplog)
    assert run.content() == whole.content()
    assert not left(run)


@pytest.mark.slow
@pytest.mark.parametrize("cluster", ["local"], indirect=True)
def test_what_other_versions_made_is_made_again_in_a_shared_store(
    whole: Run, tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which the run holds against others, and not against its array tasks."""
    run = Run({**whole.at(tmp_path / "run").config, "store": str(tmp_path / "store")})
    with monkeypatch.context() as patch:
        patch.setattr("negpipe.engine.versions.version", lambda name: "0.0.1")
        run.mine(only="ingest")
        run.mine(only="encode")
    assert run.states()["encode"].versions
    result = graph.mine(load_config(run.config, of(cluster, 2)), only="encode", rebuild=True)
    assert result.ran == ("encode",)
    assert not run.states()["encode"].versions
    assert [part["files"] for part in run.parts("encode")] == [part["files"] for part in whole.parts("encode")]


# --- an array task fails ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_array_task_that_is_killed_is_submitted_again(whole: Run, tmp_path: Path, cluster: str, caplog: Any) -> None:
    run = whole.copied(tmp_path / "run")
    run.forget("encode")
    with caplog.at_level(logging.INFO):
        mined_by(unreliable.killed_once, run, of(cluster, 2), "encode")
    one, again = submitted(caplog)
    assert "2 of 2 shards" in one and "1 of 2 shards" in again
    told = next(record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    log = Path(told.rpartition("Its log: ")[2])
    assert log.is_file() and log.is_relative_to(run.folder / ".negpipe/logs")
    assert ("it ended in state FAILED" if cluster == "slurm" else "it died") in told
    assert run.content() == whole.content()


@pytest.mark.slow
@pytest.mark.parametrize("cluster", ["local"], indirect=True)
def test_one_that_is_always_killed_ends_the_run(whole: Run, tmp_path: Path, cluster: str, caplog: Any) -> None:
    run = whole.copied(tmp_path / "run")
    run.forget("encode")
    lacking = [key for key in keys(whole, "encode") if shard_of(key, 2) == 0]
    with caplog.at_level(logging.INFO), pytest.raises(TaskFailedError) as ended:
        mined_by(unreliable.killed, run, of(cluster, 2, "executor.slurm.attempts=2"), "encode")
    said = str(ended.value)
    assert f"encode: {len(lacking)} parts are missing: {lacking[0]} (corpus, " in said
    assert "(shard 0/2): it " in said and Path(said.rpartition("Its log: ")[2]).is_file()
    assert len(submitted(caplog)) == 3  # of the first, other parts came
    assert {part["key"] for part in run.committed("encode")} == {*keys(whole, "encode")} - {*lacking}
    mined(run, of(cluster, 2), only="encode")
    assert run.content() == whole.content()


@pytest.mark.slow
@pytest.mark.parametrize("cluster", ["local"], indirect=True)
def test_an_error_that_will_not_pass_is_not_tried_again(whole: Run, tmp_path: Path, cluster: str, caplog: Any) -> None:
    """Of its class, as if it had happened here."""
    run = whole.copied(tmp_path / "run")
    run.forget("encode")
    with caplog.at_level(logging.INFO), pytest.raises(VersionsError) as ended:
        mined_by(unreliable.of_other_versions, run, of(cluster, 2), "encode")
    assert ended.value.exit_code == ConfigError.exit_code
    assert "its shards started with numpy" in str(ended.value) and "Its log: " in str(ended.value)
    assert len(submitted(caplog)) == 1


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("executor.slurm.parameters={qqos: low}", "qqos"),
        ("executor.slurm.parameters={qos: low}", None),
        ("executor.slurm.time=60", "executor.slurm.time"),
        ("executor.slurm.shards=0", "executor.slurm.shards"),
        ("executor.slurm.folder=/proc/none", "executor.slurm.folder"),
    ],
)
def test_a_parameter_that_is_none_is_refused_before_anything_runs(
    tmp_path: Path, setting: str, said: str | None
) -> None:
    config = small.build(tmp_path)
    kind = ["--set", "executor.kind=slurm", "--set", "executor.slurm.cluster=local", "--set", setting]
    outcome = small.run("ingest", config, *kind)
    assert outcome.code == (2 if said else 0), outcome.err
    assert (said or "") in outcome.err and (tmp_path / "run").exists() == (said is None)


def test_without_slurm_it_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small.build(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    outcome = small.run("ingest", config, "--set", "executor.kind=slurm")
    assert outcome.code == 2 and "needs sbatch, squeue, srun, not found here" in outcome.err.replace("\n", " ")


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small.build(tmp_path)
    for name in ("submitit", "boto3"):
        monkeypatch.setitem(sys.modules, name, None)
    for setting, extra in (("executor.kind=slurm", "slurm"), ("run_dir=s3://bucket/run", "s3")):
        outcome = small.run("ingest", config, "--set", "executor.slurm.cluster=local", "--set", setting)
        assert outcome.code == 2 and f"pip install 'negpipe[{extra}]'" in outcome.err.replace("\n", " ")


def test_a_run_in_a_bucket_needs_a_folder_that_nodes_share(tmp_path: Path) -> None:
    config = load_config(small.settings(tmp_path) | {"run_dir": "s3://bucket/run"}, of("local", 2))
    with pytest.raises(ConfigError, match=r"executor\.slurm\.folder: a run in a bucket"):
        graph.mine(config)


@pytest.mark.slow
@pytest.mark.parametrize("cluster", ["slurm"], indirect=True)
def test_what_slurm_refuses_is_said_in_its_words(whole: Run, tmp_path: Path, cluster: str) -> None:
    run = whole.copied(tmp_path / "run")
    run.forget("encode")
    with pytest.raises(TaskFailedError, match=r"encode: Slurm refused an array of 2: .*[Ii]nvalid partition"):
        mined(run, of(cluster, 2, "executor.slurm.partition=nowhere"), only="encode")
    assert not run.committed("encode")


@pytest.mark.parametrize(
    ("trace", "kind", "text"),
    [
        ('Traceback\n  File "a"\nnegpipe.errors.InputError: a.npy, row 3: NaN\n', InputError, "a.npy, row 3: NaN"),
        ("Traceback\nnegpipe.errors.VersionsError: one\ntwo: three\n", VersionsError, "one\ntwo: three"),
        (
            "x\nnegpipe.errors.InputError: first\n\nThe above …\n\nTraceback\nnegpipe.errors.LockedError: second",
            LockedError,
            "second",
        ),
        ("Traceback\nModuleNotFoundError: No module named 'negpipe'\n", TaskFailedError, "ModuleNotFoundError: No"),
        ("a.b.UncompletedJobError: Job not requeued because: timed-out and …", TaskFailedError, "it ran out of time"),
        ("", TaskFailedError, "it failed"),
    ],
)
def test_the_error_of_an_array_task(trace: str, kind: type[NegpipeError], text: str) -> None:
    error = slurm._error_of(trace)
    assert type(error) is kind and str(error).startswith(text)


@pytest.mark.parametrize("content", ["[]", "{", '{"jobs": {}}', "null"])
def test_a_note_that_cannot_be_read_is_no_note(tmp_path: Path, content: str) -> None:
    small.build(tmp_path)
    config = load_config(small.settings(tmp_path))
    stage = STAGES["encode"]
    with pipeline.opened(config, STAGES, hold="driver") as context:
        own = replace(stage.within(context), key="0123")
        driver = slurm._Driver(config, graph.work, stage, own, lambda *_: None, {})
        assert driver.noted() is None
        assert own.own.run.replace(own.own.arrays("0123"), content.encode(), None)
        assert driver.noted() is None
