"""A claim is had by one, kept by signs of life, and passes on from whoever gives none; no time of a file counts."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from negpipe.store import claims
from negpipe.store.claims import Claims
from negpipe.store.store import LocalStore
from negpipe.store.unfinished import owner

pytestmark = pytest.mark.guarantee("shards run in any order, twice at once, or are killed")

KEY = "0123456789abcdef"


def claims_in(folder: Path, patience: float = 30.0) -> Claims:
    return Claims(LocalStore(folder), "claims", patience)


def left_by(folder: Path, who: str) -> Path:
    """A claim of somebody else."""
    path = folder / "claims" / f"{KEY}{claims.SUFFIX}"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{who} 7\n", encoding="utf-8")
    return path


def elsewhere() -> str:
    return owner().partition("@")[0] + "@another.0123abcd"


def test_one_has_it(tmp_path: Path) -> None:
    first, second = claims_in(tmp_path), claims_in(tmp_path)
    assert first.take(KEY) and not second.take(KEY)
    assert second.owner(KEY) == owner()
    first.release(KEY)
    assert second.owner(KEY) is None and second.take(KEY)
    first.release(KEY)  # not its own any more
    assert second.owner(KEY) == owner()


def test_who_gives_a_sign_of_life_keeps_it_and_who_ends_well_gives_it_up(tmp_path: Path) -> None:
    first, second = claims_in(tmp_path, 0.6), claims_in(tmp_path, 0.6)
    with first.kept():
        assert first.take(KEY)
        began = time.monotonic()
        while time.monotonic() - began < 1.5:
            assert not second.take(KEY)
            time.sleep(0.02)
    assert not list((tmp_path / "claims").iterdir())


def test_a_dead_process_of_this_machine_has_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    left_by(tmp_path, re.sub(r"^\d+", str(process.pid), owner()))
    assert claims_in(tmp_path).take(KEY)


@pytest.mark.parametrize("hours", [-30, 0, 30])
@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"1@ 2 3"])
def test_who_says_nothing_loses_it_whatever_the_time_of_the_file(
    tmp_path: Path, hours: int, content: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = left_by(tmp_path, elsewhere())
    if content is not None:
        path.write_bytes(content)
    os.utime(path, (time.time() + hours * 3600,) * 2)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    watcher = claims_in(tmp_path)
    assert not watcher.take(KEY)
    now += 29
    assert not watcher.take(KEY)
    now += 2
    assert watcher.take(KEY)


def test_a_sign_of_life_begins_the_watch_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = left_by(tmp_path, elsewhere())
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    watcher = claims_in(tmp_path)
    assert not watcher.take(KEY)
    now += 29
    path.write_text(f"{elsewhere()} 8\n", encoding="utf-8")
    assert not watcher.take(KEY)
    now += 29
    assert not watcher.take(KEY)
    now += 2
    assert watcher.take(KEY)


def test_who_was_thought_dead_leaves_it_to_the_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    slow, other = claims_in(tmp_path, 0.2), claims_in(tmp_path, 0.2)
    assert slow.take(KEY)  # and no sign of life yet
    assert not other.take(KEY)
    time.sleep(0.25)
    assert other.take(KEY)
    content = (tmp_path / "claims" / f"{KEY}{claims.SUFFIX}").read_bytes()
    with slow.kept():
        time.sleep(0.1)
    assert (tmp_path / "claims" / f"{KEY}{claims.SUFFIX}").read_bytes() == content
    assert "another process has taken this claim" in caplog.text


def test_what_is_left_is_dropped_by_key(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    path = left_by(tmp_path, elsewhere())
    claims.drop(store, "claims", ["fedcba9876543210"])
    assert path.exists()
    claims.drop(store, "claims", ["fedcba9876543210", KEY])
    assert not path.exists()
