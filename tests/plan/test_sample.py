"""The sample on which ways to compute vectors are compared: positives are in it, and its negatives are a run's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from real_runs import Run

from negpipe.config.file import load_config
from negpipe.engine.stage import Context
from negpipe.engine.state import digests_of
from negpipe.plan.sample import Judge, Sample, draw
from negpipe.review.finished import current


@pytest.fixture
def read(undisturbed: Run) -> Iterator[Context]:
    """What plan sees once ingest has run."""
    config = load_config(undisturbed.config)
    with digests_of(config) as digests:
        yield current(config, digests, "plan", last="ingest")


def vectors_of(run: Run, kind: str) -> Any:
    return np.concatenate([np.load(path) for path in run.files("encode", kind)]).astype(np.float32)


def of_anchors(run: Run, sample: Sample, count: int) -> Any:
    ids = run.tables("anchors")["id"].to_pylist()
    return vectors_of(run, "anchors")[[ids.index(name) for name in sample.anchors["id"].to_pylist()[:count]]]


@pytest.mark.slow
@pytest.mark.parametrize("most", [0, 1, 4, 30, 300, 10**6])
def test_the_first_documents_hold_the_positives_of_the_first_anchors(
    undisturbed: Run, read: Context, most: int
) -> None:
    sample, documents = draw(read, most), undisturbed.tables("documents")
    assert len({*sample.rows.tolist()}) == len(sample.rows) == len(sample.texts) == min(most, documents.num_rows)
    assert sample.texts == documents["text"].take(sample.rows).to_pylist()
    assert len(sample.complete) == sample.anchors.num_rows <= most // 5
    assert (most >= 300) <= (sample.anchors.num_rows >= 50)
    for at, complete in enumerate(sample.complete.tolist()):
        own = sample.positives[sample.offsets[at] : sample.offsets[at + 1]].tolist()
        assert own == sample.anchors["positives"][at].as_py()[:4] and {*own} <= {*sample.rows[:complete].tolist()}
    again = draw(read, most)
    assert again.texts == sample.texts and again.anchors.equals(sample.anchors)


def test_what_is_mined_of_all_documents_is_what_the_run_mined(undisturbed: Run, read: Context) -> None:
    sample = draw(read, 10**6)
    count = sample.anchors.num_rows
    vectors, anchors = vectors_of(undisturbed, "corpus")[sample.rows], of_anchors(undisturbed, sample, count)
    outcome = Judge(read, sample).outcome(vectors, anchors)
    ids = undisturbed.tables("documents")["id"].to_pylist()
    assert outcome.negatives is not None
    found = {(sample.anchors["id"][unit].as_py(), ids[row]) for unit, row in outcome.negatives}
    mined = {
        (row["anchor_id"], row["negative_id"])
        for path in undisturbed.files("triplets")
        for row in pq.read_table(path).to_pylist()
        if row["anchor_id"] in {*sample.anchors["id"].to_pylist()}
    }
    assert found == mined and len(found) > count


def test_ndcg_is_that_of_the_documents_of_the_sample(undisturbed: Run, read: Context) -> None:
    sample = draw(read, 100)
    count = 10
    rows = sample.rows[: sample.complete[count - 1]]
    vectors, anchors = vectors_of(undisturbed, "corpus")[rows], of_anchors(undisturbed, sample, count)
    gains = []
    for at, anchor in enumerate(anchors):
        order = [int(rows[place]) for place in np.argsort(-(vectors @ anchor), kind="stable")[:10]]
        own = sample.positives[sample.offsets[at] : sample.offsets[at + 1]].tolist()
        ideal = sum(1 / math.log2(place + 2) for place in range(len(own)))
        gains.append(sum(1 / math.log2(place + 2) for place, row in enumerate(order) if row in own) / ideal)
    assert Judge(read, sample).outcome(vectors, anchors).ndcg == pytest.approx(np.mean(gains))
