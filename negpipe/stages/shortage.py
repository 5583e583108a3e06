"""Why there are fewer negatives than wanted, and what to do about it, from the statistics of triplets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from negpipe.config.schema import Mining
from negpipe.data import moments
from negpipe.engine.manifest import Part
from negpipe.select import rules
from negpipe.select.filters import CODES, HELPS
from negpipe.stages import defects


def is_short(stats: Mapping[str, Any]) -> bool:
    """Whether there are no rows, or less than half of the requested negatives."""
    return not stats["rows"] or negatives_of(stats) < stats.get("wanted", 0) / 2


def negatives_of(stats: Mapping[str, Any]) -> int:
    """The total number: mined, random and preferred."""
    return sum(stats.get(name, 0) for name in ("negatives", "random_negatives", "preferred_negatives"))


def spread(mining: Mining, parts: list[Part], fates: Mapping[str, int]) -> dict[str, Any]:
    """Scores of a sample of candidates and positives, if margins dropped most: one may be wider than scores differ."""
    if not fates or max(fates, key=lambda name: fates[name]) not in ("relative_margin", "absolute_margin"):
        return {}
    known = [part.meta["sampled"] for part in parts if "sampled" in part.meta]  # parts of older versions lack it
    scores = {
        side: moments.summary(moments.merge([one[side] for one in known])) for side in ("candidates", "positives")
    }
    if not all(one["count"] for one in scores.values()):
        return {}
    positive = scores["positives"]["mean"]
    limits = positive - abs(positive) * (mining.relative_margin or 0), positive - (mining.absolute_margin or 0)
    return {"spread": scores | {"limit": min(limits)}}


def warning(stats: Mapping[str, Any]) -> str:
    """That there are few rows, why, and what to do."""
    made, wanted = negatives_of(stats), stats.get("wanted", 0)
    what = f"{made:,} of {wanted:,} requested negatives" if stats["rows"] else "no row could be written"
    return f"{what}; {reasons(stats)}"


def reasons(stats: Mapping[str, Any]) -> str:
    """How many candidates were dropped for each reason, what is wrong with vectors or margins, and what to do."""
    dropped = ", ".join(f"{reason.replace('_', ' ')} {count:,}" for reason, count in stats["drops"].items()) or "none"
    return f"candidates dropped: {dropped}{_problems(stats)}. {advice(stats)}"


def advice(stats: Mapping[str, Any]) -> str:
    """How to get more rows: vectors that represent complete texts, and a weaker form of the rule that dropped most."""
    most = next((reason for reason in stats["drops"] if reason != "not_sampled"), "")
    if not stats["rows"]:  # the rule that let the smallest share pass
        left, shares = stats["candidates"], {}
        for reason in sorted(stats["drops"], key=CODES.__getitem__):
            count = stats["drops"][reason]
            shares[reason] = count / max(1, left), count
            left -= count if CODES[reason] >= rules.FILTERED else 0
        most = max((reason for reason in shares if reason in HELPS), key=shares.__getitem__, default=most)
    remedies = [one.remedy.capitalize() for one in _causes(stats)]
    return ". ".join(
        [*remedies, HELPS.get(most, "Set a larger search.depth; beyond the number of documents it adds nothing")]
    )


def _causes(stats: Mapping[str, Any]) -> list[defects.Defect]:
    """Why every rule drops more than it should: vectors that represent less than their texts."""
    return [one for one in defects.of(stats.get("vectors", {})) if one.many]


def _problems(stats: Mapping[str, Any]) -> str:
    said = [one.problem for one in _causes(stats)]
    if spread := stats.get("spread"):
        low, high = (spread["candidates"][end] for end in ("min", "max"))
        said.append(
            f"candidates score from {low:.3f} to {high:.3f}, positives {spread['positives']['mean']:.3f} on average, of"
            f" which the margin leaves candidates up to {spread['limit']:.3f}"
        )
    return "".join(f"; {one}" for one in said)
