"""The ranking that models are judged by, against all scores at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from negpipe import ann
from negpipe.train import evaluation


@pytest.mark.parametrize("block", [1, 7, 4096])
def test_ranking_is_that_of_all_scores_whatever_the_blocks(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of small whole numbers, so that products are exact and many are equal."""
    monkeypatch.setattr(evaluation, "_BLOCK", block)
    draw = np.random.default_rng(2)
    parts = [draw.integers(-2, 3, size=(rows, 4)).astype(np.float32) for rows in (11, 30, 2)]
    for number, part in enumerate(parts):
        np.save(tmp_path / f"{number}.npy", part)
    corpus = ann.open_parts([tmp_path / f"{number}.npy" for number in range(3)])
    anchors = draw.integers(-2, 3, size=(9, 4)).astype(np.float32)
    scores = anchors @ np.concatenate(parts).T
    expected = [sorted(range(43), key=lambda row, own=own: (-own[row], row)) for own in scores]  # type: ignore[misc]
    rows, own = evaluation.ranking(anchors, corpus, 10)
    assert rows.tolist() == [places[:10] for places in expected]
    assert own.tolist() == np.take_along_axis(scores, rows, axis=1).tolist()
    beyond, _ = evaluation.ranking(anchors, corpus, 50)
    assert beyond[:, :43].tolist() == expected and (beyond[:, 43:] == -1).all()
