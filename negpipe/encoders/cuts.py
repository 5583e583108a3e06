"""Texts that are cut at the model's length, counted while they are tokenised: nothing is tokenised twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

OnCut = Callable[[int, int], None]
"""Called with texts that were cut, and the tokens that they lost; also where it was none."""


def watch(tokenizer: Any, on_cut: OnCut) -> None:
    """Have a tokenizer of transformers tell what it cuts off.

    Only one in Rust keeps that; any other one is left alone, and nothing is known of its cuts.
    """
    tokenise = getattr(tokenizer, "_encode_plus", None)
    if tokenise is None or not getattr(tokenizer, "is_fast", False):
        return
    special = tokenizer.num_special_tokens_to_add()

    def watched(*args: Any, **kwargs: Any) -> Any:
        batch = tokenise(*args, **kwargs)
        rests = [encoding.overflowing for encoding in batch.encodings or ()]
        # Each rest has the special tokens again, and padding.
        lost = [sum(sum(piece.attention_mask) - special for piece in rest) for rest in rests if rest]
        on_cut(len(lost), sum(lost))
        return batch

    tokenizer._encode_plus = watched
