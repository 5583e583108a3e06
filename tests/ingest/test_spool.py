"""The pass over a source: it goes on where it was cut short, and reads alike whatever helps it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import small_source as small

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.data.texts import digests, hashes, normalize, normalized_hashes
from negpipe.errors import InputError
from negpipe.ingest import hashing, spool

WORDS = ["plain", "Two  blanks", "tab\tinside", "ÄÖÜ", "İstanbul", "ﬁne ﬁsh", "naïve", "\u3000wide", "Zwölf", "½"]


def build(folder: Path, documents: int, bad: int | None = None) -> Path:
    """A source whose pieces are many, and a config that reads it."""
    draw = random.Random(documents)
    rows: list[Any] = [
        {"_id": f"d{i}", "title": f"title {i}", "text": " ".join(draw.choices(WORDS, k=60)) + f" {i}."}
        for i in range(documents)
    ]
    if bad is not None:
        rows[bad] = {"_id": f"d{bad}", "title": "", "text": 5}
    small.build(folder, corpus=rows)
    return small.write_config(folder)


def parts(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "ingest").iterdir())


def mined(config: Path, *overrides: str) -> graph.Result:
    return graph.mine(load_config(str(config), ["data.part_rows=16384", *overrides]), only="ingest")


@pytest.mark.parametrize("bad", [None, 3_000])
def test_a_killed_pass_goes_on_behind_what_it_noted(
    bad: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = build(tmp_path, 60_000, bad)
    allowed = "data.max_bad_rows=1"
    fresh = mined(config, allowed, f"run_dir={tmp_path}/fresh")
    command = [
        sys.executable,
        "-m",
        "negpipe",
        "ingest",
        str(config),
        "--set",
        allowed,
        "--set",
        "data.part_rows=16384",
    ]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        notes = tmp_path / "run/.negpipe/ingest/spool"
        deadline = time.monotonic() + 60
        while len(list(notes.glob("read-*.json"))) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    noted = json.loads(max(notes.glob("read-*.json")).read_text())
    assert 0 < noted["document"] < 60_000
    caplog.set_level("INFO")
    again = mined(config, allowed)
    assert f"goes on behind {noted['pieces']} pieces" in caplog.text
    assert again.stats == fresh.stats
    assert parts(again.run_dir) == parts(fresh.run_dir)
    assert not notes.exists()
    if bad is not None:
        listed = [(run.run_dir / "rejected.jsonl").read_bytes() for run in (fresh, again)]
        assert listed[0] == listed[1]


def test_what_another_source_left_is_not_gone_on_from(tmp_path: Path) -> None:
    config = build(tmp_path, 40)
    left = tmp_path / "run/.negpipe/ingest/spool"
    for name, key in (("another source", "f" * 16), ("nobody", None)):
        left.mkdir(parents=True)
        (left / "read-000000.json").write_text('{"pieces": 1, "document": 40}')
        if key:
            (left / "key.json").write_text(json.dumps(key))
        assert mined(config, f"data.part_rows={2 + len(name)}").stats["ingest"]["rows"] == 40
        assert not left.exists()


def test_a_bad_row_leaves_nothing_to_go_on_from(tmp_path: Path) -> None:
    config = build(tmp_path, 40, bad=20)
    with pytest.raises(InputError, match=r"corpus.jsonl, row 21, field 'text'"):
        mined(config)
    assert not (tmp_path / "run/.negpipe/ingest/spool").exists()


# --- digests ----------------------------------------------------------------------------------------------


def texts(count: int, seed: int = 0) -> pa.Array:
    draw = random.Random(seed)
    return pa.array([(" ".join(draw.choices(WORDS, k=9)) + f" {i}").strip() for i in range(count)], pa.large_string())


def test_hashes_of_a_column_are_those_of_its_texts() -> None:
    column = texts(500)
    found = hashing.hashed(column)
    every = column.to_pylist()
    assert np.array_equal(np.stack([found["d1"], found["d2"]], axis=1), digests(every))
    assert np.array_equal(found["normalized"], hashes(map(normalize, every)))


def test_every_character_is_normalised_alike() -> None:
    """Printable ASCII is not looked at in Python: the shortcut must not be seen."""
    every = [f"{chr(code)}x {chr(code)} Y{chr(code)}" for code in range(1, 0x3000) if not 0xD800 <= code < 0xE000]
    every = [text.strip() for text in every]
    column = pa.array(every, pa.large_string())
    assert np.array_equal(normalized_hashes(column), hashes(map(normalize, every)))
    assert np.array_equal(normalized_hashes(column[5:900]), hashes(map(normalize, every[5:900])))


def test_processes_beside_say_the_same_and_may_be_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "_MANY", 0)
    columns = [texts(2_000, seed) for seed in range(6)]
    expected = [hashing.hashed(column) for column in columns]
    with hashing.hasher(2) as hasher:
        assert [one.result() for one in [hasher(column) for column in columns]] == expected
        assert 1 <= len(hasher._processes) <= 2
        for process in hasher._processes:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        assert [hasher(column).result() for column in columns] == expected
    assert all(process.poll() is not None for process in hasher._processes)


def test_a_process_beside_ends_with_the_one_that_asks() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "negpipe.ingest.hashing"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin
    process.stdin.close()
    assert process.wait(30) is not None


def test_items_made_ahead_come_in_order_and_end_with_their_error() -> None:
    def items() -> Any:
        yield from (3, 1, 2)
        raise InputError("no more")

    for count in (1, 2, 9):
        found = []
        with pytest.raises(InputError, match="no more"):
            for item in spool.ahead(items(), count):
                found.append(item)
        assert found == [3, 1, 2]
