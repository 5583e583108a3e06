"""A disk that is full: every writer names the place and what is free there, and what it needs where it can know."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import small_source as small
from as_root import needs_a_namespace, needs_root, run_in_a_namespace
from real_runs import STAGES

from negpipe.errors import StorageError
from negpipe.review.report import page
from negpipe.rows.exports.files import published
from negpipe.store.files import publish

pytestmark = pytest.mark.guarantee("no space, quota, read-only, no permission")


@needs_a_namespace
def test_as_root_of_a_namespace() -> None:
    run_in_a_namespace(__file__)


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """Another folder with the same complete run."""
    small.build(tmp_path)
    shutil.copytree(finished / "run", tmp_path / "run", symlinks=True)
    return tmp_path


@contextmanager
def full(folder: Path, pages: int = 0) -> Iterator[None]:
    """A file system of its own in a folder, with room for so many pages of 4,096 bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    # The least one has a page.
    command = ["mount", "-t", "tmpfs", "-o", f"size={4 * max(1, pages)}k", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("nothing can be mounted here")
    try:
        if not pages:
            (folder / "ballast").write_bytes(bytes(4096))
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def parts(folder: Path, stage: str, *kinds: str) -> list[dict[str, Any]]:
    manifest = json.loads((folder / f"run/.negpipe/{stage}/manifest.json").read_text(encoding="utf-8"))
    return [part for part in manifest["parts"] if not kinds or part["kind"] in kinds]


def forget_from(folder: Path, stage: str) -> None:
    """Take the run back to where a stage has not begun."""
    for later in STAGES[STAGES.index(stage) :]:
        for path in (later, f".negpipe/{later}", *(("ledger", "deeper") if later == "triplets" else ())):
            shutil.rmtree(folder / "run" / path, ignore_errors=True)


def refused(outcome: small.Outcome, place: Path, needed: int | None) -> None:
    """One error, of the kind that schedulers tell apart, with the place, the bytes needed, and those that are free."""
    entry = json.loads(outcome.err.splitlines()[-1])
    assert (outcome.code, entry["error"]) == (1, "storage"), outcome.err
    need = "" if needed is None else f"{needed:,} bytes are needed. "
    wanted = (
        f"cannot write {place}: no space left on the device. {need}0 bytes are free there. No finished work was lost"
    )
    assert wanted in entry["message"]


AS_JSON = ("--log-format", "json")


@pytest.mark.slow
@needs_root
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_finds_no_room(stage: str, copied: Path) -> None:
    config = copied / "config.yaml"
    before = small.output(copied / "run")
    # What is known before to find no room is not begun: there is some, in pages of 4096 bytes, one for a small file.
    pages = {"encode": 1, "index": 1, "search": 2}.get(stage, 0)
    fails = parts(copied, stage)[1 if stage == "encode" else 0]
    # Parquet is compressed: how large it gets is known when it is written.
    needed = {"ingest": fails["files"][0]["bytes"], "encode": fails["rows"] * small.DIMENSION * 2}.get(stage)
    place = copied / "run" / ("ledger" if stage == "triplets" else stage)
    forget_from(copied, stage)
    with full(place, pages=pages):
        refused(small.run("mine", config, *AS_JSON), place, needed)
    assert small.run("mine", config).code == 0
    assert small.output(copied / "run") == before


@needs_root
def test_a_flat_index_that_finds_no_room(copied: Path) -> None:
    """The id maps fit, the index does not."""
    config, place = copied / "config.yaml", copied / "run/index"
    ids, (flat,) = parts(copied, "index", "ids"), parts(copied, "index", "flat")
    assert all(file["bytes"] <= 4096 for part in ids for file in part["files"])
    size = small.DOCUMENTS * small.DIMENSION * 4
    assert size < flat["files"][0]["bytes"] < size + 100  # and a header
    forget_from(copied, "index")
    with full(place, pages=len(ids)):
        refused(small.run("mine", config, *AS_JSON), place, size)
        assert len([*place.iterdir()]) == len(ids)


@needs_root
def test_a_run_directory_without_room_for_a_flat_index(copied: Path) -> None:
    """Said before the stage begins, with the way out."""
    config, run_dir = copied / "config.yaml", copied / "run"
    run_dir.rename(copied / "made")
    with full(run_dir, pages=200):
        for name in ("ingest", "encode", ".negpipe"):
            shutil.copytree(copied / "made" / name, run_dir / name)
        for stage in STAGES[2:]:
            shutil.rmtree(run_dir / ".negpipe" / stage)
        room = os.statvfs(run_dir).f_bavail - 1  # who holds the lock takes a page
        (run_dir / "ballast").write_bytes(bytes(room * 4096))
        outcome = small.run("mine", config, *AS_JSON)
        assert not (run_dir / "index").exists()
    entry = json.loads(outcome.err.splitlines()[-1])
    assert (outcome.code, entry["error"]) == (1, "storage")
    size = small.DOCUMENTS * small.DIMENSION * 4
    assert f"index.kind flat writes {size:,} bytes in {run_dir}, 0 bytes are free there" in entry["message"]


@needs_root
def test_records_that_find_no_room(copied: Path) -> None:
    """The record of a part, and the manifest of a stage: JSON, whose size is known."""
    config, books = copied / "config.yaml", copied / "run/.negpipe/search"
    forget_from(copied, "search")
    with full(books):
        outcome = small.run("mine", config, *AS_JSON)
        message = json.loads(outcome.err.splitlines()[-1])["message"]
        needed = int(message.partition(" bytes are needed")[0].rpartition(" ")[2].replace(",", ""))
        refused(outcome, books, needed)
    assert small.run("mine", config).code == 0
    (record,) = [path.stat().st_size for path in books.glob("*.json") if path.name != "manifest.json"][:1]
    assert needed == pytest.approx(record, abs=20)  # seconds and process ids differ in length


@needs_root
def test_an_export_that_finds_no_room(copied: Path, tmp_path: Path) -> None:
    out = tmp_path / "full/train.jsonl"
    with full(out.parent):
        command = ["export", copied / "config.yaml", "--to", "flagembedding", "--out", out, *AS_JSON]
        refused(small.run(*command), out, None)
        assert [path.name for path in out.parent.iterdir()] == ["ballast"]


@needs_root
def test_what_is_compressed_tells_what_it_took_so_far(tmp_path: Path) -> None:
    place = tmp_path / "full"

    def write(file: BinaryIO) -> None:
        for _ in range(9):
            file.write(bytes(1024))
            file.flush()

    message = re.escape(
        f"cannot write {place}: no space left on the device. More than 8,192 bytes are needed. 8,192 bytes"
    )
    with full(place, pages=2), pytest.raises(StorageError, match=message):
        publish(place, lambda digest: digest, write)
    message = message.replace("full:", "full/out:")
    with full(place, pages=2), pytest.raises(StorageError, match=message):  # noqa: SIM117
        with published(place / "out", single=True, force=False) as folder, (folder / "rows").open("wb") as file:
            write(file)


@needs_root
def test_a_report_that_finds_no_room(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    render, sizes = page.render, list[int]()

    def measured(made: Any) -> str:
        text = render(made)
        sizes.append(len(text.encode()))
        return text

    monkeypatch.setattr(page, "render", measured)
    out = tmp_path / "full/page.html"
    with full(out.parent):
        outcome = small.run("report", copied / "config.yaml", "--out", out, *AS_JSON)
        refused(outcome, out.parent, sizes[0])
        assert [path.name for path in out.parent.iterdir()] == ["ballast"]
