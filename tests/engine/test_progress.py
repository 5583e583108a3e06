"""What a person sees while a model computes: rows, texts and tokens a second, the time that is left."""

from __future__ import annotations

import io
import logging
import re
import time
from itertools import pairwise
from pathlib import Path

import pytest
import small_source as small
import yaml
from ray_nodes import ACTOR, Nodes
from real_runs import Run
from rich.console import Console

from negpipe.ann import exact
from negpipe.cli import console
from negpipe.engine.manifest import Books
from negpipe.review import progress

pytestmark = pytest.mark.slow


def encoded(folder: Path, tiny: Path) -> small.Outcome:
    small.build(folder)
    settings = small.settings(folder)
    settings["encoder"] = {"model": str(tiny), "batch_size": 4}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    assert small.run("ingest", folder / "config.yaml").code == 0
    return small.run("encode", folder / "config.yaml")


def test_lines_state_texts_and_tokens_a_second_and_the_time_left(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    outcome = encoded(tmp_path, tiny)
    assert outcome.code == 0, outcome.err
    line = re.compile(
        r"encode: ([\d,]+) of ([\d,]+) texts, about \d+ s left \(([\d,]+) texts/s, ([\d,]+) tokens/s\)$", re.MULTILINE
    )
    found = [tuple(int(number.replace(",", "")) for number in match) for match in line.findall(outcome.err)]
    assert [done for done, *_ in found] == sorted({done for done, *_ in found})
    assert {of for _, of, *_ in found} == {found[-1][0]} == {small.DOCUMENTS + small.QUERIES}
    # Both rates are of the same seconds: tokens for each text are what the stage counted in all.
    stats = Books(tmp_path / "run", "encode").manifest().stats  # type: ignore[union-attr]
    own = [tokens / texts for _, _, texts, tokens in found]
    assert min(own) <= stats["tokens"] / stats["texts"] <= max(own)


def test_a_terminal_shows_a_bar_with_the_same(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=terminal, force_terminal=True, width=160))
    assert encoded(tmp_path, tiny).code == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert re.search(r"encode .* \d+/52 \d:\d\d:\d\d [\d,]+ texts/s, [\d,]+ tokens/s", shown)


def test_a_deeper_search_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    monkeypatch.setattr(exact, "_BLOCK_ROWS", 10)
    scarce = ("search.depth=10", "mining.max_score=-9", "mining.max_depth=40", "data.part_rows=99", "output.min_rows=0")
    overrides = [part for setting in scarce for part in ("--set", setting)]
    outcome = small.run("mine", small.build(tmp_path), *overrides)
    assert outcome.code == 0, outcome.err
    assert "no row could be written; candidates dropped: max score" in " ".join(outcome.err.split())
    about = r"12 anchors lack negatives, searching to depth (\d+): (\d+)%"
    said = re.findall(rf"triplets: 0 of 12 anchors \({about}\)", outcome.err)
    assert said == [(depth, share) for depth in ("20", "40") for share in ("25", "50", "75", "100")]


def test_what_passes_before_the_first_rows_is_not_counted_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A model is loaded, or an array waits in a queue and says so."""
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    lines = console.reporter("plain")
    with caplog.at_level(logging.INFO):
        lines.begin("encode", 1000, 0, "texts")
        lines.advance(0, "2 of 2 array tasks waiting")
        time.sleep(1)
        for _ in range(2):
            lines.advance(10, "")
        lines.end()
    assert [record.getMessage() for record in caplog.records] == [
        "encode: 0 of 1,000 texts (2 of 2 array tasks waiting)",
        "encode: 10 of 1,000 texts",
        "encode: 20 of 1,000 texts, about 0 s left",
    ]


def test_a_job_that_finishes_nothing_says_that_it_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A large source is read, or an index is trained: nothing is finished for a long time."""
    monkeypatch.setattr(progress, "LOG_SECONDS", 1)
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.1)
    lines = console.reporter("plain")
    with caplog.at_level(logging.INFO):
        lines.begin("ingest", 0, 0, "texts")
        time.sleep(2.8)
        lines.end()
        time.sleep(1.5)
    assert [record.getMessage() for record in caplog.records] == [
        "ingest: 0 texts after 1 s",
        "ingest: 0 texts after 2 s",
    ]


def test_a_line_that_is_due_between_two_batches_says_the_time_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 1)
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.1)
    lines = console.reporter("plain")
    with caplog.at_level(logging.INFO):
        lines.begin("encode", 1000, 0, "texts")
        for _ in range(2):
            lines.advance(10, "20 texts/s")
            time.sleep(0.4)
        time.sleep(1.9)
        lines.end()
    first, second = (record.getMessage() for record in caplog.records)
    assert re.fullmatch(r"encode: 20 of 1,000 texts, about \d+ (s|min) left \(20 texts/s\)", first), first
    assert second == "encode: 20 of 1,000 texts after 2 s"


# --- wherever tasks run -----------------------------------------------------------------------------------

LINE = re.compile(r"(\w+): ([\d,]+) of ([\d,]+) (?:texts|entries|anchors)(?: about| after| \(|$)", re.MULTILINE)


def counted(run: Run, *overrides: str) -> str:
    """The log of a run. Its lines count each stage from 0 to its total, by the rows of each part once."""
    options = [part for override in overrides for part in ("--set", override)]
    outcome = small.run("mine", run.file(), *options)
    assert outcome.code == 0, outcome.err
    counts: dict[tuple[str, int], list[int]] = {}
    for stage, done, total in LINE.findall(outcome.err.replace(",", "")):
        counts.setdefault((stage, int(total)), [0]).append(int(done))
    assert [stage for stage, _ in counts] == ["encode", "index", "search", "triplets"]
    for (stage, total), of_stage in counts.items():
        parts = [part["rows"] for part in run.parts("search" if stage == "triplets" else stage)]  # both are of anchors
        steps = [after - before for before, after in pairwise(of_stage) if after != before]
        assert sorted(steps) == sorted(parts) and sum(parts) == total, stage
    return outcome.err


@pytest.mark.guarantee(
    "tasks run on Ray or Slurm",
    "progress counts the rows of each part once, also of one that is tried again, up to the total, as on one machine",
)
@pytest.mark.cluster
def test_rows_are_counted_on_a_cluster_as_on_one_machine(
    whole: Run, tmp_path: Path, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    counted(whole.at(tmp_path / "usual"), "executor.workers=2", "resources.cpus=2")

    nodes.fill(2)
    nodes.control.tell(search={"first": True, "kills": "process"})
    log = counted(whole.at(tmp_path / "ray"), *ACTOR, nodes.address, "executor.workers=2")
    assert log.count("retrying its task") == 1

    arrays = ("executor.kind=slurm", "executor.slurm.cluster=local", "executor.slurm.shards=2")
    assert "texts (2 of 2 array tasks running)" in counted(whole.at(tmp_path / "slurm"), *arrays)
