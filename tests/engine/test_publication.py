"""Publishing `triplets/` over a folder that somebody uses: it ends, loses nothing, and what is not ours stays."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import small_source as small
from as_root import needs_root
from real_runs import Run

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.errors import StorageError


@pytest.fixture
def run(tmp_path: Path) -> Run:
    small.build(tmp_path)
    run = Run(small.settings(tmp_path))
    run.mine()
    return run


def rows(run: Run) -> list[dict[str, Any]]:
    return [row for path in sorted((run.folder / "triplets").glob("part-*")) for row in pq.read_table(path).to_pylist()]


def old_folders(run: Run) -> list[Path]:
    return [*run.folder.glob(".triplets-old*")]


@contextmanager
def immutable(path: Path) -> Iterator[None]:
    """Neither to be deleted nor renamed, like what lacks the rights."""
    if subprocess.run(["chattr", "+i", str(path)], check=False, capture_output=True).returncode:
        pytest.skip("this file system has no such attribute")
    try:
        yield
    finally:
        held = [path, *path.parent.parent.glob(f".triplets-old*/{path.name}")]
        subprocess.run(["chattr", "-i", *map(str, held)], check=False, capture_output=True)


@needs_root
def test_an_old_folder_that_cannot_be_deleted_is_in_nobodys_way(run: Run, tmp_path: Path) -> None:
    fresh = Run({**run.config, "run_dir": str(tmp_path / "fresh")})
    held = run.folder / "triplets/part-00000.parquet"
    with immutable(held):
        for negatives in (2, 1, 3):
            code, _, log = run.command("mine", f"mining.num_negatives={negatives}")
            assert code == 0, log
            fresh.mine(f"mining.num_negatives={negatives}")
            assert rows(run) == rows(fresh)
        assert old_folders(run)
    run.mine()
    assert not old_folders(run)


@needs_root
def test_a_folder_that_cannot_be_replaced_is_an_error_and_costs_nothing(run: Run) -> None:
    before = rows(run)
    with immutable(run.folder / "triplets"):
        with pytest.raises(StorageError) as refused:
            run.mine("mining.num_negatives=2")
        assert refused.value.code == "storage"
        assert str(run.folder / "triplets") in str(refused.value)
        assert rows(run) == before
    made = {path.name: path.stat().st_ino for path in run.folder.glob(".triplets-*/part-*")}
    run.mine("mining.num_negatives=2")
    assert rows(run) != before
    assert {path.name: path.stat().st_ino for path in (run.folder / "triplets").iterdir()} == made


def test_somebody_who_puts_the_folder_back_again_and_again_ends_in_an_error(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where locks do not work, another process may be faster every time."""
    rename = os.rename

    def raced(source: Path, target: Path) -> None:
        if Path(target).name == "triplets":
            (run.folder / "triplets").mkdir()
            (run.folder / "triplets/somebody").touch()
        rename(source, target)

    monkeypatch.setattr(os, "rename", raced)
    with pytest.raises(StorageError):
        run.mine("mining.num_negatives=2")
    monkeypatch.undo()
    run.mine("mining.num_negatives=2")
    assert (run.folder / "triplets/somebody").exists()


def test_files_of_the_users_survive_every_setting(run: Run) -> None:
    (run.folder / "triplets/NOTES.md").write_text("mine", encoding="utf-8")
    (run.folder / "triplets/figures").mkdir()
    (run.folder / "triplets/figures/one.png").touch()
    run.mine("mining.num_negatives=2")
    (run.folder / "triplets/part-00077.parquet").write_text("no rows of ours", encoding="utf-8")
    run.mine("mining.num_negatives=1", "output.format=n-tuple")
    assert (run.folder / "triplets/NOTES.md").read_text(encoding="utf-8") == "mine"
    assert (run.folder / "triplets/figures/one.png").exists()
    # What looks like rows is not put among them, and not deleted either.
    assert [path.name for path in sorted((run.folder / "triplets").glob("part-*"))] == [
        Path(file).name for file in map(str, run.files("triplets"))
    ]
    assert [path.read_text(encoding="utf-8") for path in run.folder.glob(".triplets-old*/part-00077.parquet")] == [
        "no rows of ours"
    ]


def test_a_swap_that_is_cut_anywhere_loses_no_file_of_the_users(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends at each change to the disk in turn; the next start finishes what was begun."""

    class Killed(BaseException):
        pass

    left = 0

    def dying(name: str) -> Any:
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return real(*arguments, **options)

        return call

    (run.folder / "triplets/NOTES.md").write_text("mine", encoding="utf-8")
    deaths = 0
    for kills in range(40):
        config = load_config(run.config, ["executor.kind=inline", f"mining.num_negatives={1 + kills % 3}"])
        left = kills
        with monkeypatch.context() as patch:
            for name in ("rename", "replace", "unlink", "rmdir"):
                patch.setattr(os, name, dying(name))
            with suppress(Killed):
                graph.mine(config)
        deaths += left < 0
        graph.mine(config)
        assert (run.folder / "triplets/NOTES.md").read_text(encoding="utf-8") == "mine", kills
        assert len(rows(run)) == 12 * (1 + kills % 3)
        assert not old_folders(run)
    assert 20 < deaths < 40
