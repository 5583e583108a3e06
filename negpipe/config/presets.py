"""The rules of other miners as ordinary settings: the presets of `mining.compat`.

A preset fills in settings missing from the config, which takes precedence. Each reproduces the rows of
the miner it is named after, with the limits noted below.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DERIVED_DEPTH = "range_max+max_positives"
"""`mining.depth` as sentence-transformers counts it; its value is known once the source has been read."""

_USUAL: Mapping[str, Any] = {
    "range_min": 0,
    "rank_over": "survivors",
    "depth": None,
    "max_depth": None,
    "sampling_strategy": "top",
    "margin_reference": "min",
    "strict": False,
    "relative_margin": None,
    "exclude": ("positive_id", "positive_text"),
    "anchor_id": "never",
    "on_shortage": "keep",
}
"""What most of them do."""

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # `mine_hard_negatives` of sentence-transformers 6. Anchors are distinguished by their exact text, so the input
    # corresponds to data.format `pairs` without ids. Positives are excluded by exact text.
    "sentence-transformers": {
        **_USUAL,
        "range_max": None,
        "num_negatives": 3,
        "depth": DERIVED_DEPTH,
    },
    # `scripts/hn_mine.py` of FlagEmbedding 1.4. Two lines of one query are one anchor here, so that the positive of
    # one is never a negative of the other; a text that equals the query except for case or whitespace is excluded too.
    "flagembedding": {
        **_USUAL,
        "range_min": 10,
        "range_max": 210,
        "rank_over": "raw",
        "num_negatives": 15,
        "sampling_strategy": "random",
        "exclude": ("positive_id", "positive_text", "anchor_text"),
        "on_shortage": "random",
    },
    # `recipes/retrieval/mine_hard_negatives.py` of NeMo Automodel with hard_neg_margin 0.95, type perc. It searches
    # the entire corpus; here, search.depth limits the search. If a positive scores below 0, NeMo's cutoff of 0.95
    # times the score is above the positive; here it is below.
    "nemo": {
        **_USUAL,
        "range_max": 960,
        "num_negatives": 20,
        "relative_margin": 0.05,
        "exclude": ("positive_id",),
    },
    # TopK-PercPos at 95 % of NV-Retriever (Moreira et al. 2024, https://arxiv.org/abs/2407.15831): every pair has its
    # own cutoff, and its own negatives that score below it.
    "nv-retriever": {
        **_USUAL,
        "range_max": 960,
        "num_negatives": 10,
        "margin_reference": "each",
        "strict": True,
        "relative_margin": 0.05,
    },
}


def with_preset(settings: Any) -> Any:
    """Mining settings, with missing ones filled in from their preset."""
    if not isinstance(settings, Mapping) or not isinstance(settings.get("compat"), str):
        return settings
    return {**PRESETS.get(settings["compat"], {}), **settings}


def derived_range_max(range_min: int, num_negatives: int, max_positives: int, *, filtered: bool) -> int:
    """The default end of the window in sentence-transformers.

    Args:
        range_min: first rank of the window.
        num_negatives: negatives per anchor.
        max_positives: rows of the anchor with the most positives, repeated rows counted.
        filtered: a margin or a maximum score may drop candidates, so that more are considered.
    """
    return range_min + (10 if filtered else 1) * num_negatives + max_positives
