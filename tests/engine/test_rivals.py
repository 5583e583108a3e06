"""Who else is there: a second run on the directory, the person at the terminal, the scheduler, the clock."""

from __future__ import annotations

import json
import os
import platform
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import small_source as small
from beir_data import numbered_folder, precomputed_config
from real_runs import PATIENCE, STAGES, Run, interrupted, kill, wait
from torture import alive, blow, forget_from

from negpipe import graph
from negpipe.cli.signals import Terminated, prompt_end
from negpipe.config.file import load_config
from negpipe.errors import LockedError
from negpipe.store.lock import run_lock

pytestmark = pytest.mark.slow


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--torture")
    if "pair" in metafunc.fixturenames:
        metafunc.parametrize("pair", range(20) if full else (4,))
    if "signalled" in metafunc.fixturenames:
        every = [(stage, how) for stage in STAGES for how in SIGNALS]
        metafunc.parametrize(
            "signalled", every if full else [("search", "SIGTERM to all"), ("encode", "Ctrl-C")], ids=" ".join
        )


# --- two runs ---------------------------------------------------------------------------------------------


@pytest.mark.guarantee(
    "a second run starts",
    'exit 4 with host, process, start (or "another negpipe process" where its note cannot be read); a '
    "dead holder's lock is free",
)
def test_one_process_at_a_time(whole: Run, tmp_path: Path) -> None:
    run = whole.at(tmp_path / "run")
    first = run.start("ingest")
    try:
        assert wait(first, run.begun("ingest", 1))
        os.killpg(first.pid, signal.SIGSTOP)
        with pytest.raises(LockedError, match=f"process {first.pid} on {platform.node()}, running since 20"):
            run.mine()
        second = small.run("mine", run.folder.with_name("run.yaml"))
        assert second.code == 4
        assert f"process {first.pid} on {platform.node()}, running since 20" in second.err
        told = small.run("status", run.folder.with_name("run.yaml"))
        assert f"In use by process {first.pid} on {platform.node()}" in told.out
    finally:
        kill(first)
    assert "In use" not in small.run("status", run.folder.with_name("run.yaml")).out
    # Nobody let go of the lock: its holder is dead, so it is free.
    assert (run.folder / ".negpipe" / "holder.json").exists()
    run.mine()
    assert run.content() == whole.content()


@pytest.mark.guarantee("a second run starts")
@pytest.mark.parametrize(
    "said",
    [
        "[" * 200_000,
        '{"pid":' * 200_000,
        "",
        "[]",
        "null",
        '"text"',
        '{"pid": 1}',
        "{",
        b"\xff\xfe",
        '{"pid": NaN, "host"',
    ],
    ids=["deep lists", "deep objects", "empty", "list", "null", "text", "too little", "cut", "no text", "cut too"],
)
def test_a_holder_that_says_nothing_readable_is_another_process(said: str | bytes, tmp_path: Path) -> None:
    config, run_dir = small.build(tmp_path), tmp_path / "run"
    with run_lock(run_dir):
        holder = run_dir / ".negpipe" / "holder.json"
        assert json.loads(holder.read_text(encoding="utf-8"))["pid"] == os.getpid()
        holder.write_bytes(said.encode() if isinstance(said, str) else said)
        with pytest.raises(LockedError, match=f"{run_dir} is in use by another negpipe process: wait for it"):
            graph.mine(load_config(str(config)))
    assert not holder.exists()


@pytest.mark.guarantee(
    "locks do not work",
    "a warning where the system says so; parts are never mixed",
)
@pytest.mark.torture
def test_two_runs_where_everybody_gets_the_lock(
    pair: int, whole: Run, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """They share every folder, do the same work at the same time, and both end well."""
    draw = random.Random(pair)
    run = whole.copied(tmp_path / "run")
    forget_from(run, STAGES[pair % len(STAGES)])
    environment = blow(locks="given to everybody")
    first = run.start("mine", "executor.workers=2", environment=environment)
    time.sleep(draw.choice([0, draw.uniform(0, 2)]))
    log = run.log.rename(tmp_path / "first.log")
    second = run.start("mine", "executor.workers=2", environment=environment)
    try:
        assert first.wait(PATIENCE) == 0, log.read_text(encoding="utf-8")
        assert second.wait(PATIENCE) == 0, run.log.read_text(encoding="utf-8")
    finally:
        kill(first)
        kill(second)
    assert run.content() == whole.content()
    assert {state.state for state in run.states().values()} == {"current"}
    record_property("count: pairs of rivals survived", 1)


@pytest.mark.torture
def test_two_settings_where_everybody_gets_the_lock(
    request: pytest.FixtureRequest, whole: Run, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Neither's parts are ever taken for the other's: what is complete is what its settings make."""
    if not request.config.getoption("--torture"):
        pytest.skip("takes long: make torture")
    run, other = whole.copied(tmp_path / "run"), whole.copied(tmp_path / "other")
    changed = ("encoder.storage=float32", "mining.relative_margin=0.2")
    other.mine(*changed)
    environment = blow(locks="given to everybody")
    forget_from(run, "encode")
    first = run.start("mine", "executor.workers=2", environment=environment)
    second = run.start("mine", *changed, "executor.workers=2", environment=environment)
    try:
        for process in (first, second):
            assert process.wait(PATIENCE) in (0, 5)
    finally:
        kill(first)
        kill(second)
    for overrides, right in ((changed, other), ((), whole)):
        run.mine(*overrides)
        assert run.content() == right.content()
    record_property("count: pairs of rivals survived", 1)


def test_a_file_system_without_locks_is_warned_of(whole: Run, tmp_path: Path) -> None:
    run = whole.copied(tmp_path / "run")
    code, _, log = run.command("mine", environment=blow(locks="not there"))
    assert code == 0
    assert f"cannot lock {run.folder} (No locks available): do not start a second run on it" in log


def test_a_worker_refuses_manifests_its_tasks_were_not_planned_on(whole: Run) -> None:
    head = {"kind": "search", "stage": "search", "config": whole.config, "budget": {"memory": 2**30}}
    head |= {"inputs": {"encode": ["encode", "another"]}}
    command = [sys.executable, "-m", "negpipe.worker"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(json.dumps(head) + "\n")
        worker.stdin.flush()
        assert json.loads(worker.stdout.readline()) == {"listening": True}
        answer = json.loads(worker.stdout.readline())
    assert answer["error"] == "vanished"
    assert "the output of encode" in answer["text"]


# --- the person and the scheduler -------------------------------------------------------------------------


def terminate(process: subprocess.Popen[str]) -> None:
    process.terminate()
    process.wait(10)


def terminate_all(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGTERM)  # what a scheduler does
    process.wait(10)


def interrupt(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C on a terminal does
    process.wait(10)


SIGNALS = {"SIGTERM": terminate, "SIGTERM to all": terminate_all, "Ctrl-C": interrupt}


@pytest.mark.guarantee(
    "SIGTERM, Ctrl-C",
    "ends within 10 s, 143 or 130, resumes",
)
@pytest.mark.torture
def test_signals(
    signalled: tuple[str, str], whole: Run, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    stage, how = signalled
    run = whole.copied(tmp_path / "run")
    forget_from(run, stage)
    process = interrupted(run, stage, "executor.workers=2", parts=1, how=SIGNALS[how])
    assert process.returncode == (130 if how == "Ctrl-C" else 143)
    log = run.log.read_text(encoding="utf-8")
    assert "run the same command again to resume" in log
    assert "Traceback" not in log
    workers = [part["provenance"]["pid"] for part in run.committed(stage)]
    deadline = time.monotonic() + 10
    while (left := alive(workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert set(left) <= {os.getpid()}
    run.mine()
    assert run.content() == whole.content()
    record_property("count: signals survived", 1)


@pytest.mark.torture
def test_a_signal_while_a_model_encodes(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if not request.config.getoption("--torture"):
        pytest.skip("takes long: make torture")
    run = Run(
        {
            "run_dir": str(tmp_path / "run"),
            "data": {"path": str(numbered_folder(tmp_path / "beir", 240, 96)), "part_rows": 16},
            "encoder": {"model": str(request.getfixturevalue("tiny")), "batch_size": 1, "passage_max_length": 32},
            "executor": {"kind": "local", "workers": 2},
        }
    )
    process = interrupted(run, "encode", "executor.workers=2", parts=1, how=terminate_all)
    assert process.returncode == 143
    kept = {part["key"] for part in run.committed("encode")}
    assert len(kept) >= 1
    run.mine()
    assert kept < {part["key"] for part in run.parts("encode")}


STUCK = """
import hashlib, sys
from negpipe import cli
from negpipe.cli import signals

def stuck(*_, **__):
    print("stuck", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes in C, without a look at signals

import negpipe.config.file
negpipe.config.file.load_config = stuck
signals.GRACE_SECONDS = 0.5
sys.argv = ["negpipe", "status", "any"]
cli.main()
"""


def test_a_library_that_does_not_listen_does_not_keep_the_run_from_ending() -> None:
    with subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"stuck\n"
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=10)
    assert process.returncode == 143
    assert b"run the same command again to resume" in log


def test_a_query_that_is_interrupted_is_no_bug() -> None:
    """DuckDB makes a RuntimeError of its own of whatever a signal raises."""
    import duckdb

    database = duckdb.connect(config={"threads": 1})
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Terminated), prompt_end():
        database.execute("select sum(hash(a.range * b.range)) from range(1000000) a, range(1000000) b")


# --- the clock --------------------------------------------------------------------------------------------

YEARS = 10 * 365 * 86400


@pytest.mark.guarantee(
    "the clock jumps",
    "nothing",
)
@pytest.mark.parametrize("jump", [YEARS, -YEARS])
def test_a_clock_that_jumps_changes_nothing(
    jump: int, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = whole.copied(tmp_path / "run")
    forget_from(run, "search")
    done = [path for path in run.folder.rglob("*") if path.is_file()]
    for path in done:  # made under another clock, in the future or long ago
        os.utime(path, (time.time() - jump,) * 2)
    before = {path: path.stat().st_ino for path in done if path.suffix != ".json" and path.parent.name != ".negpipe"}
    now = time.time
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now() + jump)
        assert run.mine().ran == ("search", "triplets")
    assert {path: path.stat().st_ino for path in before} == before
    assert run.content() == whole.content()
    assert run.mine().ran == ()


@pytest.mark.guarantee(
    "a source changes under the same size and time",
    "not seen; `--rehash` finds it",
)
def test_a_source_changed_under_the_same_size_and_time_is_found_by_rehash(tmp_path: Path) -> None:
    folder = numbered_folder(tmp_path / "beir", 60, 30)
    run = Run(precomputed_config(tmp_path / "run", folder))
    run.mine()
    corpus = folder / "corpus.jsonl"
    stat = corpus.stat()
    with corpus.open("r+b") as file:
        content = file.read()
        file.seek(content.index(b"number 7"))
        file.write(b"another7")
    os.utime(corpus, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert run.mine().ran == ()  # the documented limit
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(run.config), encoding="utf-8")
    outcome = small.run("mine", config, "--set", "executor.kind=inline", "--rehash")
    assert outcome.code == 0
    assert "ingest: starting, the content of data.path changed" in outcome.err
    fresh = run.at(tmp_path / "fresh")
    fresh.mine()
    assert run.content() == fresh.content()
