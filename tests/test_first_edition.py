"""A run directory of the first edition (commit 51acabb) is opened: its vectors are used, its rows are replaced.

`first_edition.tar.gz` holds a source of `small_source`, a model of `tiny_model`, the run that the commit made
of them with the config below, and a file of the user's beside the rows.
"""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.store.files import file_digest


def unpacked(folder: Path) -> dict[str, Any]:
    with tarfile.open(Path(__file__).with_name("first_edition.tar.gz")) as archive:
        archive.extractall(folder, filter="data")
    home = folder / "first_edition"
    return {
        "run_dir": str(home / "run"),
        "data": {"path": str(home / "data"), "part_rows": 8},
        "encoder": {"backend": "sentence-transformers", "model": str(home / "model"), "pooling": "mean"},
        "mining": {"range_max": 10, "relative_margin": None},
        "output": {"report": False},
        "executor": {"kind": "local"},
        "resources": {"cpus": 1},
    }


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((run_dir / "triplets").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def near(row: dict[str, Any]) -> dict[str, Any]:
    """A row that equals those with the same scores but for rounding."""
    return {name: pytest.approx(value, abs=1e-6) if isinstance(value, float) else value for name, value in row.items()}


@pytest.mark.slow
def test_its_vectors_are_used_and_its_rows_are_made_again(tmp_path: Path) -> None:
    config = unpacked(tmp_path)
    run_dir = Path(config["run_dir"])
    vectors = {path: (path.stat().st_ino, file_digest(path)) for path in (run_dir / "encode").iterdir()}
    before = rows(run_dir)
    result = graph.mine(load_config(config, ["output.grades=true"]))
    # An executor that is asked for a task would have loaded the model, and its log would say so.
    assert not (run_dir / ".negpipe/logs").exists() or not [*(run_dir / ".negpipe/logs").glob("encode*")]
    assert {path: (path.stat().st_ino, file_digest(path)) for path in (run_dir / "encode").iterdir()} == vectors
    after = rows(run_dir)
    assert "triplets" in result.ran and after != before
    # Scores may differ in their last digit: the archive was made on another kind of CPU.
    assert [{name: row[name] for name in before[0]} for row in after] == [near(row) for row in before]
    assert (run_dir / "triplets/NOTES.md").read_text(encoding="utf-8") == "a user's own\n"
    assert {state.state for state in graph.status(load_config(config, ["output.grades=true"]))} == {"current"}
