"""Estimates what an index of any kind costs on this machine, from a small one: mostly right within a factor of two."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from negpipe.ann.auto import built
from negpipe.ann.coded import effort
from negpipe.ann.factory import add, fit, inner, lists_of, make, quickly, rows_wanted, single_thread
from negpipe.ann.library import faiss
from negpipe.ann.pairs import pair_scores
from negpipe.ann.products import Float32
from negpipe.data.arrays import Floats

SAMPLE = 10_000  # with fewer, FAISS warns about too few to train 256 centroids
_GRAPH = 2048  # of these in a graph, which is slow to build
_ANCHORS = 64


@dataclass(frozen=True)
class SearchJob:
    """Sizes of a search: documents, their dimension, anchors, candidates per anchor."""

    rows: int
    dimension: int
    anchors: int
    depth: int


def seconds(kind: str, job: SearchJob, sample: Floats, share: float, rate: float, threads: int) -> tuple[float, float]:
    """Seconds to build and to search an index.

    Args:
        kind: FAISS factory string.
        sample: (SAMPLE, d) vectors of the corpus, or similar ones. Learning a rotation (OPQ) is not timed.
        share: share of the corpus that is probed, if there are lists.
        rate: multiplications per second of all threads.
        threads: for searching and finding lists; codes and graphs are built by one.

    Raises:
        ConfigError: FAISS rejects the string, or the corpus is too small for it.
    """
    wanted, lists = rows_wanted(kind, job.dimension, job.rows), lists_of(make(kind, job.dimension))
    index = make(quickly(kind, job.dimension), job.dimension)
    quantizer = getattr(faiss().try_extract_index_ivf(index) or inner(index), "pq", None)
    most, rounds = math.inf, 1.0
    if quantizer is not None:  # its k-means uses at most 256 rows per centroid, many times: two suffice
        most, rounds, quantizer.cp.niter = 256.0 * quantizer.ksub, quantizer.cp.niter / 2, 2
    took = _timed(lambda: fit(index, sample, seed=0, threads=1))
    training = rounds * took * min(wanted, most) / min(len(sample), most) if wanted else 0.0
    graph = isinstance(inner(index), faiss().IndexHNSW)
    added = sample[:_GRAPH] if graph else sample
    deeper = math.log(job.rows) / math.log(len(added)) if graph else 1.0
    filling = _timed(lambda: add(index, added, numbers=Float32(), threads=1)) / len(added) * job.rows * deeper
    listing = built(job.rows, wanted, lists) * job.dimension / rate
    # The same share of the rows as in the full search: it decides how often a better row is found.
    proposed = 2 * job.depth if graph else max(1, round(2 * job.depth * len(added) / job.rows))
    if knob := effort(index):
        faiss().ParameterSpace().set_index_parameter(index, knob[0], min(knob[1], 2 * job.depth))
    anchors = sample[:_ANCHORS]
    with single_thread():
        one = _timed(lambda: index.search(anchors, min(proposed, len(added)))) / _ANCHORS
    searching = one * (deeper if graph else job.rows / len(added) * (share if lists else 1.0))
    pairs = np.repeat(np.arange(_ANCHORS), 256), np.tile(np.arange(256), _ANCHORS)
    scoring = _timed(lambda: pair_scores(anchors, pairs[0], sample, pairs[1])) / len(pairs[0]) * 2 * job.depth
    return training + filling + listing, job.anchors * (searching + scoring) / threads


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
