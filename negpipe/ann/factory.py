"""FAISS indexes from factory strings: trained once, then filled shard by shard.

Guarantees: the same bytes for any number of threads. An index is a trained, empty template plus shards, each a complete
FAISS index of consecutive rows with ids from 0: shards are built independently and within memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from threadpoolctl import threadpool_limits

from negpipe.ann.auto import ROWS_A_LIST, trained_on
from negpipe.ann.clusters import centres, nearest
from negpipe.ann.library import faiss
from negpipe.ann.products import Arithmetic, arithmetic
from negpipe.ann.vectors import Vectors
from negpipe.data.arrays import Floats
from negpipe.errors import ConfigError, DamagedError

_ROWS_ADDED = 16384
_MOST_WORDS = 4096  # of codes that a small index is trained for
_USUAL = (3840, 1344, 1680)  # dimensions: most numbers of sub-quantizers divide one of these
NO_PAIRS = (np.zeros(0, np.int64), np.zeros(0, np.int64))


def make(kind: str, dimension: int) -> Any:
    """An empty index for inner products.

    Raises:
        ConfigError: FAISS rejects the string, or it requests refinement by FAISS, which is done here instead.
    """
    try:
        index = faiss().index_factory(dimension, kind, faiss().METRIC_INNER_PRODUCT)
    except (RuntimeError, ValueError) as error:
        reason = str(error).rsplit(":", 1)[-1].strip()
        raise ConfigError(
            f"index.kind {kind!r}: FAISS rejects it for vectors of dimension {dimension} ({reason})."
            " Set flat, stream, auto, or a factory string such as IVF1024,Flat"
        ) from None
    if isinstance(index, (faiss().IndexRefine, faiss().IndexIDMap)):
        raise ConfigError(
            f"index.kind {kind!r}: leave out refinement and id maps: stored vectors decide, ids are row numbers"
        )
    if hasattr(inner(index), "do_polysemous_training"):  # takes minutes, for a search not used here
        inner(index).do_polysemous_training = False
    return index


def fitting_dimension(kind: str) -> int:
    """A dimension for which FAISS accepts a string; used before that of the vectors is known.

    Raises:
        ConfigError: there is none.
    """
    for dimension in (*_USUAL, *(8 * int(number) for number in re.findall(r"\d+", kind))):
        try:
            make(kind, dimension)
            return dimension
        except ConfigError as error:
            problem = str(error).replace(f" for vectors of dimension {dimension}", "")
    raise ConfigError(problem)


def inner(index: Any) -> Any:
    """The index behind any preceding vector transforms; valid as long as `index`."""
    while isinstance(index, faiss().IndexPreTransform):
        index = faiss().downcast_index(index.index)
    return index


def lists_of(index: Any) -> int:
    """Number of lists of an index, 0 if it has none."""
    inverted = faiss().try_extract_index_ivf(index)
    return 0 if inverted is None else int(inverted.nlist)


def bytes_of(kind: str, dimension: int, rows: int, shards: int) -> tuple[int, int]:
    """Size in bytes of an index with so many rows and shards, and how much a search holds: plain lists stay on disk."""
    whole = make(kind, dimension)
    inverted, (empty, each) = faiss().try_extract_index_ivf(whole), _measured(kind, dimension)
    entries = rows * each
    if inverted is None:
        return shards * empty + entries, shards * empty + entries
    centres = 4 * inverted.d * lists_of(whole)
    # FAISS maps plain lists, and loads fast-scan lists. With full vectors, one copy of the centres is kept.
    held = entries if isinstance(inverted, faiss().IndexIVFFastScan) else 0
    kept = 1 if type(whole) is faiss().IndexIVFFlat else shards
    places = 16 * shards * lists_of(whole)
    return shards * (empty + centres) + places + entries, kept * (empty + centres) + places + held


@cache
def _measured(kind: str, dimension: int) -> tuple[int, int]:
    """Bytes of an empty file of this kind without list centres, and per row, measured on a small index."""
    small = make(quickly(kind, dimension), dimension)
    quantizer, inverted = getattr(inner(small), "pq", None), faiss().try_extract_index_ivf(small)
    if quantizer is not None:  # the quality of its words does not matter
        quantizer.cp.niter, quantizer.cp.min_points_per_centroid = 1, 1
    count = max(1024, min(_MOST_WORDS, 0 if quantizer is None else quantizer.ksub))
    rows = np.random.default_rng(0).standard_normal((count, dimension), np.float32)
    try:
        fit(small, rows, seed=0, threads=1)
        empty = len(faiss().serialize_index(small))
        with single_thread():
            small.add(rows)
    except RuntimeError:  # it needs too many rows: use the code size instead
        return len(faiss().serialize_index(make(kind, dimension))), inner(small).sa_code_size() + 8
    each = -(-(len(faiss().serialize_index(small)) - empty) // count)
    return empty - (0 if inverted is None else inverted.nlist * (4 * inverted.d + 16)), each


def quickly(kind: str, dimension: int) -> str:
    """A kind with rows of the same size and search cost, but with four lists and a rotation that is not learned.

    List costs are products, which can be estimated; learning a rotation takes minutes, and any rotation serves here.
    """
    few = re.sub(r"OPQ\d+_(\d+)", r"RR\1", re.sub(r"IVF\d+(_[A-Z]+\d*|\([^)]*\))?", "IVF4", kind))
    return re.sub(r"OPQ\d+", f"RR{dimension}", few)


def rows_wanted(kind: str, dimension: int, rows: int) -> int:
    """How many of `rows` an index is trained on; 0 if it needs no training.

    Raises:
        ConfigError: there are too few for the lists of the index, or for the words of its codes.
    """
    index = make(kind, dimension)
    if index.is_trained:
        return 0
    lists, quantizer = lists_of(index), getattr(inner(index), "pq", None)
    if quantizer is not None and rows < quantizer.ksub:
        raise ConfigError(
            f"index.kind {kind!r} has codes of {quantizer.ksub:,} words, which need as many training rows, but the"
            f" corpus has {rows:,}: set fewer bits (such as PQ8x4), SQ8, or index.kind: stream"
        )
    if rows < ROWS_A_LIST * lists:
        fitting = max(1, rows // ROWS_A_LIST)
        raise ConfigError(
            f"index.kind {kind!r} has {lists:,} lists, which need {ROWS_A_LIST * lists:,} training rows, but the corpus"
            f" has {rows:,}: set at most {fitting:,} lists, or index.kind: stream"
        )
    return trained_on(lists, rows)


def training_bytes(kind: str, dimension: int, rows: int) -> int:
    """Bytes needed to train on `rows` rows, including the rows.

    Measured on 65,536 rows of dimension 384, 96 MiB: PQ32x4fs 109 MiB, SQ8 201, a learned rotation (OPQ) 1,014; FAISS
    learns a rotation from at most that many rows.
    """
    rotating = 9 * min(rows, 65536) if "OPQ" in kind else 0
    return (2 * rows + rotating) * dimension * 4


def sample(vectors: Vectors, count: int, seed: int) -> Floats:
    """`count` rows in random order, all different; reads the corpus once, a block at a time."""
    chosen = np.random.default_rng(seed).choice(vectors.rows, count, replace=False)
    order = np.argsort(chosen)
    rows = chosen[order]
    out = np.empty((count, vectors.dimension), np.float32)
    for first, block in vectors.blocks(_ROWS_ADDED):
        low, high = np.searchsorted(rows, [first, first + len(block)])
        out[order[low:high]] = block[rows[low:high] - first]
    return out


def train(kind: str, rows: Floats, *, seed: int, threads: int) -> Any:
    """A trained, empty index; `threads` does not affect the bytes."""
    index = make(kind, rows.shape[1])
    try:
        fit(index, rows, seed=seed, threads=threads)
    except RuntimeError as error:
        raise ConfigError(f"index.kind {kind!r} cannot be trained on {len(rows):,} rows: {error}") from None
    return index


def fit(index: Any, rows: Floats, *, seed: int, threads: int) -> None:
    """Train an empty index."""
    with single_thread():
        inside = index
        while isinstance(inside, faiss().IndexPreTransform):
            for number in range(inside.chain.size()):
                transform = faiss().downcast_VectorTransform(inside.chain.at(number))
                transform.train(rows)
                rows = transform.apply(rows)
            inside.is_trained = True
            inside = faiss().downcast_index(inside.index)
        inverted = faiss().try_extract_index_ivf(inside)
        if inverted is not None and inverted.quantizer.is_trained:  # else its centres are coded, and FAISS trains them
            inverted.quantizer.add(centres(rows, inverted.nlist, seed=seed, threads=threads))
        inside.train(rows)


@contextmanager
def single_thread() -> Iterator[None]:
    """Run FAISS and its BLAS in one thread: other numbers of threads would build other indexes."""
    before = faiss().omp_get_max_threads()
    faiss().omp_set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        faiss().omp_set_num_threads(before)


def fill(
    index: Any,
    vectors: Vectors,
    *,
    threads: int,
    progress: Callable[[int, str], None] = lambda rows, note: None,
    planned: int = 0,
) -> None:
    """Add all vectors; their ids count from 0.

    Args:
        index: empty.
        threads: does not affect the bytes.
        progress: called with the number of vectors just added, and a note.
        planned: vectors of all shards to fill: faster arithmetic takes longer to start. Does not affect the bytes.
    """
    numbers = arithmetic(float(max(planned, vectors.rows)) * vectors.dimension * lists_of(index))
    for start, block in vectors.blocks(_ROWS_ADDED):
        add(index, block, numbers=numbers, threads=threads)
        progress(len(block), f"{start + len(block):,} rows")


def add(index: Any, rows: Floats, *, numbers: Arithmetic, threads: int) -> None:
    """Add some vectors."""
    with single_thread():
        if type(index) is faiss().IndexIVFFlat:
            lists = nearest(rows, centroids_of(index), numbers=numbers, threads=threads)
            index.add_core(len(rows), faiss().swig_ptr(rows), None, faiss().swig_ptr(lists))
        else:
            index.add(rows)


def centroids_of(index: Any) -> Floats:
    """(nlist, d) float32: the centres of an IVF index's lists."""
    inverted = faiss().extract_index_ivf(index)
    centroids: Floats = inverted.quantizer.reconstruct_n(0, inverted.nlist)
    return centroids


def write(index: Any, file: BinaryIO) -> None:
    """Write an index that `faiss.read_index` opens."""
    faiss().write_index(index, faiss().PyCallbackIOWriter(file.write))


def read(path: Path, dimension: int, *, to_fill: bool = False) -> Any:
    """Open an index; unless it will be filled, its lists stay on disk, memory-mapped.

    Raises:
        DamagedError: the file is damaged, from another FAISS version, or of another dimension.
    """
    flags = 0 if to_fill else faiss().IO_FLAG_MMAP | faiss().IO_FLAG_READ_ONLY
    try:
        index = faiss().read_index(str(path), flags)
    except RuntimeError as error:
        reason = str(error).rsplit("\n", 1)[-1][-200:]
        raise DamagedError(
            f"{path}: FAISS {faiss().__version__} cannot read it ({reason}). It is damaged, or from another FAISS:"
            " delete it, then run `negpipe index` again"
        ) from None
    if index.d != dimension:
        raise DamagedError(
            f"{path}: holds dimension {index.d}, the vectors have {dimension}. Run `negpipe index` again"
        )
    return index
