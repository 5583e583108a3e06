"""Vectors cut to their first numbers, as Matryoshka models are trained for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from negpipe.errors import ConfigError

Floats = npt.NDArray[np.float32]

NOT_EXACT = "made again, rows are equal within rounding, not bit for bit (encoder.cache)"
"""What is said of rows whose vectors depend on what a cache held: those of a text differ with the batch it is in."""


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
