"""Effects of an ablation's arms on a model, as far as held-out anchors show them.

Every anchor has one value per arm: the mean over its seeds. Arms are compared on the same anchors, in pairs, by a
permutation test of the mean difference (scipy.stats.permutation_test, two-sided), corrected for their number by Holm's
method (statsmodels). The interval of a difference is Student's. Seeds differ by more than anchors show: their spread is
reported with the means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from negpipe.train.comparison import METRICS, compare

Floats = npt.NDArray[np.float64]

LEVEL = 0.05
_RESAMPLES = 9999
_POWER = 0.8
_AT_ONCE = 2_000_000  # resampled numbers in memory at a time


@dataclass(frozen=True)
class Effect:
    """The effect of one arm.

    Attributes:
        arm: its name.
        seeds: number of trained models.
        means, spreads: by metric, over anchors and seeds; standard deviation of the seeds' means (None for one seed).
        difference, low, high: difference in the first metric from its base, with its 95 % interval.
        p_base, p_leader: corrected p-values of its difference from the base and the leader; None for the leader itself.
        seen: the smallest difference that these anchors would show in four of five cases, of this arm from the
            leader, of the leader from the base; by the normal distribution, at the first and strictest of Holm's steps.
    """

    arm: str
    seeds: int
    means: dict[str, float]
    spreads: dict[str, float | None]
    difference: float
    low: float
    high: float
    p_base: float
    p_leader: float | None
    seen: float

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def effects(arms: Mapping[str, Mapping[str, Floats]], bases: Mapping[str, Floats], *, seed: int) -> list[Effect]:
    """Compare arms with their bases, and with the arm with the highest mean of the first metric.

    Args:
        arms: by name and metric, (seeds, anchors) values.
        bases: by arm, (anchors,) values of the first metric before training.
        seed: seed of the permutations.

    Returns:
        the arms, best first; among equals, in the given order.
    """
    first = METRICS[0]
    own = {name: values[first].mean(axis=0) for name, values in arms.items()}
    ordered = sorted(own, key=lambda name: -own[name].mean())
    leader, *others = ordered
    p_base = dict(zip(ordered, _holm([_p(own[name], bases[name], seed) for name in ordered]), strict=True))
    p_leader = dict(zip(others, _holm([_p(own[leader], own[name], seed) for name in others]), strict=True))
    made = []
    for name in ordered:
        compared = compare(first, bases[name], own[name])
        differences = own[leader] - (bases[name] if name == leader else own[name])
        tests = len(ordered) if name == leader else len(others)
        made.append(
            Effect(
                name,
                len(arms[name][first]),
                {metric: float(arms[name][metric].mean()) for metric in METRICS},
                {metric: _spread(arms[name][metric]) for metric in METRICS},
                compared.after - compared.before,
                compared.low,
                compared.high,
                p_base[name],
                p_leader.get(name),
                _errors(tests) * float(differences.std(ddof=1)) / math.sqrt(len(differences)),
            )
        )
    return made


def verdict(made: Sequence[Effect]) -> str:
    """A sentence saying which arm wins, if the tests show it."""
    leader, *others = made
    first = METRICS[0]
    best = f"the best, '{leader.arm}', is at {leader.difference:+.4f} {first}"
    if leader.difference <= 0:
        return f"No arm is better than the base: {best}."
    if leader.p_base >= LEVEL:
        return f"No difference from the base found: {best}; the smallest that could be seen: {leader.seen:.4f}."
    alike = [one for one in others if one.p_leader is not None and one.p_leader >= LEVEL]
    if not alike:
        return f"'{leader.arm}' wins: {first} {leader.means[first]:.4f}, {leader.difference:+.4f} to the base."
    named = ", ".join(f"'{one.arm}'" for one in alike)
    seen = max(one.seen for one in alike)
    return (
        f"No difference found between '{leader.arm}' ({first} {leader.means[first]:.4f}) and {named}; the smallest that"
        f" could be seen: {seen:.4f}."
    )


def _errors(tests: int) -> float:
    """Standard errors that a difference must span to be found with power `_POWER` among so many tests."""
    from scipy import stats

    return float(stats.norm.ppf(1 - LEVEL / 2 / tests) + stats.norm.ppf(_POWER))


def _spread(values: Floats) -> float | None:
    return float(values.mean(axis=1).std(ddof=1)) if len(values) > 1 else None


def _p(one: Floats, other: Floats, seed: int) -> float:
    from scipy import stats

    if np.array_equal(one, other):
        return 1.0
    tested = stats.permutation_test(
        (one, other),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=max(1, _AT_ONCE // len(one)),
        rng=seed,
    )
    return float(tested.pvalue)


def _holm(values: Sequence[float]) -> list[float]:
    if not values:
        return []
    from statsmodels.stats.multitest import multipletests

    corrected: list[float] = multipletests(values, method="holm")[1].tolist()
    return corrected
