"""Texts that are cut at the model's length: expected of a sample, before hours are spent on them, and counted while
they are tokenised, so that nothing is tokenised twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from negpipe.config.encoder import Encoder as Settings
from negpipe.encoders.prompts import Kind, instructed, instruction, reads_whole

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


@dataclass(frozen=True)
class Expected:
    """What the model's length is to texts: their number, those that it cuts, tokens, those that it loses."""

    texts: int
    cut: int
    tokens: int
    lost: int


def expected(encoder: Settings, folder: Path, kind: Kind, texts: Sequence[str]) -> Expected | None:
    """What will be cut of texts, by the tokenizer in a model's folder; torch and model libraries are not loaded.

    Returns:
        None where the folder has no tokenizer in Rust, or the model cuts nothing.
    """
    file = folder / "tokenizer.json"
    if not file.is_file() or reads_whole(encoder, str(folder)):
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    prompt, given = instructed(instruction(encoder, str(folder), kind), list(texts))
    limit = getattr(encoder, f"{kind}_max_length")
    lengths = [len(one.ids) for one in tokenizer.encode_batch([prompt + text for text in given])]
    over = [length - limit for length in lengths if length > limit]
    return Expected(len(lengths), len(over), sum(lengths), sum(over))


def percent(share: float) -> str:
    """A share for people."""
    return "less than 1 %" if share < 0.01 else f"{share:.0%}".replace("%", " %")
