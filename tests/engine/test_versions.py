"""Parts of other versions of libraries than are installed: told of, and made again when that is asked for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import small_source as small
from real_runs import STAGES, Run
from torture import blow

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.engine.manifest import Books

pytestmark = pytest.mark.guarantee(
    "libraries were upgraded",
    "parts of two versions are warned about by `status` and every run; `--rebuild` makes the older ones again",
    section="input",
)

OLDER = "0.0.1"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    small.build(tmp_path)
    run = Run(small.settings(tmp_path))
    run.mine()
    return run


def age(run: Run, stage: str, library: str, every: int = 1) -> int:
    """Let some of a stage's parts be of an older version, in records as they would have been written."""
    books = Books(run.folder, stage)
    manifest = books.manifest()
    assert manifest is not None
    parts = [
        part.model_copy(
            update={
                "provenance": part.provenance
                | ({"libraries": {**part.provenance["libraries"], library: OLDER}} if number % every == 0 else {})
            }
        )
        for number, part in enumerate(manifest.parts)
    ]
    for part in parts:
        record = books.record(part.key)
        assert record is not None
        books.write_part(record.model_copy(update={"provenance": part.provenance}))
    books.write_manifest(manifest.model_copy(update={"parts": tuple(parts)}), books.content())
    return len(range(0, len(parts), every))


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "--rebuild" in record.message]


def rebuilt(run: Run, **options: Any) -> graph.Result:
    return graph.mine(load_config(run.config, ["executor.kind=inline"]), rebuild=True, **options)


def test_a_run_of_one_version_is_not_warned_about(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run.mine("mining.num_negatives=2")
        assert rebuilt(run).ran == ("triplets",)
    assert not warned(caplog)
    for stage in STAGES:
        assert all(part["provenance"]["libraries"] for part in run.parts(stage))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "library"),
    [
        ("ingest", "pyarrow"),
        ("encode", "numpy"),
        ("index", "faiss-cpu"),
        ("search", "faiss-cpu"),
        ("triplets", "numpy"),
    ],
)
def test_parts_of_two_versions_are_told_of_and_made_again(
    run: Run, caplog: pytest.LogCaptureFixture, stage: str, library: str
) -> None:
    whole, inodes = run.content(), run.inodes()
    count = age(run, stage, library, every=2)
    told = f"{stage}: {count} of {len(run.parts(stage))} parts were made with {library} {OLDER}"
    path = run.folder.with_name("config.yaml")
    shown = small.run("status", path).out.replace("\n", " ")
    assert told in shown and "--rebuild" in shown
    with caplog.at_level(logging.WARNING):
        assert run.mine().ran == ()
    assert [message.startswith(told) for message in warned(caplog)] == [True]

    again = rebuilt(run)
    assert again.ran[0] == stage  # equal bytes: what comes later stays
    assert set(again.ran) <= {stage, "triplets"}
    assert run.content() == whole
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert run.mine().ran == ()
    assert not warned(caplog)
    assert "--rebuild" not in small.run("status", path).out
    # No more is made again than was of the older version.
    changed = [
        name for name, inode in run.inodes().items() if inodes.get(name) != inode and name.startswith(f"{stage}/")
    ]
    assert len(changed) == count or stage in ("ingest", "triplets")


def test_a_stage_alone_is_rebuilt(run: Run) -> None:
    age(run, "encode", "numpy"), age(run, "search", "numpy")
    assert rebuilt(run, only="search").ran == ("search",)
    states = run.states()
    assert states["encode"].versions and not states["search"].versions


def test_a_part_that_does_not_say_its_versions_is_believed(run: Run) -> None:
    books = Books(run.folder, "encode")
    manifest = books.manifest()
    assert manifest is not None
    silent = tuple(part.model_copy(update={"provenance": {"pid": 1}}) for part in manifest.parts)
    books.write_manifest(manifest.model_copy(update={"parts": silent}), books.content())
    assert run.states()["encode"].versions is None


def test_a_rebuild_that_is_killed_goes_on_where_it_was(run: Run) -> None:
    whole = run.content()
    total = age(run, "encode", "numpy")
    code, _, _ = run.command(
        "mine", flags=["--rebuild"], environment=blow(stage="encode", what="part", boundary="after rename", nth=3)
    )
    assert code != 0
    left = [part for part in Books(run.folder, "encode").parts() if part.provenance["libraries"]["numpy"] == OLDER]
    assert not left and len([*Books(run.folder, "encode").parts()]) < total
    made = {path: path.stat().st_ino for path in run.folder.glob("encode/*.npy")}
    rebuilt(run)
    assert run.content() == whole
    assert not any(state.versions for state in run.states().values())
    assert sum(made.get(path) == path.stat().st_ino for path in run.folder.glob("encode/*.npy")) >= 2
