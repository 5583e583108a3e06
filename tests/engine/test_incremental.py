"""A corpus that changed: only the parts around the change are encoded again, and the bytes are those of a new run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small_source as small
from real_runs import encoding_here

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.plan import estimate

pytestmark = pytest.mark.guarantee(
    "the corpus grew or was edited",
    "the parts around the change are encoded again; the bytes of a new run",
)

DOCUMENTS = 600


def write(folder: Path, rows: list[dict[str, Any]]) -> None:
    small.write_rows(folder / "data/corpus.jsonl", rows)
    small.write_rows(folder / "data/queries.jsonl", small.queries())
    small.write_qrels(folder / "data/qrels/train.tsv", small.judgments())


@pytest.mark.slow
def test_a_changed_corpus_costs_the_parts_around_the_change(tmp_path: Path, tiny: Path) -> None:
    rows = small.documents(DOCUMENTS)
    write(tmp_path, rows)
    source = small.settings(tmp_path)
    source["data"]["part_rows"] = 16
    source["encoder"] = {"backend": "sentence-transformers", "model": str(tiny), "batch_size": 8}

    def encoded(**changes: str) -> tuple[set[str], set[str], Path]:
        """Names of all parts of the encode folder before and after, and the run's folder."""
        folder = Path(changes.get("run_dir", source["run_dir"]))
        before = {path.name for path in folder.glob("encode/*")}
        with encoding_here():
            graph.mine(load_config(source, [f"{name}={value}" for name, value in changes.items()]))
        return before, {path.name for path in folder.glob("encode/*")}, folder

    _, first, _ = encoded()
    assert len(first) > 25

    rows[300:303] = [{"_id": f"edited{i}", "title": "", "text": f"edited {i}"} for i in range(3)]
    rows[400:400] = [{"_id": f"put{i}", "title": "", "text": f"put in {i}"} for i in range(4)]
    del rows[501:503]
    rows += [{"_id": f"new{i}", "title": "", "text": f"appended {i}"} for i in range(6)]
    write(tmp_path, rows)
    config = load_config(source)
    graph.mine(config, only="ingest")
    (planned,) = [step for step in estimate.plan(config).steps if step.stage == "encode"]
    before, after, folder = encoded()
    assert 4 <= len(after - before) <= 14
    assert planned.todo == len(after - before)

    _, _, alone = encoded(run_dir=str(tmp_path / "alone"))
    fresh = small.output(alone)
    grown = {name: digest for name, digest in small.output(folder).items() if name in fresh}
    assert grown == fresh
