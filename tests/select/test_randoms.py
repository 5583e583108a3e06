"""Random negatives of an anchor: the same whoever stands beside it, for corpora of every size."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import small_source
from hypothesis import given, settings
from real_runs import Run

from negpipe.config.file import load_config
from negpipe.review import finished
from negpipe.select import randoms, rules

Ints = npt.NDArray[np.int64]


def barred_by(lists: list[set[int]]) -> Callable[[Ints, Ints], npt.NDArray[np.bool_]]:
    return lambda units, rows: np.array(
        [[row in lists[unit] for row in own] for unit, own in zip(units.tolist(), rows.tolist(), strict=True)], np.bool_
    ).reshape(rows.shape)


def drawn(seed: int, anchors: list[int], wanted: list[int], corpus: int, lists: list[set[int]]) -> list[list[int]]:
    rows, offsets = randoms.draw(
        seed, np.array(anchors, np.uint64), np.array(wanted, np.int64), corpus, barred_by(lists)
    )
    return [rows[low:high].tolist() for low, high in pairwise(offsets)]


def sequence(seed: int, anchor: int, corpus: int) -> list[int]:
    """The oracle: draws with replacement, as many as there are rows, then every row in the order of its number."""
    numbers = rules.uniform(seed, np.array([anchor], np.uint64), np.arange(corpus, dtype=np.uint64)[None])[0].tolist()
    order = sorted(range(corpus), key=lambda row: numbers[row])
    return order if corpus <= 18 else [*(int(number * corpus) for number in numbers), *order]


@given(data=st.data(), corpus=st.integers(1, 90), seed=st.integers(0, 2**70))
@settings(max_examples=150, deadline=None)
def test_draws_depend_on_seed_anchor_and_corpus_alone(data: st.DataObject, corpus: int, seed: int) -> None:
    units = data.draw(st.integers(1, 5))
    anchors = data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=units, max_size=units))
    wanted = data.draw(st.lists(st.integers(0, 30), min_size=units, max_size=units))
    lists = data.draw(st.lists(st.sets(st.integers(0, corpus - 1)), min_size=units, max_size=units))
    together = drawn(seed, anchors, wanted, corpus, lists)
    for anchor, count, own, found in zip(anchors, wanted, lists, together, strict=True):
        expected = [row for row in dict.fromkeys(sequence(seed, anchor, corpus)) if row not in own]
        assert found == expected[:count]
        assert drawn(seed, [anchor], [count], corpus, [own]) == [found]


@pytest.mark.slow
@pytest.mark.parametrize("documents", [19, 24, 40, 61])
def test_what_explain_shows_is_what_the_rows_hold(tmp_path: Path, documents: int) -> None:
    small_source.build(tmp_path, small_source.documents(documents))
    tree = small_source.settings(tmp_path)
    judged = [row for row in small_source.judgments() if int(row[1][1:]) < documents]
    small_source.write_qrels(tmp_path / "data/qrels/train.tsv", judged)
    tree["mining"] = {"num_negatives": 9, "range_max": 9, "min_score": 0.3, "relative_margin": None}
    tree["mining"] |= {"on_shortage": "random", "max_depth": 0}
    run = Run(tree)
    run.mine()
    rows = pq.read_table(run.folder / "triplets", columns=["anchor_id", "negative_id", "source"]).to_pylist()
    random = {row["anchor_id"]: [r["negative_id"] for r in rows if r["anchor_id"] == row["anchor_id"]] for row in rows}
    assert len({sum(r["source"] == "random" for r in rows if r["anchor_id"] == name) for name in random}) > 1
    for name, negatives in random.items():
        explained = finished.explain_anchor(load_config(tree), name)
        taken = [candidate.id for unit in explained.units for candidate in unit.candidates if candidate.fate == "taken"]
        assert taken == negatives
