"""Postprocessing of vectors: truncated (for Matryoshka models), checked, scaled."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from negpipe.config.encoder import Encoder
from negpipe.data.arrays import Floats, Mask
from negpipe.errors import ConfigError, InputError

NOT_EXACT = (
    "rows are not reproducible bit for bit: made again, scores differ in their last digits, and rows where scores"
    " nearly tie (encoder.cache)"
)
"""The note for runs with a cache of vectors: a text's vector depends on the batch in which it was computed."""


def finished(vectors: Floats, encoder: Encoder, first: int, remedy: str) -> Floats:
    """(n, d) vectors of texts, truncated to `encoder.truncate_dim`, of length 1 with `encoder.normalize`.

    Args:
        vectors: (n, w) of a model.
        encoder: the settings.
        first: offset of the first text, for the error.
        remedy: the remedy for an invalid vector.

    Raises:
        ConfigError: they have fewer dimensions than `encoder.truncate_dim`.
        InputError: a vector is zero or not finite; `row` is the offset of its text.
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
    """The first `truncate_dim` dimensions of (n, d) vectors, not rescaled; all for None.

    Raises:
        ConfigError: they have fewer.
    """
    check_width(vectors.shape[1], truncate_dim)
    return vectors[:, :truncate_dim]


def check_width(width: int, truncate_dim: int | None) -> None:
    """Raises ConfigError: vectors have fewer dimensions than `truncate_dim`."""
    if truncate_dim is not None and truncate_dim > width:
        raise ConfigError(
            f"encoder.truncate_dim: {truncate_dim} is more than the {width} dimensions of a vector: set it to {width}"
            " or less, or to null"
        )


def usable(vectors: npt.NDArray[Any]) -> Mask:
    """(n,) whether each of (n, d) vectors is finite, and not zero."""
    result: Mask = np.isfinite(vectors).all(axis=1) & vectors.any(axis=1)
    return result


def short(vectors: npt.NDArray[Any]) -> Mask:
    """(n,) whether products with such vectors fit float32."""
    with np.errstate(over="ignore"):
        result: Mask = np.isfinite(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float32))
    return result


def refused(whose: str, vector: Floats, encoder: Encoder, place: dict[str, Any]) -> InputError:
    """The error for a vector that cannot be stored.

    Args:
        whose: the vector, in words.
        vector: (1, d), as computed or given.
        encoder: the settings.
        place: where it is, for the error.
    """
    if usable(vector).all():
        remedy = "Scale the vectors to about length 1"
        with np.errstate(all="ignore"):
            length = np.linalg.norm(vector)
        if encoder.normalize and not (np.isfinite(length) and length > 0):
            return InputError(f"the numbers in {whose} are too small or too large to scale", remedy=remedy, **place)
        if not encoder.normalize and not short(vector).all():
            return InputError(f"{whose} is too long: its products do not fit float32", remedy=remedy, **place)
        remedy = "Set encoder.storage: float32" if encoder.storage == "float16" else remedy
        return InputError(f"{whose} does not fit {encoder.storage}", field="encoder.storage", remedy=remedy, **place)
    what = "not finite" if vector.any() else "zero"
    return InputError(f"{whose} is {what}", remedy="Fix the vector, or remove the text", **place)
