"""Other miners' rules as ordinary settings: what `mining.compat` stands for.

A preset fills in settings that the config leaves out; what the config says wins. Each gives the rows of
the miner it is named after, as far as the remarks say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DERIVED_DEPTH = "range_max+max_positives"
"""`mining.depth` as sentence-transformers counts it; the numbers are known once the source is read."""

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # `mine_hard_negatives` of sentence-transformers 6. Anchors are told apart by their exact text, so data.format
    # `pairs` without ids is its input. Positives are excluded by exact text.
    "sentence-transformers": {
        "range_min": 0,
        "range_max": None,
        "rank_over": "survivors",
        "num_negatives": 3,
        "depth": DERIVED_DEPTH,
        "max_depth": None,
        "sampling_strategy": "top",
        "margin_reference": "min",
        "strict": False,
        "relative_margin": None,
        "exclude": ("positive_id", "positive_text"),
        "anchor_id": "never",
        "on_shortage": "keep",
    },
    # `scripts/hn_mine.py` of FlagEmbedding 1.4. Two lines of one query are one anchor here, so that the positive of
    # one is never the other's negative; a text that equals the query but for case or white space is excluded too.
    "flagembedding": {
        "range_min": 10,
        "range_max": 210,
        "rank_over": "raw",
        "num_negatives": 15,
        "depth": None,
        "max_depth": None,
        "sampling_strategy": "random",
        "strict": False,
        "relative_margin": None,
        "exclude": ("positive_id", "positive_text", "anchor_text"),
        "anchor_id": "never",
        "on_shortage": "random",
    },
    # `recipes/retrieval/mine_hard_negatives.py` of NeMo Automodel with hard_neg_margin 0.95, type perc. It looks at
    # the whole corpus: search.depth says how much of it is seen here. Where a positive scores below 0 its cutoff of
    # 0.95 times the score would lie above the positive; the cutoff here lies below.
    "nemo": {
        "range_min": 0,
        "range_max": 960,
        "rank_over": "survivors",
        "num_negatives": 20,
        "depth": None,
        "max_depth": None,
        "sampling_strategy": "top",
        "margin_reference": "min",
        "strict": False,
        "relative_margin": 0.05,
        "exclude": ("positive_id",),
        "anchor_id": "never",
        "on_shortage": "keep",
    },
    # TopK-PercPos at 95 % of NV-Retriever (Moreira et al. 2024, https://arxiv.org/abs/2407.15831): every pair has its
    # own cutoff and its own negatives, all that score below it.
    "nv-retriever": {
        "range_min": 0,
        "range_max": 960,
        "rank_over": "survivors",
        "num_negatives": 10,
        "depth": None,
        "max_depth": None,
        "sampling_strategy": "top",
        "margin_reference": "each",
        "strict": True,
        "relative_margin": 0.05,
        "exclude": ("positive_id", "positive_text"),
        "anchor_id": "never",
        "on_shortage": "keep",
    },
}


def with_preset(settings: Any) -> Any:
    """Mining settings with those of their preset that they leave out."""
    if not isinstance(settings, Mapping) or not isinstance(settings.get("compat"), str):
        return settings
    return {**PRESETS.get(settings["compat"], {}), **settings}


def derived_range_max(range_min: int, num_negatives: int, max_positives: int, *, filtered: bool) -> int:
    """The end of the window that sentence-transformers takes where none is given.

    Args:
        range_min: first rank of the window.
        num_negatives: negatives per anchor.
        max_positives: rows of the anchor with the most positives, repeated rows counted.
        filtered: a margin or a highest score may drop candidates, so that more are looked at.
    """
    return range_min + (10 if filtered else 1) * num_negatives + max_positives
