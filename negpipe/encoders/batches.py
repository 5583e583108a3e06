"""Batches for `encoder.batch_tokens`: as many texts of similar length per forward pass as fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from negpipe.config.encoder import BATCH_SIZE, Encoder
from negpipe.encoders.prompts import Kind, has_inputs_of_routes, instructed, instruction, reads_whole
from negpipe.errors import ConfigError

Batches = Callable[[list[str], Kind], list[NDArray[np.intp]]]
"""Offsets of the texts of each forward pass; every text is in exactly one."""

_UNTOLD = "encoder.batch_tokens: this model does not report how many tokens a text has: remove it"


def check_tokens(encoder: Encoder, folder: str) -> None:
    """Check `encoder.batch_tokens` against the files of a model before it is loaded.

    Raises:
        ConfigError: `encoder.batch_tokens` is set, but the model does not report how many tokens a text has.
    """
    if encoder.batch_tokens is not None and (reads_whole(encoder, folder) or has_inputs_of_routes(encoder, folder)):
        raise ConfigError(_UNTOLD)


def batches_of(encoder: Encoder, path: str, tokenizers: Sequence[Any]) -> Batches:
    """The batches of the texts of a call, by the tokens counted by the tokenizer of the model in `path`.

    Raises:
        ConfigError: the model does not have exactly one usable tokenizer.
    """
    limit = encoder.batch_tokens
    assert limit is not None
    if len(tokenizers) != 1 or not callable(tokenizers[0]):
        raise ConfigError(_UNTOLD)
    (tokenizer,) = tokenizers
    instructions = cache(lambda kind: instruction(encoder, path, kind))

    def batches(texts: list[str], kind: Kind) -> list[NDArray[np.intp]]:
        prompt, texts = instructed(instructions(kind), texts)
        most = getattr(encoder, f"{kind}_max_length")
        lengths: list[int] = []
        for first in range(0, len(texts), BATCH_SIZE):  # a tokenizer also holds truncated tokens of any length
            given = [prompt + text for text in texts[first : first + BATCH_SIZE]]
            found = tokenizer(given, truncation=True, max_length=most, padding=False)
            lengths += map(len, found["input_ids"])
        return by_tokens(lengths, limit)

    return batches


def by_tokens(lengths: Sequence[int], limit: int) -> list[NDArray[np.intp]]:
    """Batches with the longest texts first, so that insufficient memory shows at once; equal lengths in order.

    Args:
        lengths: tokens of each text.
        limit: maximum of texts times tokens of the longest; a longer text is alone.

    Returns:
        offsets of the texts of each batch.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    batches, first = [], 0
    while first < len(order):
        count = max(1, limit // max(1, lengths[order[first]]))
        batches.append(order[first : first + count])
        first += count
    return batches
