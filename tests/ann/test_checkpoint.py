"""A long search that is cut short goes on from its checkpoint: in whole runs, whatever cuts it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small_source as small

from negpipe import ann, graph
from negpipe.ann import exact
from negpipe.config.file import load_config
from negpipe.engine import versions


class Cut(BaseException):
    """Not an Exception: nothing may catch it."""


def blocks_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first rows of all blocks that are read from now on."""
    load, read = exact._Block.load, []

    def reading(source: Any, first: int, *more: Any) -> Any:
        read.append(first)
        return load(source, first, *more)

    monkeypatch.setattr(exact._Block, "load", reading)
    return read


def test_it_goes_on_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.build(tmp_path)
    config = load_config(small.settings(tmp_path))
    graph.mine(config)
    whole = small.output(tmp_path / "run")
    assert len(list((tmp_path / "run/search").glob("*.parquet"))) > 1

    again = load_config({**small.settings(tmp_path), "run_dir": str(tmp_path / "again")})
    monkeypatch.setattr(exact, "_BLOCK_ROWS", 7)
    monkeypatch.setattr("negpipe.stages.search.ann.Checkpoint", partial(ann.Checkpoint, seconds=0))
    save, saved = exact.Checkpoint.save, []

    def cut(self: exact.Checkpoint, rows: int, *known: Any) -> None:
        save(self, rows, *known)
        saved.append(rows)
        if rows == 21:
            raise Cut

    monkeypatch.setattr(exact.Checkpoint, "save", cut)
    with pytest.raises(Cut):
        graph.mine(again)
    books = tmp_path / "again/.negpipe/search"
    assert saved == [7, 14, 21] and len(list(books.glob("*.npz"))) == 1

    monkeypatch.setattr(exact.Checkpoint, "save", save)
    read = blocks_read(monkeypatch)
    graph.mine(again)
    # The first part of anchors goes on at row 21, the next begins at 0.
    assert read[: read.index(0)] == [21, 28, 35]
    assert small.output(tmp_path / "again") == whole
    assert not list(books.glob("*.npz"))


def test_what_another_version_began_is_not_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.build(tmp_path)
    config = load_config(small.settings(tmp_path))
    monkeypatch.setattr(exact, "_BLOCK_ROWS", 7)
    monkeypatch.setattr("negpipe.stages.search.ann.Checkpoint", partial(ann.Checkpoint, seconds=0))

    def cut(self: exact.Checkpoint, rows: int, *known: Any) -> None:
        save(self, rows, *known)
        raise Cut

    save = exact.Checkpoint.save
    with monkeypatch.context() as patch:
        patch.setattr(exact.Checkpoint, "save", cut)
        patch.setattr(versions, "installed", lambda libraries: dict.fromkeys(libraries, "0.0.1"))
        with pytest.raises(Cut):
            graph.mine(config)
    books = tmp_path / "run/.negpipe/search"
    assert len(list(books.glob("*.npz"))) == 1
    read = blocks_read(monkeypatch)
    graph.mine(config)
    assert read.count(0) == len(list((tmp_path / "run/search").glob("*.parquet")))  # every part from the beginning
    assert not list(books.glob("*.npz"))


def test_a_deeper_search_goes_on_and_searches_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.build(tmp_path)
    # No score reaches the margin, so every anchor is searched again: to depth 20, then to 40.
    scarce = [
        "mining.range_max=10",
        "search.depth=10",
        "mining.max_score=-9",
        "output.min_rows=0",
        "mining.max_depth=40",
        "data.part_rows=99",
    ]
    graph.mine(load_config(small.settings(tmp_path), scarce))
    whole = small.output(tmp_path / "run")

    again = load_config({**small.settings(tmp_path), "run_dir": str(tmp_path / "again")}, scarce)
    graph.mine(again, only="ingest")
    for stage in ("encode", "index", "search"):
        graph.mine(again, only=stage)
    monkeypatch.setattr(exact, "_BLOCK_ROWS", 7)
    clocks = set()

    def checkpoint(path: Path, since: float) -> ann.Checkpoint:
        clocks.add(since)
        return exact.Checkpoint(path, seconds=0, since=since)

    monkeypatch.setattr("negpipe.select.deeper.ann.Checkpoint", checkpoint)
    save, saved = exact.Checkpoint.save, []

    def cut(self: exact.Checkpoint, rows: int, *known: Any) -> None:
        save(self, rows, *known)
        saved.append((known[0][0].shape[1], rows))
        if saved[-1] == (40, 14):
            raise Cut

    monkeypatch.setattr(exact.Checkpoint, "save", cut)
    with pytest.raises(Cut):
        graph.mine(again)
    books = tmp_path / "again/.negpipe/triplets"
    assert len(clocks) == 1  # five minutes are those of all searches
    assert saved == [*((20, rows) for rows in (7, 14, 21, 28, 35, 40)), (40, 7), (40, 14)]
    assert len(list(books.glob("*.npz"))) == 2

    monkeypatch.setattr(exact.Checkpoint, "save", save)
    read = blocks_read(monkeypatch)
    graph.mine(again)
    assert read == [14, 21, 28, 35]
    assert small.output(tmp_path / "again") == whole
    assert not list(books.glob("*.npz"))
