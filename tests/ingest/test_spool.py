"""The pass over a source: it goes on where it was cut short, and reads alike whatever helps it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import closing
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
from negpipe.sources import tables

pytestmark = pytest.mark.slow

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


def begun(folder: Path, name: str = "") -> list[Path]:
    """What a pass has left to go on from."""
    return sorted((folder / "run/.negpipe/ingest").glob(f"begun-*/{name}"))


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
        deadline = time.monotonic() + 60
        while len(begun(tmp_path, "read-*.json")) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    noted = json.loads(begun(tmp_path, "read-*.json")[-1].read_text())["totals"]
    assert 0 < noted["document"] < 60_000
    caplog.set_level("INFO")
    again = mined(config, allowed)
    assert f"resuming after {noted['pieces']} pieces" in caplog.text
    assert again.stats == fresh.stats
    assert parts(again.run_dir) == parts(fresh.run_dir)
    assert not begun(tmp_path)
    if bad is not None:
        listed = [(run.run_dir / "rejected.jsonl").read_bytes() for run in (fresh, again)]
        assert listed[0] == listed[1]


def test_what_another_pass_left_is_not_gone_on_from(tmp_path: Path) -> None:
    config = build(tmp_path, 40)
    left = tmp_path / "run/.negpipe/ingest/begun-0123456789abcdef"
    left.mkdir(parents=True)
    (left / "read-000000.json").write_text('{"totals": {"pieces": 1, "document": 40}, "rows": {"corpus": 40}}')
    assert mined(config).stats["ingest"]["rows"] == 40
    assert not left.exists()
    left.mkdir()
    assert mined(config).ran == () and not left.exists()  # nor is it kept where nothing is to be done


@pytest.mark.parametrize("note", ["", "{", '{"totals"'])
def test_a_note_that_is_not_whole_is_none(note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = build(tmp_path, 40)
    with monkeypatch.context() as patch:
        patch.setattr(spool, "load", lambda *_: 1 / 0)
        patch.setattr("negpipe.stages.ingest.load", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            mined(config)
    (path,) = begun(tmp_path, "read-*.json")
    path.write_text(note)
    assert mined(config).stats["ingest"]["rows"] == 40


def test_what_is_taken_away_while_it_is_read_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a rival would, let in by a lock that does not work: rows must not be lost in silence."""
    config = build(tmp_path, 40)
    loaded, taken = spool.load, list[Path]()

    def load(own: spool.Spool, database: Any) -> None:
        if not taken:
            taken.append(begun(tmp_path, "corpus-*")[0])
            taken[0].unlink()
        loaded(own, database)

    monkeypatch.setattr("negpipe.stages.ingest.load", load)
    assert mined(config).stats["ingest"]["rows"] == 40
    assert taken and not begun(tmp_path)


def test_a_bad_row_is_told_again_and_its_source_read_once_it_is_right(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(InputError, match=r"corpus.jsonl, row 21, field 'text'"):
            mined(build(tmp_path, 40, bad=20))
    assert mined(build(tmp_path, 40)).stats["ingest"]["rows"] == 40
    assert not begun(tmp_path)


class Reluctant:
    """A file that gives less than it is asked for, and fails once it has given so much."""

    def __init__(self, file: Any, fails: int | None = None) -> None:
        self._file, self._left = file, fails

    def read(self, size: int) -> bytes:
        if self._left is not None and self._left <= 0:
            raise OSError("the line is dead")
        got: bytes = self._file.read(max(1, size // 3))
        self._left = None if self._left is None else self._left - len(got)
        return got

    def __iter__(self) -> Any:
        return iter(self._file)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def test_pieces_are_cut_by_their_content_however_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path, 2_000)
    path, opened = str(tmp_path / "data/corpus.jsonl"), tables.opened
    monkeypatch.setattr(tables, "_BLOCK_BYTES", 10_000)
    whole = list(tables._blocks(path))
    assert len(whole) > 20 and max(len(block) for _, block in whole) <= 10_000
    monkeypatch.setattr(tables, "opened", lambda path: Reluctant(opened(path)))
    assert list(tables._blocks(path)) == whole
    monkeypatch.setattr(tables, "opened", lambda path: Reluctant(opened(path), 50_000))
    found: list[Any] = []
    with pytest.raises(InputError, match=r"row \d+: the rest of the file cannot be read \(the line is dead\)"):
        found.extend(tables._blocks(path))
    assert found == whole[: len(found)]


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
    with closing(hashing.Hasher(2)) as hasher:
        assert [one.result() for one in [hasher(column) for column in columns]] == expected
        assert 1 <= len(hasher.processes) <= 2
        for process in hasher.processes:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        assert [hasher(column).result() for column in columns] == expected
    assert all(process.poll() is not None for process in hasher.processes)


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
