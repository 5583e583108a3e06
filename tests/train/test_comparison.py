"""The result's line, and who wins."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from negpipe.train.comparison import Comparison, compare, of_document


def test_the_interval_is_that_of_scipy_s_paired_test() -> None:
    draw = np.random.default_rng(0)
    before = draw.random(300)
    after = np.clip(before + draw.normal(0.02, 0.1, 300), 0, 1)
    found = compare("nDCG@10", before, after)
    interval = stats.ttest_rel(after, before).confidence_interval(0.95)
    expected = (before.mean(), after.mean(), interval.low, interval.high)
    assert (found.before, found.after, found.low, found.high) == pytest.approx(expected, rel=1e-9)
    assert found.anchors == 300 and found.verdict == ("WIN" if interval.low > 0 else "TIE")
    assert of_document(found.document()) == found


@pytest.mark.parametrize(
    ("shift", "verdict"), [([0.2, 0.3, 0.25], "WIN"), ([-0.2, -0.3, -0.25], "LOSS"), ([0.2, -0.3, 0.1], "TIE")]
)
def test_verdicts(shift: list[float], verdict: str) -> None:
    before = np.full(3, 0.5)
    assert compare("nDCG@10", before, before + np.array(shift)).verdict == verdict
    assert compare("nDCG@10", before, before).verdict == "TIE"


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (
            Comparison("nDCG@10", 0.6239, 0.6877, 0.041, 0.087, 300),
            "RESULT: WIN nDCG@10 .6877 against .6239 (+.0638, 95 % interval .041 to .087, paired over 300 queries)",
        ),
        (
            Comparison("nDCG@10", 1.0, 0.25, -1.5, -0.0049, 1200),
            "RESULT: LOSS nDCG@10 .2500 against 1.0000 (-.7500, 95 % interval -1.500 to -.005, paired over 1,200"
            " queries)",
        ),
    ],
)
def test_line(found: Comparison, line: str) -> None:
    assert found.line == line
