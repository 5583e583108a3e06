"""`negpipe train`, killed in the middle of training and of judging: the next run ends with the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from real_runs import Run, kill, wait

pytestmark = pytest.mark.slow

STEPS = ["train.steps=40", "train.checkpoint_steps=5", "executor.kind=local"]
KINDS = {"retriever": STEPS, "reranker": [*STEPS, "train.kind=reranker", "output.format=labeled-list"]}


def content(run: Run) -> dict[str, Any]:
    return {
        f"{part['kind']} {file['role']}": file["digest"]
        for part in run.parts("train")
        for file in part["files"]
        if not file["aside"]
    }


@pytest.fixture(scope="module", params=[*KINDS])
def whole(request: pytest.FixtureRequest, mined: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = mined.copied(tmp_path_factory.mktemp("whole") / "run")
    code, out, log = run.command("train", *KINDS[request.param])
    assert code == 0, log
    assert out.rstrip().splitlines()[-1].startswith("RESULT: ")
    assert "faiss" not in (run.folder / ".negpipe/logs/train-0.log").read_text(encoding="utf-8")  # torch is there
    return run


def begun(run: Run, pattern: str) -> Callable[[], bool]:
    return lambda: any((run.folder / ".negpipe/train").glob(f"begun-*/{pattern}"))


@pytest.mark.parametrize(
    ("pattern", "resumed"),
    [("*.npy", False), ("checkpoint-10/whole", True), ("begun/*.npy", False)],
    ids=["while the base is judged", "while it trains", "while it is judged"],
)
def test_killed(pattern: str, resumed: bool, whole: Run, mined: Run, tmp_path: Path) -> None:
    run, overrides = mined.copied(tmp_path / "run"), KINDS[whole.manifest("train")["settings"]["train.kind"]]
    process = run.start("train", *overrides)
    try:
        assert wait(process, begun(run, pattern)), run.log.read_text(encoding="utf-8")
    finally:
        kill(process)
    assert not run.complete("train")
    code, _, log = run.command("train", *overrides)
    assert code == 0, log
    assert content(run) == content(whole)
    (model,) = run.parts("train", "model")
    assert (model["provenance"]["resumed_at_step"] >= 10) is resumed


def test_killed_while_it_is_judged_with_parts_on_another_disk(mined: Run, tmp_path: Path, other_disk: Path) -> None:
    """There the model is no hard link in the run directory, and a link that leads out of it would be refused."""
    run = Run({**mined.config, "run_dir": str(tmp_path / "run"), "store": str(other_disk)})
    process = run.start("train")
    try:
        assert wait(process, begun(run, "begun/*.npy")), run.log.read_text(encoding="utf-8")
    finally:
        kill(process)
    code, _, log = run.command("train")
    assert code == 0, log
