"""What an index of any kind costs on this machine, from one of two thousand vectors: right within a factor of two."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from negpipe.ann.coded import effort
from negpipe.ann.factory import add, inner, lists_of, make, rows_wanted, single_thread, train
from negpipe.ann.library import faiss
from negpipe.ann.pairs import pair_scores
from negpipe.ann.vectors import Floats

SAMPLE = 2048
_ANCHORS = 64
ITERATIONS = 10  # of the k-means that makes lists


@dataclass(frozen=True)
class Job:
    """Sizes of a search: documents, their dimension, anchors, candidates an anchor."""

    rows: int
    dimension: int
    anchors: int
    depth: int


def seconds(kind: str, job: Job, sample: Floats, share: float, rate: float, threads: int) -> tuple[float, float]:
    """Seconds to build and to search an index.

    Args:
        kind: FAISS factory string.
        sample: (SAMPLE, d) vectors of the corpus, or like them.
        share: of the corpus that is probed, where there are lists.
        rate: multiplications a second of all threads.
        threads: that search; an index is trained and filled by one.

    Raises:
        ConfigError: FAISS refuses the string, or the corpus is too small for it.
    """
    wanted, lists = rows_wanted(kind, job.dimension, job.rows), lists_of(make(kind, job.dimension))
    # What lists cost are products, which can be reckoned; the rest is tried with a few of them.
    few = re.sub(r"IVF\d+", "IVF4", kind)
    half = sample[: len(sample) // 2]
    halved = _timed(lambda: train(few, half, seed=0, threads=1))[0]
    took, index = _timed(lambda: train(few, sample, seed=0, threads=1))
    row = max(0.0, took - halved) / len(half)
    training = took + row * max(0, min(wanted, _most(index)) - len(sample)) if wanted else 0.0
    training += ITERATIONS * wanted * lists * job.dimension / rate
    graph = math.log(job.rows) / math.log(len(sample)) if isinstance(inner(index), faiss().IndexHNSW) else 0.0
    filling = _timed(lambda: add(index, sample, threads=1))[0] / len(sample) * job.rows * max(1.0, graph)
    filling += job.rows * lists * job.dimension / rate
    proposed = min(2 * job.depth, len(sample))
    if knob := effort(index):
        faiss().ParameterSpace().set_index_parameter(index, knob[0], min(knob[1], proposed))
    anchors = sample[:_ANCHORS]
    with single_thread():
        one = _timed(lambda: index.search(anchors, proposed))[0] / _ANCHORS
    searching = one * (graph or job.rows / len(sample) * (share if lists else 1.0))
    pairs = np.repeat(np.arange(_ANCHORS), 256), np.tile(np.arange(256), _ANCHORS)
    scoring = _timed(lambda: pair_scores(anchors, pairs[0], sample, pairs[1]))[0] / len(pairs[0]) * 2 * job.depth
    return training + filling, job.anchors * (searching + scoring) / threads


def _most(index: Any) -> float:
    """Rows beyond which FAISS trains no longer: 256 for each of a product quantizer's centroids."""
    quantizer = getattr(faiss().try_extract_index_ivf(index) or inner(index), "pq", None)
    return math.inf if quantizer is None else 256 * int(quantizer.ksub)


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    made = work()
    return time.perf_counter() - started, made
