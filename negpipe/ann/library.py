"""FAISS as used by this package."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def faiss() -> Any:
    """Imported on first use: stages import this module when the command line starts."""
    import faiss

    # By default, 333 anchors of dimension 384 are compared one by one, 12 times slower than as a matrix product.
    faiss.cvar.distance_compute_blas_threshold = 1
    return faiss


def one_thread() -> None:
    """Called first in each pool thread, as faiss keeps a thread count for each: the pool is the only parallelism."""
    faiss().omp_set_num_threads(1)
