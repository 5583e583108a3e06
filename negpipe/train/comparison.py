"""Compares two models on the same anchors.

The interval is Student's, for the mean of the anchors' differences: paired, two-sided, 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Verdict = Literal["WIN", "TIE", "LOSS"]

METRICS = ("nDCG@10", "MRR@10", "Recall@10", "Recall@100")
"""The metrics that models are judged by; the first decides."""
_LEVEL = 0.95


@dataclass(frozen=True)
class Comparison:
    """Means of a metric before and after, and the interval of their difference; `anchors` is the number compared."""

    metric: str
    before: float
    after: float
    low: float
    high: float
    anchors: int

    @property
    def verdict(self) -> Verdict:
        """Whether the interval is above 0, around it, or below."""
        return "WIN" if self.low > 0 else "LOSS" if self.high < 0 else "TIE"

    @property
    def line(self) -> str:
        """The result line, for users and scripts."""
        return (
            f"RESULT: {self.verdict} {self.metric} {_short(self.after, 4)} against {_short(self.before, 4)}"
            f" ({'-' if self.after < self.before else '+'}{_short(abs(self.after - self.before), 4)},"
            f" 95 % interval {_short(self.low, 3)} to {_short(self.high, 3)}, paired over {self.anchors:,} queries)"
        )

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"verdict": self.verdict}


def of_document(document: Mapping[str, Any]) -> Comparison:
    """The inverse of `Comparison.document`."""
    return Comparison(**{field.name: document[field.name] for field in fields(Comparison)})


def compare(metric: str, before: Floats, after: Floats) -> Comparison:
    """Compare the values of a metric on the same anchors, at least two."""
    from scipy import stats

    differences = after - before
    mean, error = float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(len(differences)))
    reach = float(stats.t.ppf((1 + _LEVEL) / 2, len(differences) - 1)) * error
    return Comparison(metric, float(before.mean()), float(after.mean()), mean - reach, mean + reach, len(differences))


def _short(value: float, digits: int) -> str:
    """A number without the 0 before its point."""
    return f"{value:.{digits}f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.{digits}f}"
