"""Vectors of a model made as the config asks: cut, as Matryoshka models are trained for, checked, scaled."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from negpipe.config.encoder import Encoder as Settings
from negpipe.errors import ConfigError, InputError

Floats = npt.NDArray[np.float32]

NOT_EXACT = (
    "rows are not reproducible bit for bit: made again, scores differ in their last digits, and rows where scores"
    " nearly tie (encoder.cache)"
)
"""What is said where a cache of vectors was on: a text's vector depends on the batch in which it was computed."""


def finished(vectors: Floats, encoder: Settings, first: int, remedy: str) -> Floats:
    """(n, d) vectors of texts, cut to `encoder.truncate_dim`, of length 1 where `encoder.normalize` is set.

    Args:
        vectors: (n, w) of a model.
        encoder: the settings.
        first: offset of the first text, for the error.
        remedy: what is to be done about a vector that is no vector.

    Raises:
        ConfigError: they are narrower than `encoder.truncate_dim`.
        InputError: one is zero or not finite; `row` is its text's offset.
    """
    vectors = truncated(vectors, encoder.truncate_dim)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    bad = ~(np.isfinite(lengths) & (lengths > 0))
    if bad.any():
        offset = int(np.argmax(bad))
        what = "zero" if lengths[offset, 0] == 0 else "not finite"
        raise InputError(f"the vector of this text is {what}", row=first + offset, remedy=remedy)
    return vectors / lengths if encoder.normalize else vectors


def truncated(vectors: Floats, truncate_dim: int | None) -> Floats:
    """The first `truncate_dim` numbers of (n, d) vectors, not scaled again; all of them for None.

    Raises:
        ConfigError: they have fewer.
    """
    check_width(vectors.shape[1], truncate_dim)
    return vectors[:, :truncate_dim]


def check_width(width: int, truncate_dim: int | None) -> None:
    """Raises ConfigError: vectors of a width are narrower than they are to be cut to."""
    if truncate_dim is not None and truncate_dim > width:
        raise ConfigError(
            f"encoder.truncate_dim: {truncate_dim} is more than the {width} numbers of a vector: set it to {width} or"
            " less, or to null"
        )
