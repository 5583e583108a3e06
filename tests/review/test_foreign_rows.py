"""Rows of other programs, whose passages are objects, messages or ids, are audited like plain ones."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import small_source as small
from real_runs import Run
from written_sources import (
    dpr,
    flagembedding,
    labeled,
    made,
    ms_swift,
    nemo,
    pylate,
    tevatron,
    tevatron_ids,
    tuples,
)

from negpipe.config.file import load_config
from negpipe.errors import InputError
from negpipe.review import audit, finished
from negpipe.rows import exports

pytestmark = pytest.mark.cases

MANY = ["mining.num_negatives=30", "mining.range_max=40"]


@pytest.fixture(scope="module")
def mined(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Some of the negatives are nearly positives."""
    folder = tmp_path_factory.mktemp("mined")
    small.build(folder)
    run = Run(small.settings(folder))
    run.mine(*MANY)
    return run


def findings(path: Path, **columns: str) -> dict[str, int]:
    found = audit.audit(path, audit.AuditOptions(columns=columns))
    counted = {one.check: one.count for one in found.findings if one.of}
    return counted | {name: getattr(found, name) for name in ("anchors", "negatives")}


def exported(run: Run, to: str, out: Path) -> Path:
    finished.export(load_config(run.config, MANY), exports.ExportOptions(to=to, out=out))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("to", ["tevatron", "tevatron-passages", "ms-swift", "nemo", "pylate"])
def test_other_layouts_give_the_same_findings(to: str, mined: Run, tmp_path: Path) -> None:
    plain = findings(exported(mined, "flagembedding", tmp_path / "plain") / "train.jsonl")
    out = exported(mined, to, tmp_path / "out")
    found = findings(out / "train.jsonl" if to in ("tevatron-passages", "ms-swift") else out)
    assert plain["near_duplicate"] > 0
    same = {*found} & {*plain}  # these hold no scores, ms-swift no ids
    assert {"near_duplicate", "positive_text", "anchors", "negatives", "shortage", "hub"} <= same
    assert {name: found[name] for name in same} == {name: plain[name] for name in same}


WITH_NEGATIVES = (tuples, labeled, flagembedding, tevatron, tevatron_ids, dpr, ms_swift, nemo, pylate)


@pytest.mark.slow
@pytest.mark.parametrize("layout", WITH_NEGATIVES, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("seed", range(3))
def test_every_layout_with_negatives_is_read(layout: Any, seed: int, tmp_path: Path) -> None:
    """In any kind of file that holds it, packed or not, in UTF-8 or UTF-16."""
    draw = random.Random(f"{layout.__name__} {seed}")
    source = made(draw)
    path = Path(layout(draw, source, tmp_path / "in").settings["path"])
    if layout in (tevatron_ids, pylate) and [*path.parent.rglob("*.tsv")]:
        pytest.skip("of a table with quotes that mean nothing a config has to say so")
    found = audit.audit(tmp_path / "in" if layout is tevatron_ids else path, audit.AuditOptions(columns={}))
    times = [len(positives) if layout is tuples else 1 for positives, _ in source.judged.values()]
    assert found.anchors == len(source.judged)
    assert found.positives == sum(len(positives) for positives, _ in source.judged.values())
    assert found.negatives == sum(n * len(some) for n, (_, some) in zip(times, source.judged.values(), strict=True))
    assert not [one.check for one in found.findings if one.check.startswith("positive_") and one.count]


def test_a_dot_leads_into_objects(mined: Run, tmp_path: Path) -> None:
    file = exported(mined, "tevatron-passages", tmp_path / "out") / "train.jsonl"
    columns = {"anchor": "query", "anchor_id": "query_id"}
    for side in ("positive", "negative"):
        columns |= {side: f"{side}_passages.text", f"{side}_id": f"{side}_passages.docid"}
        columns |= {f"{side}_score": f"{side}_passages.score"}
    plain = findings(exported(mined, "flagembedding", tmp_path / "plain") / "train.jsonl")
    assert findings(file, **columns) == plain
    with pytest.raises(InputError) as caught:
        findings(file, **columns | {"negative": "negative_passages.words"})
    assert caught.value.field == "--columns negative"


def test_a_bad_row_is_named(tmp_path: Path) -> None:
    def passage(text: Any) -> list[dict[str, Any]]:
        return [{"docid": str(text), "text": text}]

    rows = [
        {"query_id": str(n), "query": f"q{n}", "positive_passages": passage("p"), "negative_passages": passage(text)}
        for n, text in enumerate(["fine", 5, "good"])
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError) as caught:
        findings(path)
    assert (caught.value.file, caught.value.row) == (str(path), 2)
    ids = tmp_path / "nemo"
    (ids / "corpus").mkdir(parents=True)
    (ids / "corpus" / "docs.jsonl").write_text('{"id": "d", "text": "x"}\n')
    question = {"question_id": "1", "question": "q", "pos_doc": [{"id": "d"}], "neg_doc": [{"id": "lost"}]}
    (ids / "train.json").write_text(json.dumps({"corpus": [{"path": "corpus"}], "data": [question]}))
    with pytest.raises(InputError) as caught:
        findings(ids)
    assert caught.value.row == 0 and "'lost'" in str(caught.value)
