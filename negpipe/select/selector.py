"""Selection over stored candidates: what `triplets`, `export` and `explain` all see.

One slice of anchors with its candidates becomes units. A unit is an anchor, or with
`mining.margin_reference: each` an (anchor, positive) pair; it has its positives, the negatives chosen for
them, and the fate of every candidate. The same config and the same parts give the same units.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from negpipe import ann
from negpipe.config.schema import Config, Mining
from negpipe.data import candidates
from negpipe.data.candidates import Candidates, Deeper
from negpipe.data.namesakes import Namesakes
from negpipe.data.tables import Rows, open_table, ragged
from negpipe.errors import InputError
from negpipe.select import filters, randoms, rules
from negpipe.select.rules import Fate

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

SOURCES = ("mined", "random")


@dataclass(frozen=True)
class Units:
    """What was chosen for u units of one slice of anchors.

    Attributes:
        anchors: the slice's rows of ingest's anchor table.
        anchor: (u,) row of `anchors` of each unit.
        positives: rows of all units' positives, ragged by `positive_offsets` (u + 1,); scores and grades alike.
        positive_ranks: raw rank of each positive, -1 beyond the depth.
        negatives: rows of all units' negatives, the mined by rank, then the random as drawn, ragged by
            `negative_offsets` (u + 1,); scores alike.
        negative_ranks: raw rank of each negative, -1 for random ones.
        negative_sources: uint8, place in `SOURCES` of each negative.
        fates: (u, k) uint8, what became of each candidate.
        references: (u,) the positive score that each unit's margins refer to, NaN where there is none.
    """

    anchors: pa.Table
    anchor: Ints
    positives: Ints
    positive_offsets: Ints
    positive_scores: Floats
    positive_ranks: Ints
    grades: Floats
    negatives: Ints
    negative_offsets: Ints
    negative_scores: Floats
    negative_ranks: Ints
    negative_sources: npt.NDArray[np.uint8]
    fates: npt.NDArray[np.uint8]
    references: Floats

    @property
    def counts(self) -> Ints:
        """(u,) how many negatives each unit got."""
        return np.diff(self.negative_offsets)

    @property
    def given_up(self) -> Mask:
        """(u,) whether a unit had negatives, but too few, and gave them up (on_shortage drop)."""
        return np.asarray((self.fates == Fate.SHORTAGE).any(axis=1))

    def only_negatives(self) -> Units:
        """The same without the positives that `output.include_positives` ranks among the negatives."""
        # Units of pairs have but one positive each: what counts are all of the anchor.
        anchor = self.anchor * (int(max(self.positives.max(initial=0), self.negatives.max(initial=0))) + 1)
        known = np.repeat(anchor, np.diff(self.positive_offsets)) + self.positives
        kept = ~np.isin(np.repeat(anchor, self.counts) + self.negatives, known)
        negatives, offsets = _where(self.negatives, self.negative_offsets, kept)
        return replace(
            self,
            negatives=negatives,
            negative_offsets=offsets,
            negative_scores=self.negative_scores[kept],
            negative_ranks=self.negative_ranks[kept],
            negative_sources=self.negative_sources[kept],
        )


@dataclass(frozen=True)
class PartFiles:
    """One part of anchors: the files of ingest, search and encode, and deeper candidates where there are any."""

    anchors: Path
    candidates: Path
    vectors: Path
    deeper: Path | Iterable[Deeper] | None = None


@dataclass(frozen=True)
class Choice:
    """What became of the candidates of u units.

    Attributes:
        anchor: (u,) as in `Units`.
        offsets: (u + 1,) where each unit's positives begin.
        reference: (u,) as `Units.references`.
        rows: (n, k) the candidates of each anchor; scores alike.
        fates: (u, k) what became of them for each unit.
    """

    anchor: Ints
    offsets: Ints
    reference: Floats
    rows: Ints
    scores: Floats
    fates: npt.NDArray[np.uint8]

    @property
    def taken(self) -> Ints:
        """(u,) how many were taken."""
        return np.asarray((self.fates == Fate.TAKEN).sum(axis=1))


class Selector:
    """Applies a config's mining rules; holds what all slices share.

    Args:
        config: a resolved one.
        corpus: ingest's documents.
        namesakes: what other anchors of the same text have.
        searchable: how many documents, from the first on, can be negatives.
        vectors: theirs, encode's parts; needed where random negatives are asked for.
        threads: threads that compare texts. Changes no result.
    """

    def __init__(
        self,
        config: Config,
        corpus: Rows,
        namesakes: Namesakes,
        *,
        searchable: int,
        vectors: Sequence[Path] = (),
        threads: int = 1,
    ) -> None:
        self._config, self._corpus = config, corpus
        self._source = filters.Lookup(config, corpus, namesakes, threads)
        self.filters = filters.Filters(self._source)
        self._searchable, self._vectors = searchable, vectors
        names = {field.name for field in fields(rules.Rules)}
        settings = {name: value for name, value in config.mining.model_dump().items() if name in names}
        if config.output.format == "n-tuple" and config.mining.on_shortage == "keep":
            settings["on_shortage"] = "drop"  # its rows have no room for fewer
        if config.mining.on_shortage == "random":  # random ones are added to what is selected
            settings["on_shortage"] = "keep"
        if not config.mining.num_negatives:
            settings["sampling_strategy"] = "top"
        self.rules = rules.Rules(**settings)
        self.depth = config.depth

    @cached_property
    def _documents(self) -> ann.Vectors:
        return ann.open_parts(self._vectors)

    @property
    def mining(self) -> Mining:
        """The settings."""
        return self._config.mining

    @property
    def compared(self) -> tuple[int, float]:
        """Pairs of texts compared so far, and the seconds it took."""
        finder = self._source.duplicates
        return (finder.pairs, finder.seconds) if finder else (0, 0.0)

    def slices(self, part: PartFiles, every: int = 1) -> Iterator[tuple[Candidates, Units]]:
        """Everything of one part, a slice of anchors at a time.

        Args:
            part: its files.
            every: of how many anchors one is looked at.

        Yields:
            the candidates of a slice as they are stored, and its units.

        Raises:
            DamagedError: a file is not whole.
            InputError: an anchor is short of negatives, with `mining.on_shortage: fail`.
        """
        table = open_table(part.anchors)
        for piece in self._read(part, table):
            wanted = np.flatnonzero(piece.anchors % every == 0)
            found = piece if every == 1 else piece.take(wanted)
            units = self._units(part, table, found)
            self._check_shortage(units)
            yield found, units

    def one(self, part: PartFiles, anchor: int) -> tuple[Candidates, Units]:
        """The same for one anchor, by its place in the part; it may be short."""
        table = open_table(part.anchors)
        for piece in self._read(part, table):
            if len(at := np.flatnonzero(piece.anchors == anchor)):
                alone = piece.take(at)
                return alone, self._units(part, table, alone)
        raise IndexError(f"{part.candidates} holds no candidates of anchor number {anchor}")

    def _read(self, part: PartFiles, table: pa.Table) -> Iterator[Candidates]:
        score = self._config.mining.score
        return candidates.read(part.candidates, table["id"], part.deeper, depth=self.depth, score=score)

    def _units(self, part: PartFiles, table: pa.Table, found: Candidates) -> Units:
        units = self.select(rows_of(table, found.anchors), found)
        if self._config.mining.draws:
            units = self._with_random(units, ann.open_parts([part.vectors]).take(found.anchors))
        return units

    def short(self, anchors: pa.Table, found: Candidates) -> Ints:
        """Anchors of a slice that lack negatives and may find them among deeper candidates, ascending."""
        wanted, least = self._config.mining.num_negatives, self._config.mining.min_score
        hopeful = found.rows[:, -1] >= 0
        if least is not None:
            hopeful &= found.scores[:, -1] >= np.float32(least)
        short = np.flatnonzero(hopeful)
        # Most find what they need among the first candidates: only the others are looked at whole.
        for width in (2 * (self.rules.range_min + wanted) + 16, found.rows.shape[1]):
            chosen = self.choose(anchors.take(pa.array(short)), found.narrowed(width).take(short))
            short = short[np.unique(chosen.anchor[chosen.taken < wanted])]
        return short

    def select(self, anchors: pa.Table, found: Candidates) -> Units:
        """Choose mined negatives for a slice of anchors."""
        grades, _ = ragged(anchors["grades"])
        chosen = self.choose(anchors, found)
        unit, column = np.nonzero(chosen.fates == Fate.TAKEN)
        taken = chosen.anchor[unit], column
        return Units(
            anchors=anchors,
            anchor=chosen.anchor,
            positives=found.positives,
            positive_offsets=chosen.offsets,
            positive_scores=found.positive_scores,
            positive_ranks=_ranks(found),
            grades=grades.astype(np.float32),
            negatives=chosen.rows[taken],
            negative_offsets=np.concatenate([[0], np.cumsum(chosen.taken)]),
            negative_scores=chosen.scores[taken],
            negative_ranks=column,
            negative_sources=np.zeros(len(column), np.uint8),
            fates=chosen.fates,
            references=chosen.reference,
        )

    def choose(self, anchors: pa.Table, found: Candidates, dropped: rules.Fates | None = None) -> Choice:
        """What becomes of every candidate of a slice of anchors; random negatives are not among them.

        Args:
            anchors: a slice of ingest's anchors.
            found: their candidates.
            dropped: what `Filters.of_documents` says of those looked at, where the caller knows it already.
        """
        each = self._config.mining.margin_reference == "each"
        if each:
            anchor = np.repeat(np.arange(len(found.rows)), np.diff(found.offsets))
            offsets = np.arange(len(anchor) + 1)
            reference = found.positive_scores
        else:
            anchor, offsets = np.arange(len(found.rows)), found.offsets
            reference = rules.reference_scores(found.positive_scores, offsets, self._reference)
        positives = self._reference_rows(found.positives, found.positive_scores, offsets)
        depth = self._config.mining.depth or found.rows.shape[1]
        assert isinstance(depth, int), "the config is not resolved"
        rows, scores = found.rows[:, :depth], found.scores[:, :depth]
        if dropped is None:
            dropped = self.filters.of_documents(anchors, np.arange(len(rows)), rows)
        else:
            dropped = dropped[:, :depth].copy()
        uniform = self._uniform(anchors, rows)
        own: Mask | None = None
        if self._config.output.include_positives:
            # Positives of other splits, and copies of a positive, would still be false negatives.
            own = rules.contains(rows, found.positives, found.offsets)
            dropped[own] = Fate.TAKEN
        if each:
            dropped = dropped[anchor]
        fates = np.empty(dropped.shape, np.uint8)

        def select(units: Ints) -> None:
            step = max(1, candidates.CELLS // max(1, rows.shape[1]))
            for some in (units[low : low + step] for low in range(0, len(units), step)):
                at = anchor[some]
                block = rows[at], scores[at], reference[some]
                codes = self.filters.of_scores(anchors, at, *block, dropped[some], positives[some])
                if own is not None:  # what is asked for is not cut off
                    codes[own[at]] = Fate.TAKEN
                numbers = None if uniform is None else uniform[at]
                fates[some] = rules.select(*block, codes, numbers, self.rules)

        select(np.arange(len(anchor)))
        if self.filters.has_pairs:
            matters = [Fate.TAKEN, Fate.BEFORE_WINDOW]
            if self.rules.sampling_strategy != "top":
                matters.append(Fate.NOT_SAMPLED)
            waiting = np.ones(fates.shape, np.bool_)
            if own is not None:
                waiting &= ~own[anchor]
            # Who comes in for one that is dropped may have to be dropped too; the others are never asked about.
            while len(cell := np.flatnonzero(waiting & np.isin(fates, matters))):
                unit, column = np.divmod(cell, rows.shape[1])
                waiting[unit, column] = False
                codes = self.filters.of_pairs(anchors, anchor[unit], rows[anchor[unit], column])
                dropped[unit, column] = np.where(codes, codes, dropped[unit, column])
                select(np.unique(unit[codes > 0]))
        return Choice(anchor, offsets, reference, rows, scores, fates)

    def _with_random(self, units: Units, vectors: Floats) -> Units:
        """The units with random negatives, behind the mined ones."""
        settings, mined = self._config.mining, units.counts
        wanted = np.full(len(mined), settings.num_random)
        if settings.on_shortage == "random":
            wanted += np.maximum(settings.num_negatives - mined, 0)
        if settings.on_shortage == "drop":
            wanted[mined < settings.num_negatives] = 0
        positives = self._reference_rows(units.positives, units.positive_scores, units.positive_offsets)
        known, known_offsets = ragged(units.anchors["known"])
        itself = units.anchors["self_row"].to_numpy()

        def barred(some: Ints, rows: Ints) -> Mask:
            anchor = units.anchor[some]
            out = self.filters.of_drawn(units.anchors, anchor, rows, positives[some]) > 0
            out |= rules.contains(rows, known, known_offsets, anchor)
            out |= rules.contains(rows, units.negatives, units.negative_offsets, some)
            out |= rows == itself[anchor, None]
            if self.filters.has_pairs:
                unit, column = np.nonzero(~out)
                out[unit, column] = self.filters.of_pairs(units.anchors, anchor[unit], rows[unit, column]) > 0
            return out

        identity = units.anchors["id_hash"].to_numpy()[units.anchor]
        rows, offsets = randoms.draw(self._config.seed, identity, wanted, self._searchable, barred)
        unit = np.repeat(np.arange(len(mined)), np.diff(offsets))
        scores = ann.score_pairs(vectors, self._documents, (units.anchor[unit], rows))
        order = np.argsort(np.concatenate([np.repeat(np.arange(len(mined)), mined), unit]), kind="stable")

        def joined(of_mined: npt.NDArray[Any], of_random: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return np.concatenate([of_mined, of_random])[order]

        return replace(
            units,
            negatives=joined(units.negatives, rows),
            negative_offsets=units.negative_offsets + offsets,
            negative_scores=joined(units.negative_scores, scores),
            negative_ranks=joined(units.negative_ranks, np.full(len(rows), -1)),
            negative_sources=joined(units.negative_sources, np.full(len(rows), SOURCES.index("random"), np.uint8)),
        )

    def without_itself(self, found: Candidates, units: Units) -> tuple[Candidates, Units]:
        """The same without the document that is the anchor itself (`mining.anchor_id`), which stands in ranks."""
        itself = self.filters.dropped_by("anchor_id", units.anchors, found.rows)
        if not itself.any():
            return found, units
        found = found.without(itself)
        return found, replace(units, positive_ranks=_ranks(found))

    def _check_shortage(self, units: Units) -> None:
        wanted = self._config.mining.wanted
        short = units.counts < wanted
        if self._config.mining.on_shortage != "fail" or not short.any():
            return
        names = ", ".join(repr(units.anchors["id"][int(at)].as_py()) for at in units.anchor[short][:5])
        raise InputError(
            f"at least {int(short.sum())} anchors have fewer than {wanted} negatives: {names}",
            field="mining.on_shortage",
            remedy="Widen the window, lower the margins, deepen search.depth, or set mining.on_shortage: keep or drop",
        )

    @property
    def _reference(self) -> Literal["min", "max"]:
        return "max" if self._config.mining.margin_reference == "max" else "min"

    def _reference_rows(self, positives: Ints, scores: Floats, offsets: Ints) -> Ints:
        """(u,) row of the positive that each unit's margins refer to, -1 for one without positives."""
        return np.append(positives, -1)[rules.reference_positives(scores, offsets, self._reference)]

    def _uniform(self, anchors: pa.Table, rows: Ints) -> npt.NDArray[np.float64] | None:
        if self._config.mining.sampling_strategy == "top":
            return None
        documents = self._corpus.numbers("id_hash", np.maximum(rows, 0))
        return rules.uniform(self._config.seed, anchors["id_hash"].to_numpy(), documents)


def rows_of(table: pa.Table, rows: Ints) -> pa.Table:
    """Rows of a mapped table; without a copy where they follow each other."""
    together = bool((np.diff(rows) == 1).all())
    return table.slice(int(rows[0]) if len(rows) else 0, len(rows)) if together else table.take(pa.array(rows))


def _ranks(found: Candidates) -> Ints:
    """Raw rank of every positive, -1 beyond the depth."""
    ranks = np.full(len(found.positives), -1, np.int64)
    counts, depth = np.diff(found.offsets), max(1, found.rows.shape[1])
    anchor = np.repeat(np.arange(len(counts)), counts)
    few = np.flatnonzero(counts[anchor] <= rules.LONG)
    step = max(1, candidates.CELLS // depth)
    for here in (few[low : low + step] for low in range(0, len(few), step)):
        hit = found.rows[anchor[here]] == found.positives[here, None]
        ranks[here] = np.where(hit.any(axis=1), hit.argmax(axis=1), -1)
    for at in np.flatnonzero(counts > rules.LONG):
        own, rows = slice(*found.offsets[at : at + 2]), found.rows[at]
        order = np.argsort(rows)
        place = order[np.minimum(np.searchsorted(rows, found.positives[own], sorter=order), len(rows) - 1)]
        ranks[own] = np.where(rows[place] == found.positives[own], place, -1)
    return ranks


def _where(values: Ints, offsets: Ints, keep: Mask) -> tuple[Ints, Ints]:
    """The kept values of ragged lists, still ragged."""
    return values[keep], np.concatenate([[0], np.cumsum(keep)])[offsets].astype(np.int64)
