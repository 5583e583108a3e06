"""Search of an inverted file list by list: all anchors are known, so each list is read once, for one matrix product.

Guarantees: an anchor gets the true top, by (-score, row), of its nearest lists: exact within the lists it probes,
scored by `pair_scores`, the same bytes for any memory and any number of threads. The choice of lists is exact too.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from negpipe.ann.exact import layout, search_exact
from negpipe.ann.factory import NO_PAIRS, centroids_of, read
from negpipe.ann.groups import in_groups
from negpipe.ann.library import faiss
from negpipe.ann.pairs import NOTHING, Best, Keys, grouped, keys_of, merge, pair_scores, rows_of, scores_of, waiting
from negpipe.ann.products import STRIP, Arithmetic, Products, arithmetic, floors, pool
from negpipe.ann.vectors import Held
from negpipe.data.arrays import Floats, Ints
from negpipe.engine.budget import Budget
from negpipe.errors import DamagedError

_AHEAD = 4  # lists per thread that are being searched or wait for the merge
_ORDERED = 0.75  # share of the memory for computing the order of lists
_GUESSED = 256  # anchors per estimate
SAMPLE_ROWS = 8192  # rows sampled for the estimate


@dataclass(frozen=True)
class _Shard:
    path: Path
    first: int
    sizes: Ints  # (nlist,)
    offsets: Ints  # (nlist,) where a list's vectors start in the file, followed by its ids

    def read(self, number: int, offset: int, *out: NDArray[Any]) -> None:
        """Fill arrays one after the other, starting `offset` bytes after the start of a list."""
        with self.path.open("rb") as file:
            file.seek(int(self.offsets[number]) + offset)
            # A buffered file reads until the array is full: one system call returns at most 2 GiB, possibly less.
            if any(file.readinto(array.reshape(-1).data) < array.nbytes for array in out):
                raise DamagedError(f"{self.path}: ends within list {number}. Run `negpipe verify`")


@dataclass(frozen=True)
class Lists:
    """An IVF index with full vectors, in shards."""

    centroids: Floats
    shards: tuple[_Shard, ...]
    sample: Floats
    """Random rows of the corpus."""

    @cached_property
    def sizes(self) -> Ints:
        """(nlist,): number of vectors in each list."""
        sizes: Ints = np.sum([shard.sizes for shard in self.shards], axis=0)
        return sizes

    @property
    def rows(self) -> int:
        return int(self.sizes.sum())

    @property
    def longest(self) -> int:
        """Number of vectors in the longest list."""
        return int(self.sizes.max(initial=0))

    def ids(self, number: int) -> Ints:
        """Row numbers of a list."""
        pieces = []
        for shard in self.shards:
            ids = np.empty(int(shard.sizes[number]), np.int64)
            shard.read(number, len(ids) * 4 * self.centroids.shape[1], ids)
            pieces.append(shard.first + ids)
        return np.concatenate(pieces)

    def read(self, number: int, room: Floats) -> tuple[Floats, Ints]:
        """(m, d) vectors of a list, read into `room`, which has `longest` rows, and their (m,) row numbers."""
        ids = np.empty(int(self.sizes[number]), np.int64)
        first = 0
        for shard in self.shards:
            here = slice(first, first + int(shard.sizes[number]))
            shard.read(number, 0, room[here], ids[here])
            ids[here] += shard.first
            first = here.stop
        return room[:first], ids

    def nearest(self, anchors: Floats, nprobe: int, budget: Budget) -> Ints:
        """(n, nprobe): the lists that each anchor probes, nearest first."""
        held = Held(self.centroids)
        return search_exact(anchors, held, nprobe, positives=NO_PAIRS, budget=budget).rows


def is_lists(index: object) -> bool:
    """Whether this module can search an index."""
    return type(index) is faiss().IndexIVFFlat


def open_lists(shards: Sequence[tuple[Path, int]], sample: Floats) -> Lists:
    """Open shards, each with its first row.

    Raises:
        DamagedError: see `factory.read`; or the shards do not belong to one index.
    """
    opened = []
    centroids: Floats | None = None
    for path, first in shards:
        index = read(path, sample.shape[1])
        if not is_lists(index):
            raise DamagedError(f"{path}: is not an IVF index with full vectors. Run `negpipe index` again")
        own = centroids_of(index)
        if centroids is not None and not np.array_equal(own, centroids):
            raise DamagedError(f"{path}: has different lists from {shards[0][0]}. Run `negpipe index` again")
        centroids = own
        kept = faiss().downcast_InvertedLists(index.invlists)
        places = [kept.lists.at(number) for number in range(index.nlist)]
        sizes, offsets = (np.array([getattr(at, name) for at in places], np.int64) for name in ("size", "offset"))
        if index.ntotal != sizes.sum():
            raise DamagedError(
                f"{path}: its header says {index.ntotal:,} vectors, its lists hold {sizes.sum():,}. Run `negpipe index`"
                " again"
            )
        opened.append(_Shard(path, first, sizes, offsets))
    assert centroids is not None
    return Lists(centroids, tuple(opened), sample)


def places(lists: Lists, anchors: Floats, rows: Ints, budget: Budget) -> Ints:
    """(n, depth): how many lists are nearer to an anchor than the one that holds a row."""
    count = len(lists.centroids)
    wanted, at = np.unique(rows, return_inverse=True)
    list_of = np.empty(len(wanted), np.int64)
    for number in range(count):
        ids = lists.ids(number)
        place = np.minimum(np.searchsorted(wanted, ids), len(wanted) - 1)
        list_of[place[wanted[place] == ids]] = number
    lists_of = list_of[at].reshape(rows.shape)

    def of(group: Floats, held: Ints) -> Ints:
        nearest = lists.nearest(group, count, budget.share(_ORDERED))
        place = np.empty_like(nearest)
        np.put_along_axis(place, nearest, np.arange(count)[None, :], axis=1)
        return np.take_along_axis(place, held, axis=1)

    # The rows and scores in `nearest`, internal and returned, take most memory; then their inverted order.
    pieces = -(-len(anchors) * count * 64 // budget.memory)
    split = np.array_split(anchors, pieces), np.array_split(lists_of, pieces)
    return np.concatenate([of(group, held) for group, held in zip(*split, strict=True)])


def check_places(dimension: int, count: int, budget: Budget) -> None:
    """Check that the order of so many lists can be computed for an anchor.

    Raises:
        ConfigError: it does not fit.
    """
    layout(1, count, dimension, count, budget.share(_ORDERED))


def needs(
    dimension: int, depth: int, nprobe: int, share: float, longest: int, sample: int, threads: int
) -> tuple[int, int]:
    """Bytes that a search takes per anchor, and independently of their number.

    Args:
        share: share of the lists that is probed.
        longest: number of vectors in the longest list.
        sample: number of rows in the sample.
    """
    row = 6 * dimension + 16
    found = int(_AHEAD * threads * 32 * depth * share)  # for the anchors that probe a list
    scratch = 2**24 + 40 * STRIP * min(waiting(depth), longest)  # products, pieces of pairs, waiting pairs
    return 2 * row + depth * 56 + nprobe * 32 + found, sample * row + threads * (scratch + longest * row)


def search_lists(
    anchors: Floats,
    lists: Lists,
    depth: int,
    nprobe: int,
    *,
    budget: Budget,
    progress: Callable[[int], None] = lambda rows: None,
) -> tuple[Ints, Floats]:
    """The best rows of every anchor among its `nprobe` nearest lists.

    Args:
        anchors: (n, d) float32.
        depth: number of rows per anchor.
        budget: does not affect results.
        progress: called with the number of corpus rows whose lists have just been searched.

    Returns:
        rows (n, depth) int64, -1 if the lists hold fewer; scores (n, depth) float32, -inf there.

    Raises:
        ConfigError: `budget` is too small.
    """
    share = nprobe / len(lists.centroids)
    each, fixed = needs(anchors.shape[1], depth, nprobe, share, lists.longest, len(lists.sample), budget.threads)
    threads = budget.threads

    def search(group: Floats, budget: Budget, progress: Callable[[int], None]) -> tuple[Ints, Floats]:
        probed = lists.nearest(group, nprobe, budget)
        numbers = arithmetic(float(len(group)) * lists.rows * group.shape[1] * nprobe / len(lists.centroids), budget)
        guess = _guess(group, lists, depth, numbers, threads)
        best = _scan(group, lists, depth, probed, guess, numbers, threads, progress)
        # A guess is not a bound: if the rows it let pass do not prove it, every row competes.
        unproven = np.flatnonzero(scores_of(best.max(axis=1)) < guess)
        if len(unproven):
            everything = np.full(len(unproven), -np.inf, np.float32)
            again = group[unproven], lists, depth, probed[unproven], everything, numbers, threads
            best[unproven] = _scan(*again, lambda _: None)
        best.sort(axis=1)
        return rows_of(best), scores_of(best)

    return in_groups(anchors, search, depth, each=each, fixed=fixed, budget=budget, progress=progress)


def _guess(anchors: Floats, lists: Lists, depth: int, numbers: Arithmetic, threads: int) -> Floats:
    """(n,): a score that, according to the sample, slightly more than `depth` rows of the corpus reach."""
    sample = numbers.operand(lists.sample)

    def of(tile: Floats) -> Floats:
        return Products(numbers, len(tile)).guess(numbers.operand(tile), sample, depth, lists.rows)

    tiles = np.array_split(anchors, max(1, -(-len(anchors) // _GUESSED)))
    with pool(numbers, threads) as executor:
        return np.concatenate([*executor.map(of, tiles)])


def _scan(
    anchors: Floats,
    lists: Lists,
    depth: int,
    probed: Ints,
    cut: Floats,
    numbers: Arithmetic,
    threads: int,
    progress: Callable[[int], None],
) -> Keys:
    """(n, depth): the best keys in the probed lists, of scores that reach the cut."""
    best = np.full((len(anchors), depth), NOTHING)
    operand, cut = numbers.operand(anchors), cut.copy()
    order, bounds = grouped(probed.ravel(), len(lists.centroids))
    of_list = order // probed.shape[1]
    local = threading.local()
    # Floors for vectors about as long as the sample's; lists with longer vectors get separate floors.
    sample = numbers.operand(lists.sample)
    usual, off = 1.01 * sample.lengths.max(initial=0.0), 1.01 * sample.errors.max(initial=0.0)
    floor_of = floors(numbers, cut, operand, usual, off)

    def scan(number: int) -> list[tuple[Ints, Keys]]:
        members = of_list[bounds[number] : bounds[number + 1]]
        if not len(members):
            return []
        if not hasattr(local, "products"):
            local.products = Products(numbers, STRIP)
            local.vectors = np.empty((lists.longest, anchors.shape[1]), np.float32)
            local.values = numbers.room(*local.vectors.shape)
        vectors, ids = lists.read(number, local.vectors)
        rows = numbers.operand(vectors, local.values)
        longest, error = rows.lengths.max(initial=0.0), rows.errors.max(initial=0.0)
        common = floor_of if longest <= usual and error <= off else None
        found: list[tuple[Ints, Keys]] = []
        for low in range(0, len(members), STRIP):
            here = members[low : low + STRIP]
            kept = Best(len(here), depth)
            some, reached = numbers.take(operand, here), cut[here]
            floor = floors(numbers, reached, some, longest, error) if common is None else common[here]
            for start in range(0, len(vectors), numbers.strip):
                strip = slice(start, start + numbers.strip)
                for anchor_of, row_of in local.products.reaching(floor, some, rows[strip]):
                    for few in kept.pieces(len(row_of)):
                        scores = pair_scores(anchors, here[anchor_of[few]], vectors[strip], row_of[few])
                        if kept.add(anchor_of[few], keys_of(scores, ids[start + row_of[few]])):
                            floor = floors(numbers, np.maximum(reached, kept.cut()), some, longest, error)
            found += [(here[anchor_of], keys) for anchor_of, keys in kept.pairs()]
        return found

    unmerged: list[tuple[Ints, Keys]] = []
    pairs = 0
    with pool(numbers, threads) as executor:
        ahead: deque[Future[list[tuple[Ints, Keys]]]] = deque()
        for number in range(len(lists.sizes) + _AHEAD * threads):
            if number < len(lists.sizes):
                ahead.append(executor.submit(scan, number))
            if number < _AHEAD * threads or not ahead:
                continue
            found = ahead.popleft().result()
            unmerged += found
            pairs += sum(len(keys) for _, keys in found)
            if unmerged and (pairs > best.size or not ahead):
                merge(best, unmerged, executor.map)
                unmerged, pairs = [], 0
                np.maximum(cut, scores_of(best.max(axis=1)), out=cut)
                floor_of = floors(numbers, cut, operand, usual, off)
            progress(int(lists.sizes[number - _AHEAD * threads]))
    return best
