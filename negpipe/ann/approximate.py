"""An approximate index: built from a factory string, tuned to a requested recall, with its recall stated.

Guarantees: recall is measured on seeded anchors against an exact search over the same vectors; an index that cannot
reach `index.min_recall` raises an error that shows the recall of each effort.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from negpipe import ann
from negpipe.ann import coded, factory, groups, lists, recall, slices
from negpipe.ann.pairs import Keys
from negpipe.ann.probe import SearchJob
from negpipe.config.schema import Config
from negpipe.data.arrays import Floats, Ints, Mask
from negpipe.engine.budget import Budget
from negpipe.errors import ConfigError, DamagedError, InputError, RecallError

_ONE_IN = 32  # one in so many rows of a shard is in its sample
_SHOWN = 8  # efforts shown in an error
_MOST_PROPOSED = 16  # maximum proposals, as a multiple of the depth


@dataclass(frozen=True)
class Effort:
    """How thorough a search is: lists probed (or efSearch), and rows scored exactly; None if not applicable."""

    nprobe: int | None
    proposed: int | None


@dataclass(frozen=True)
class Approximate:
    """An opened index with its search effort."""

    index: lists.Lists | list[tuple[Any, int]]
    vectors: ann.Vectors
    held: int
    """Bytes of the index that are in memory."""
    effort: Effort = Effort(None, None)

    def tuned(self, effort: Effort) -> Approximate:
        return replace(self, effort=effort)

    def before(self, row: int) -> Approximate:
        """A copy without the shards that begin at `row` or later."""
        if isinstance(self.index, lists.Lists):
            kept = tuple(shard for shard in self.index.shards if shard.first < row)
            return replace(self, index=replace(self.index, shards=kept))
        return replace(self, index=[shard for shard in self.index if shard[1] < row])

    def proposed(self, depth: int) -> int:
        """Number of rows per anchor whose scores are computed."""
        return max(depth, self.effort.proposed or depth)

    def search_slice(
        self, anchors: Floats, depth: int, *, budget: Budget
    ) -> tuple[Iterator[Keys], tuple[int, int, int]]:
        """For the index of a slice of the corpus: keys for `slices.write`, and their shape."""
        if isinstance(self.index, lists.Lists):
            width = min(depth, self.vectors.rows)
            found = self.search(anchors, width, budget=budget)
            return iter([slices.layered(*found)]), (len(anchors), 1, width)
        width = min(self.proposed(depth), self.vectors.rows)
        keys = coded.search_slice(
            anchors, self.index, self.vectors, effort_value=self.effort.nprobe, proposed=width, budget=budget
        )
        return keys, (len(anchors), 2, width)

    def search(
        self,
        anchors: Floats,
        depth: int,
        *,
        budget: Budget,
        progress: Callable[[int], None] = lambda rows: None,
    ) -> tuple[Ints, Floats]:
        """Rows and scores, (n, depth) each; see `lists.search_lists` and `coded.search_coded`."""
        effort = self.effort
        if isinstance(self.index, lists.Lists):
            return lists.search_lists(anchors, self.index, depth, effort.nprobe or 1, budget=budget, progress=progress)
        return coded.search_coded(
            anchors,
            self.index,
            self.vectors,
            depth,
            effort_value=effort.nprobe,
            proposed=self.proposed(depth),
            budget=budget,
            progress=progress,
        )


def check_memory(config: Config, job: SearchJob, shard: int, anchors: int, held: int, budget: Budget) -> None:
    """Check that the configured kind can be trained, filled, tuned and searched in memory.

    Args:
        shard: vectors in the largest file.
        anchors: anchors in the largest part.
        held: bytes of the index that a search holds in memory.

    Raises:
        ConfigError: it cannot; the message says what is missing.
    """
    kind = config.index.kind
    wanted = 0 if config.index.trained else factory.rows_wanted(kind, job.dimension, job.rows)
    empty, row = factory.make(kind, job.dimension), 4 * job.dimension
    searching = groups.kept(anchors, job.depth)
    if listed := lists.is_lists(empty):
        average = job.rows // factory.lists_of(empty)  # average length of a list; the longest is unknown yet
        searching += sum(lists.needs(job.dimension, job.depth, 1, 0.0, average, sampled(job.rows), budget.threads))
    least, what, remedy = max(
        (3 * shard * row, "building a shard", ", index.shard_size or data.part_rows"),
        (factory.training_bytes(kind, job.dimension, wanted), "training", ""),
        (held, "holding the index in memory while it is searched", ""),
        (held + searching, "searching", ", resources.cpus or search.depth"),
    )
    remedy = f"lower executor.workers{remedy}, or set index.kind: stream"
    budget.require(least, f"index.kind {kind}: {what}", remedy)
    tuned, beside = min(config.index.recall_anchors, job.anchors), budget.without(held)
    ann.exact.layout(tuned, job.rows, job.dimension, job.depth, beside)
    if listed:
        lists.check_places(job.dimension, factory.lists_of(empty), beside)
    else:
        coded.check_tuning(min(_MOST_PROPOSED * job.depth, job.rows), beside)


def train(config: Config, vectors: ann.Vectors, *, threads: int) -> Any:
    """The trained, empty index of `index.kind`, or the one that `index.trained` names.

    Raises:
        ConfigError: see `factory`; or the given index is of another kind.
    """
    kind, given = config.index.kind, config.index.trained
    if not given:
        wanted = factory.rows_wanted(kind, vectors.dimension, vectors.rows)
        sample = (
            factory.sample(vectors, wanted, config.seed) if wanted else np.zeros((1, vectors.dimension), np.float32)
        )
        return factory.train(kind, sample, seed=config.seed, threads=threads)
    try:
        index = factory.read(Path(given), vectors.dimension, to_fill=True)
    except DamagedError as error:
        raise InputError(
            f"it is not an index for these vectors: {error}",
            file=given,
            field="index.trained",
            remedy="Use an index that this FAISS trained on vectors of the same model, or set it to null",
        ) from None
    fresh = factory.make(kind, vectors.dimension)
    if _shape(index) != _shape(fresh) or not index.is_trained:
        raise ConfigError(
            f"index.trained: {given} is {_described(index)}, index.kind {kind} means {_described(fresh)}: use an index"
            " of this kind"
        )
    index.reset()
    return index


def _shape(index: Any) -> tuple[Any, ...]:
    inside = factory.inner(index)
    return type(index), type(inside), factory.lists_of(index), inside.sa_code_size(), inside.metric_type


def _described(index: Any) -> str:
    inside = factory.inner(index)
    return f"{type(inside).__name__} with {factory.lists_of(index)} lists and codes of {inside.sa_code_size()} bytes"


def sampled(rows: int) -> int:
    """Sample size for `rows` rows."""
    return min(lists.SAMPLE_ROWS, -(-rows // _ONE_IN))


def sample_of(vectors: ann.Vectors, seed: int) -> Floats:
    """A random sample of a shard's rows."""
    return factory.sample(vectors, -(-vectors.rows // _ONE_IN), seed)


@dataclass(frozen=True)
class IndexShard:
    """One file of an index, a sample of its vectors, and its first row."""

    index: Path
    sample: Path
    first: int


def open_index(kind: str, shards: Sequence[IndexShard], vectors: ann.Vectors) -> Approximate:
    """Open the shards of an index of this kind.

    Raises:
        DamagedError: a file is damaged, or the number of rows differs from that of the vectors.
    """
    places = [(shard.index, shard.first) for shard in shards]
    _, memory = factory.bytes_of(kind, vectors.dimension, vectors.rows, len(places))
    if not lists.is_lists(factory.read(places[0][0], vectors.dimension)):
        opened = coded.open_shards(places, vectors.dimension)
        _check_rows(places[0][0], sum(index.ntotal for index, _ in opened), vectors)
        return Approximate(opened, vectors, memory)
    samples = [ann.open_parts([shard.sample]) for shard in shards]
    stride = -(-sum(sample.rows for sample in samples) // lists.SAMPLE_ROWS)
    sample = np.concatenate([own.take(np.arange(0, own.rows, stride)) for own in samples])
    listed = lists.open_lists(places, sample)
    _check_rows(places[0][0], listed.rows, vectors)
    return Approximate(listed, vectors, memory)


def _check_rows(path: Path, held: int, vectors: ann.Vectors) -> None:
    if held != vectors.rows:
        raise DamagedError(
            f"{path.parent}: the index holds {held:,} vectors, encode made {vectors.rows:,}. Run `negpipe index` again"
        )


@dataclass(frozen=True)
class Tuning:
    """Result of tuning.

    Attributes:
        effort: the least effort that reached the recall.
        anchors: number of sampled anchors.
        recall, low, high: over the stored depth, with its 95 % interval.
        curve: the tried efforts, each with its mean recall over the stored depth.
    """

    effort: Effort
    anchors: int
    recall: float
    low: float
    high: float
    curve: list[dict[str, Any]]

    def write(self, file: BinaryIO) -> None:
        """Write it as JSON."""
        file.write(json.dumps(asdict(self), indent=1).encode())

    @property
    def summary(self) -> dict[str, Any]:
        """For manifest, log and status."""
        return {
            "nprobe": self.effort.nprobe,
            "proposed": self.effort.proposed,
            "recall_anchors": self.anchors,
            "recall": round(self.recall, 4),
            "recall_interval": [round(self.low, 4), round(self.high, 4)],
        }


def remarks(stats: Mapping[str, Any]) -> list[tuple[int, str]]:
    """What the statistics of a stage say about recall, as remarks of the stage."""
    text = _sentence(stats)
    return [(logging.INFO, text)] if text else []


def _sentence(stats: Mapping[str, Any]) -> str | None:
    if "recall_window" in stats:
        window = stats["recall_window"]
        first, last = window["first"], window["last"] - 1
        return (
            f"search finds {window['recall']:.2%} ({window['low']:.2%} to {window['high']:.2%}) of the true candidates"
            f" at ranks {first} to {last}; the document at rank {first} truly is"
            f" {window['shift_first']:.1f} ranks deeper, the one at rank {last} {window['shift_last']:.1f}"
        )
    if "recall_anchors" not in stats:
        return None
    effort = _effort(stats["kind"], stats)
    low, high = stats["recall_interval"]
    return (
        f"{stats['kind']} ({effort}) finds {stats['recall']:.2%} ({low:.2%} to {high:.2%}) of the true"
        f" candidates of {stats['recall_anchors']:,} anchors"
    )


def read_tuning(path: Path) -> Tuning:
    """Read what `Tuning.write` wrote."""
    found = json.loads(path.read_text())
    return Tuning(**{**found, "effort": Effort(**found["effort"])})


def window(measured: recall.Recall, config: Config) -> dict[str, float]:
    """Recall over the ranks that `mining.range_min` and `mining.range_max` choose from, as far as they are stored.

    Raises:
        RecallError: it is below `index.min_recall`: tuning covers the entire depth, the window may be at its end.
    """
    depth, wanted = measured.hits.shape[1], config.index.min_recall
    first = min(config.mining.range_min, depth - 1)
    found = measured.window(first, max(first + 1, min(config.mining.range_max or depth, depth)))
    if found["recall"] < wanted:
        raise RecallError(
            f"index.kind {config.index.kind} finds {found['recall']:.4f} of the true candidates at ranks {first} to"
            f" {found['last'] - 1}, but index.min_recall is {wanted}: raise it, so that more is searched, or choose a"
            " window of lower ranks"
        )
    return found


def tune(
    opened: Approximate, anchors: ann.Vectors, config: Config, *, candidates: int, budget: Budget
) -> tuple[Tuning, recall.Recall]:
    """Find the least effort that reaches `index.min_recall`, and its recall.

    Args:
        candidates: only rows before this one can be among the nearest.

    Raises:
        RecallError: no effort does; the message shows the curve.
    """
    count = min(config.index.recall_anchors, anchors.rows)
    chosen = np.sort(np.random.default_rng(config.seed).choice(anchors.rows, count, replace=False))
    sampled = anchors.take(chosen)
    depth = min(config.depth, candidates)
    exact = ann.search_exact(
        sampled,
        opened.vectors,
        depth,
        candidates=candidates,
        positives=factory.NO_PAIRS,
        budget=budget,
    ).rows
    opened = opened.before(candidates)
    curve: list[dict[str, Any]] = []
    for effort, hits in _efforts(opened, sampled, exact, config, candidates, budget):
        measured = recall.Recall(hits)
        mean, low, high = measured.over(0, depth)
        curve.append({**asdict(effort), "recall": round(mean, 4)})
        if low >= config.index.min_recall or mean == 1.0:
            return Tuning(effort, count, mean, low, high, curve), measured
    kind, some = config.index.kind, [*curve[: -1 : -(-len(curve) // _SHOWN)], curve[-1]]
    shown = "; ".join(f"{_effort(kind, step)}: recall {step['recall']:.4f}" for step in some)
    fixed = " raise index.nprobe or set it to null," if config.index.nprobe else ""
    raise RecallError(
        f"index.kind {kind} does not reliably reach index.min_recall {config.index.min_recall} over the"
        f" {depth} nearest documents of {count:,} anchors: {shown}. To continue,{fixed} lower index.min_recall, choose"
        " another kind, or search exactly with index.kind: stream"
    )


def _effort(kind: str, values: Mapping[str, Any]) -> str:
    names = {"efSearch" if coded.is_graph(kind) else "nprobe": values["nprobe"], "proposed": values["proposed"]}
    return ", ".join(f"{name} {value:,}" for name, value in names.items() if value) or "as it is"


def _efforts(
    opened: Approximate, anchors: Floats, exact: Ints, config: Config, candidates: int, budget: Budget
) -> Iterator[tuple[Effort, Mask]]:
    """Efforts to try in order, each with the exact rows it finds; the caller stops at the first sufficient one."""
    if isinstance(opened.index, lists.Lists):
        # A row is found exactly if its list is probed: the order of the lists gives the result for every nprobe.
        place = lists.places(opened.index, anchors, exact, budget)
        most = len(opened.index.centroids)
        if config.index.nprobe:
            yield Effort(min(config.index.nprobe, most), None), place < config.index.nprobe
            return
        tried = 1
        while tried < most:
            yield Effort(tried, None), place < tried
            tried = min(most, max(tried + 1, tried * 17 // 16))
        yield Effort(most, None), place < most
        return
    depth, knob = exact.shape[1], coded.effort(opened.index[0][0])
    highest = knob[1] if knob else 0
    nprobe = (config.index.nprobe or 1) if knob else None
    while True:
        # A row is found exactly if it is proposed: one search gives the result for every smaller number of proposals.
        last = not nprobe or config.index.nprobe is not None or nprobe >= highest
        most = min((_MOST_PROPOSED if last else _MOST_PROPOSED // 4) * depth, candidates)
        found = coded.propose(anchors, opened.index, effort_value=nprobe, proposed=most, budget=budget)
        place = np.concatenate([recall.places(rows, exact[here]) for here, rows in found])
        proposed = depth
        while proposed < most:
            yield Effort(nprobe, proposed), place < proposed
            proposed = min(most, max(proposed + 1, proposed * 17 // 16))
        yield Effort(nprobe, most), place < most
        if last:
            return
        nprobe = min(2 * (nprobe or 1), highest)
