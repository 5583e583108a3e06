"""Showing rows in `triplets/` while somebody uses it: it ends, loses nothing, and what is not ours stays."""

from __future__ import annotations

import json
import os
import shutil
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

pytestmark = [
    pytest.mark.guarantee("files of your own are beside the rows"),
    pytest.mark.guarantee(
        "the old `triplets/` cannot be deleted or replaced",
        "it stays beside the new rows; or an error says where the new rows are complete",
        section="input",
    ),
]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    small.build(tmp_path)
    run = Run(small.settings(tmp_path))
    run.mine()
    return run


def rows(run: Run) -> list[dict[str, Any]]:
    return [row for path in sorted((run.folder / "triplets").glob("part-*")) for row in pq.read_table(path).to_pylist()]


def old_folders(run: Run) -> list[Path]:
    return [*run.folder.glob(".triplets/old-*")]


@contextmanager
def immutable(path: Path) -> Iterator[None]:
    """Neither to be deleted nor renamed, like what lacks the rights."""
    if subprocess.run(["chattr", "+i", str(path)], check=False, capture_output=True).returncode:
        pytest.skip("this file system has no such attribute")
    try:
        yield
    finally:
        held = [path, *path.parent.parent.glob(f".triplets/old-*/{path.name}")]
        subprocess.run(["chattr", "-i", *map(str, held)], check=False, capture_output=True)


@pytest.mark.slow
@needs_root
def test_rows_that_cannot_be_changed_are_in_nobodys_way(run: Run, tmp_path: Path) -> None:
    fresh = Run({**run.config, "run_dir": str(tmp_path / "fresh")})
    held = run.folder / "triplets/part-00000.parquet"
    with immutable(held):
        for negatives in (2, 1, 3):
            code, _, log = run.command("mine", f"mining.num_negatives={negatives}")
            assert code == 0, log
            fresh.mine(f"mining.num_negatives={negatives}")
            assert rows(run) == rows(fresh)


@needs_root
def test_a_folder_that_cannot_be_replaced_is_an_error_and_costs_nothing(run: Run) -> None:
    before = rows(run)
    with immutable(run.folder / "triplets"):
        with pytest.raises(StorageError) as refused:
            run.mine("mining.num_negatives=2")
        assert refused.value.code == "storage"
        assert str(run.folder / "triplets") in str(refused.value)
        assert rows(run) == before
    made = {path.name: path.stat().st_ino for path in run.folder.glob(".triplets/*/part-*")}
    run.mine("mining.num_negatives=2")
    assert rows(run) != before
    assert {path.name: path.stat().st_ino for path in (run.folder / "triplets").iterdir()} == made


def test_somebody_who_puts_the_folder_back_again_and_again_ends_in_an_error(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where locks do not work, another process may be faster every time."""
    replace = os.replace

    def raced(source: Path, target: Path) -> None:
        if Path(target).name == "triplets":
            (run.folder / "triplets").unlink(missing_ok=True)
            (run.folder / "triplets").mkdir(exist_ok=True)
            (run.folder / "triplets/somebody").touch()
        replace(source, target)

    monkeypatch.setattr(os, "replace", raced)
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
    assert [path.stat().st_ino for path in sorted((run.folder / "triplets").glob("part-*"))] == [
        path.stat().st_ino for path in run.files("triplets")
    ]
    graph.clean(load_config(run.config))
    kept = run.folder.glob(".triplets/*/part-00077.parquet")
    assert [path.read_text(encoding="utf-8") for path in kept] == ["no rows of ours"]


@pytest.mark.guarantee("a run is killed while `triplets/` changes")
def test_a_reader_sees_the_rows_of_one_setting_at_every_moment(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at after every change to the disk."""
    config = load_config(run.config, ["executor.kind=inline", "mining.num_negatives=2"])
    seen = []

    def watching(name: str) -> Any:
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            result = real(*arguments, **options)
            seen.append(len(rows(run)))
            return result

        return call

    for name in ("rename", "replace", "unlink", "rmdir", "link", "symlink", "mkdir"):
        monkeypatch.setattr(os, name, watching(name))
    graph.mine(config)
    assert seen == sorted(seen, reverse=True)
    assert set(seen) == {36, 24}


def test_rows_of_an_earlier_setting_are_shown_again_without_being_made(run: Run) -> None:
    before = {path.name: path.stat().st_ino for path in (run.folder / "triplets").iterdir()}
    run.mine("mining.num_negatives=2")
    run.mine()
    assert {path.name: path.stat().st_ino for path in (run.folder / "triplets").iterdir()} == before
    assert graph.clean(load_config(run.config)) > 0
    assert [path.name for path in (run.folder / ".triplets").iterdir()] == [(run.folder / "triplets").readlink().name]


def test_the_same_rows_under_other_names_are_shown_once(run: Run) -> None:
    expected = rows(run)
    for settings in (["output.rows_per_file=100000"], [], ["output.rows_per_file=100000"]):
        run.mine(*settings)
        assert rows(run) == expected


def test_records_without_roles_are_made_again_where_files_cannot_be_told_apart(run: Run) -> None:
    """Those of the first edition: an index of several files, a list of rejected rows."""
    approximate = ["index.kind=SQ8", "index.min_recall=0.1", "search.depth=8", "mining.range_max=8"]
    run.mine(*approximate)
    for path in (run.folder / ".negpipe").glob("*/*.json"):
        book = json.loads(path.read_bytes())
        book.pop("digest", None)
        for part in book.get("parts", [book]):
            for file in part["files"]:
                file.pop("role"), file.pop("aside")
        path.write_text(json.dumps(book))
    vectors = {path: path.stat().st_ino for path in (run.folder / "encode").iterdir()}
    assert "index" in run.mine(*approximate).ran
    assert {state.state for state in run.states(*approximate).values()} == {"current"}
    assert {path: path.stat().st_ino for path in (run.folder / "encode").iterdir()} == vectors


def test_a_folder_that_a_copy_made_of_the_pointer_is_replaced(run: Run, tmp_path: Path) -> None:
    other = Run({**run.config, "run_dir": str(shutil.copytree(run.folder, tmp_path / "copy"))})
    assert not (other.folder / "triplets").is_symlink()
    other.mine()
    assert (other.folder / "triplets").is_symlink()
    assert rows(other) == rows(run)


@pytest.mark.slow
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
            for name in ("rename", "replace", "unlink", "rmdir", "link", "symlink", "mkdir"):
                patch.setattr(os, name, dying(name))
            with suppress(Killed):
                graph.mine(config)
        deaths += left < 0
        graph.mine(config)
        assert (run.folder / "triplets/NOTES.md").read_text(encoding="utf-8") == "mine", kills
        assert len(rows(run)) == 12 * (1 + kills % 3)
        assert not old_folders(run)
    assert 10 < deaths < 40


@pytest.mark.slow
def test_the_summary_counts_the_rows_of_the_run_alone(run: Run) -> None:
    counted = [line for line in run.command("mine")[1].splitlines() if "Parquet file" in line]
    shutil.copy(run.files("triplets")[0], run.folder / "triplets/backup.parquet")
    assert counted
    assert [line for line in run.command("mine")[1].splitlines() if "Parquet file" in line] == counted
