"""Texts truncated to the model's length: estimated from a sample before hours of encoding, and counted while
tokenizing, so that nothing is tokenized twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from negpipe.config.encoder import Encoder
from negpipe.encoders.prompts import Kind, instructed, instruction, reads_whole

OnCut = Callable[[int, int], None]
"""Called with the number of truncated texts, possibly 0, and of the tokens that they lost."""


def watch(tokenizer: Any, on_cut: OnCut) -> None:
    """Make a tokenizer of transformers report truncation.

    Only tokenizers in Rust record it; others are left unchanged, and their truncation is unknown.
    """
    # Every call passes through the first in transformers 4; transformers 5 has the second only.
    name = "_batch_encode_plus" if hasattr(tokenizer, "_batch_encode_plus") else "_encode_plus"
    tokenise = getattr(tokenizer, name, None)
    if tokenise is None or not getattr(tokenizer, "is_fast", False):
        return
    special = tokenizer.num_special_tokens_to_add()

    def watched(*args: Any, **kwargs: Any) -> Any:
        batch = tokenise(*args, **kwargs)
        rests = [encoding.overflowing for encoding in batch.encodings or ()]
        # Each rest repeats the special tokens, and has padding.
        lost = [sum(sum(piece.attention_mask) - special for piece in rest) for rest in rests if rest]
        on_cut(len(lost), sum(lost))
        return batch

    setattr(tokenizer, name, watched)


@dataclass(frozen=True)
class Expected:
    """The effect of the model's length: texts, truncated texts, tokens, lost tokens."""

    texts: int
    cut: int
    tokens: int
    lost: int


def expected(encoder: Encoder, folder: Path, kind: Kind, texts: Sequence[str]) -> Expected | None:
    """The expected truncation of texts, by the tokenizer in a model's folder, without loading torch or model libraries.

    Returns:
        None if the folder has no tokenizer in Rust, or the model does not truncate.
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
    """A share as text."""
    return "less than 1 %" if share < 0.01 else f"{share:.0%}".replace("%", " %")
