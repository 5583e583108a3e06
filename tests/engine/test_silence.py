"""Workers that say what is not a message, or nothing: an error with a name, a retry, a warning, no wait for ever."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import small_source as small
from real_runs import Run
from torture import blow

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.engine.executors import crew, local
from negpipe.engine.fingerprint import DigestCache
from negpipe.engine.stage import Context, Task
from negpipe.errors import ConfigError, TaskFailedError
from negpipe.stages import STAGES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.guarantee(
        "a worker sends garbage or goes silent",
        "garbage counts as a crash; silence causes a warning after 5 minutes with the worker's stack, and ends after "
        "`executor.task_timeout`",
    ),
]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    small.build(tmp_path)
    return Run({**small.settings(tmp_path), "executor": {"kind": "local"}})


@pytest.fixture
def fresh(run: Run, tmp_path: Path) -> dict[str, Any]:
    other = run.at(tmp_path / "fresh")
    other.mine()
    return other.content()


def mine(run: Run, *settings: str) -> graph.Result:
    return graph.mine(load_config(run.config, list(settings)))


def strike(monkeypatch: pytest.MonkeyPatch, **what: Any) -> None:
    """What befalls the worker that has just published its first part of search."""
    for name, value in blow(stage="search", what="part", nth=1, **what).items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("says", "then"),
    [
        ('{"units": 1, "no', "ends"),
        ('{"units": 1, "note": ""}', "ends"),  # whole, but cut before the end of its line
        ("\xff\xfe\x00\n", "goes on"),
        ("Loading weights...\n", "goes on"),
        ('{"done": "another part"}\n', "goes on"),
        ("[" * 100_000 + "\n", "goes on"),
    ],
)
def test_what_is_not_a_message_is_a_death_and_a_retry(
    run: Run,
    fresh: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    says: str,
    then: str,
) -> None:
    strike(monkeypatch, says=says, then=then, once=str(tmp_path / "once"))
    with caplog.at_level(logging.WARNING):
        mine(run)
    assert (tmp_path / "once").exists()
    assert run.content() == fresh
    assert [record.message for record in caplog.records if "not a message" in record.message]


def test_one_that_never_says_a_message_is_a_named_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    strike(monkeypatch, says="oops\n", then="goes on")
    with pytest.raises(TaskFailedError) as failed:
        mine(run)
    assert failed.value.code == "task-failed"
    assert "oops" in str(failed.value)
    monkeypatch.delenv("BLOW")
    mine(run)


@pytest.mark.parametrize(("says", "then"), [("", "is stopped"), ("", "hangs"), ('{"units": 1, "no', "hangs")])
def test_silence_is_warned_about_and_ended_by_the_timeout(
    run: Run,
    fresh: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    says: str,
    then: str,
) -> None:
    monkeypatch.setattr(crew, "SILENCE_SECONDS", 1.0)
    strike(monkeypatch, says=says, then=then, once=str(tmp_path / "once"))
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        mine(run, "executor.task_timeout=8s")
    assert 8 < time.monotonic() - began < 60
    assert run.content() == fresh
    silent = [record.message for record in caplog.records if "has been silent" in record.message]
    warned = [message for message in silent if message.startswith("search: the worker for part")]
    assert 1 <= len(warned) <= 8  # at 1, 2, 4 seconds of silence, and of workers that are slow to begin
    assert any("_waits_for_a_disk_that_is_gone" in message for message in warned) is (then == "hangs")
    assert [record for record in caplog.records if "executor.task_timeout (8 s" in record.message]


def test_workers_that_are_always_silent_end_the_run_by_the_setting(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    strike(monkeypatch, then="hangs")
    with pytest.raises(TaskFailedError) as failed:
        mine(run, "executor.task_timeout=3")
    assert "executor.task_timeout" in str(failed.value)


def test_a_payload_that_is_no_json_is_seen_where_it_is_sent(run: Run) -> None:
    context = Context(load_config(run.config), run.folder, DigestCache(run.folder / "digests.json"))
    task = Task("0" * 16, "candidates", 1, {"folder": Path("a path")})
    with pytest.raises(TypeError):
        local.run(STAGES["search"], iter([task]), context, lambda *_: None)


def test_silence_alone_ends_nothing(
    run: Run, fresh: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker that thinks for long is only warned about; then it goes on where it was."""
    monkeypatch.setattr(crew, "SILENCE_SECONDS", 1.0)
    strike(monkeypatch, then="thinks", once=str(tmp_path / "once"))
    with caplog.at_level(logging.WARNING):
        mine(run)
    assert run.content() == fresh
    assert any("_thinks" in record.message for record in caplog.records)
    assert not any("died" in record.message for record in caplog.records)


@pytest.mark.parametrize("value", ["soon", "-1", "0", "nan", "5 parsecs", "inf"])
def test_a_timeout_that_is_none_is_refused(run: Run, value: str) -> None:
    with pytest.raises(ConfigError, match="task_timeout"):
        load_config(run.config, [f"executor.task_timeout={value}"])


@pytest.mark.parametrize(("value", "seconds"), [("90", 90), ("90s", 90), ("30min", 1800), ("2h", 7200), ("null", None)])
def test_a_timeout_is_seconds_or_says_what_it_is(run: Run, value: str, seconds: float | None) -> None:
    assert load_config(run.config, [f"executor.task_timeout={value}"]).executor.task_timeout == seconds


def test_a_worker_that_is_sent_what_is_no_message_ends_with_a_code() -> None:

    done = subprocess.run(
        [sys.executable, "-m", "negpipe.worker"], input=b'{"stage": "sea', capture_output=True, check=False
    )
    assert done.returncode == local.NOT_A_MESSAGE
    assert b"not a message" in done.stderr
