"""Selection over stored candidates: shared by `triplets`, `export` and `explain`.

A slice of anchors with its candidates is turned into units. A unit is an anchor, or with
`mining.margin_reference: each` an (anchor, positive) pair; it has its positives, the negatives chosen for
them, and the fate of every candidate. The same config and parts give the same units.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from negpipe import ann
from negpipe.config.schema import Config, Mining
from negpipe.data import candidates
from negpipe.data.arrays import Floats, Ints, Mask
from negpipe.data.candidates import Candidates, Deeper
from negpipe.data.namesakes import Namesakes
from negpipe.data.tables import Rows, members, open_table, ragged
from negpipe.errors import InputError
from negpipe.select import filters, preferred, randoms, rules
from negpipe.select.preferred import Preferred
from negpipe.select.rules import Fate

SOURCES = ("mined", "random", "given", "judged")


@dataclass(frozen=True)
class Units:
    """The selection for u units of one slice of anchors.

    Attributes:
        anchors: the slice's rows of ingest's anchor table.
        anchor: (u,) row of `anchors` of each unit.
        positives: rows of all units' positives, ragged by `positive_offsets` (u + 1,); likewise scores and grades.
        positive_ranks: raw rank of each positive, -1 beyond the depth.
        negatives: rows of all units' negatives, preferred, then mined by rank, then random as drawn, ragged by
            `negative_offsets` (u + 1,); likewise scores.
        negative_ranks: raw rank of each negative, -1 for random ones and beyond the depth.
        negative_sources: uint8, index in `SOURCES` of each negative.
        fates: (u, k) uint8, the fate of each candidate.
        references: (u,) the positive score that each unit's margins refer to, NaN if there is none.
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
        """(u,) number of negatives per unit."""
        return np.diff(self.negative_offsets)

    def of_source(self, *names: str) -> Ints:
        """(u,) number of negatives per unit from the given `SOURCES`."""
        some = np.isin(self.negative_sources, [SOURCES.index(name) for name in names])
        return np.diff(np.concatenate([[0], np.cumsum(some)])[self.negative_offsets])

    @property
    def negative_grades(self) -> Floats:
        """(m,) the grade of each negative that was judged for its anchor below `data.min_grade`; else NaN."""
        refused, offsets = ragged(self.anchors["refused"])
        judged, _ = ragged(self.anchors["refused_grades"])
        grades = np.full(len(self.negatives), np.nan, np.float32)
        if len(refused):
            anchor = np.repeat(self.anchor, self.counts)
            width = int(max(refused.max(), self.negatives.max(initial=0))) + 1
            keys = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)) * width + refused
            wanted = anchor * width + self.negatives
            place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)  # lists ascend, so keys do too
            grades = np.where(keys[place] == wanted, judged.astype(np.float32)[place], np.float32(np.nan))
        return grades

    @property
    def given_up(self) -> Mask:
        """(u,) whether a unit had too few negatives and gave them up (on_shortage drop)."""
        return np.asarray((self.fates == Fate.SHORTAGE).any(axis=1))

    def only_negatives(self) -> Units:
        """A copy without the positives that `output.include_positives` ranks among the negatives."""
        # Units of pairs have only one positive each: use all positives of the anchor.
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
    """One part of anchors: the files of ingest, search and encode, and deeper candidates if there are any."""

    anchors: Path
    candidates: Path
    vectors: Path
    deeper: Path | Iterable[Deeper] | None = None


@dataclass(frozen=True)
class Choice:
    """The fates of the candidates of u units.

    Attributes:
        anchor: (u,) as in `Units`.
        offsets: (u + 1,) where each unit's positives start.
        reference: (u,) see `Units.references`.
        rows: (n, k) the candidates of each anchor; likewise scores.
        fates: (u, k) their fates for each unit.
        preferred: negatives of each anchor that are taken first.
        wanted: (u,) number to take in addition to those.
    """

    anchor: Ints
    offsets: Ints
    reference: Floats
    rows: Ints
    scores: Floats
    fates: npt.NDArray[np.uint8]
    preferred: Preferred
    wanted: Ints

    @property
    def taken(self) -> Ints:
        """(u,) number taken."""
        return np.asarray((self.fates == Fate.TAKEN).sum(axis=1))


class Selector:
    """Applies a config's mining rules; holds the state shared by all slices.

    Args:
        config: a resolved config.
        corpus: ingest's documents.
        namesakes: positives of other anchors with the same text.
        searchable: number of documents, from the first on, that can be negatives.
        vectors: their vectors, encode's parts; needed for random negatives.
        threads: threads that compare texts. Does not affect results.
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
            settings["on_shortage"] = "drop"  # its rows have a fixed number of negatives
        if config.mining.on_shortage == "random":  # random ones are added after selection
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
        """All candidates and units of one part, a slice of anchors at a time.

        Args:
            part: its files.
            every: select one in so many anchors.

        Yields:
            the stored candidates of a slice, and its units.

        Raises:
            DamagedError: a file is incomplete.
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
        """The same for one anchor, by its position in the part; it may be short."""
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
        anchors, mining = rows_of(table, found.anchors), self._config.mining
        if not (mining.prefers or mining.draws):
            return self.select(anchors, found)
        vectors = ann.open_parts([part.vectors]).take(found.anchors)
        units = self.select(anchors, found, vectors)
        return self._with_random(units, vectors) if mining.draws else units

    def short(self, anchors: pa.Table, found: Candidates) -> Ints:
        """Anchors of a slice that lack negatives and may get them from deeper candidates, ascending."""
        wanted, least = self._config.mining.num_negatives, self._config.mining.min_score
        hopeful = found.rows[:, -1] >= 0
        if least is not None:
            hopeful &= found.scores[:, -1] >= np.float32(least)
        short = np.flatnonzero(hopeful)
        # Most find what they need among the first candidates: only the others use all.
        for width in (2 * (self.rules.range_min + wanted) + 16, found.rows.shape[1]):
            chosen = self.choose(anchors.take(pa.array(short)), found.narrowed(width).take(short))
            short = short[np.unique(chosen.anchor[chosen.taken < chosen.wanted])]
        return short

    def select(self, anchors: pa.Table, found: Candidates, vectors: Floats | None = None) -> Units:
        """Choose preferred and mined negatives for a slice of anchors; the preferred are scored by `vectors`."""
        grades, _ = ragged(anchors["grades"])
        chosen = self.choose(anchors, found)
        unit, column = np.nonzero(chosen.fates == Fate.TAKEN)
        taken = chosen.anchor[unit], column
        units = Units(
            anchors=anchors,
            anchor=chosen.anchor,
            positives=found.positives,
            positive_offsets=chosen.offsets,
            positive_scores=found.positive_scores,
            positive_ranks=_ranks(found.rows, found.positives, found.offsets),
            grades=grades.astype(np.float32),
            negatives=chosen.rows[taken],
            negative_offsets=np.concatenate([[0], np.cumsum(chosen.taken)]),
            negative_scores=chosen.scores[taken],
            negative_ranks=column,
            negative_sources=np.zeros(len(column), np.uint8),
            fates=chosen.fates,
            references=chosen.reference,
        )
        return self._with_preferred(units, chosen, found, vectors) if len(chosen.preferred.rows) else units

    def _with_preferred(self, units: Units, chosen: Choice, found: Candidates, vectors: Floats | None) -> Units:
        """The units with preferred negatives, before the mined ones."""
        assert vectors is not None
        at, offsets = members(chosen.preferred.offsets, units.anchor)
        if self.rules.on_shortage == "drop":
            whole = np.repeat(units.counts >= chosen.wanted, np.diff(offsets))
            at, offsets = _where(at, offsets, whole)
        unit = np.repeat(np.arange(len(units.anchor)), np.diff(offsets))
        rows, sources = chosen.preferred.rows[at], chosen.preferred.sources[at]
        scores = ann.score_pairs(vectors, self._documents, (units.anchor[unit], rows))
        ranks = _ranks(found.rows, chosen.preferred.rows, chosen.preferred.offsets)[at]
        return _joined(_Negatives(unit, rows, scores, ranks, sources), units, before=True)

    def _preferred(self, anchors: pa.Table, found: Candidates) -> Preferred:
        """The negatives of a slice of anchors that are taken before any other."""
        asked = preferred.asked_for(anchors, self._config.mining)
        if not len(asked.rows):
            return asked
        owner, rows = np.repeat(np.arange(len(asked.counts)), asked.counts), asked.rows[:, None]
        positives = self._reference_rows(found.positives, found.positive_scores, found.offsets)[owner]
        allowed = (self.filters.of_drawn(anchors, owner, rows, positives) == 0)[:, 0]
        allowed &= (asked.rows < self._searchable) & (asked.rows != anchors["self_row"].to_numpy()[owner])
        if self.filters.has_pairs and allowed.any():
            allowed[allowed] = self.filters.of_pairs(anchors, owner[allowed], asked.rows[allowed]) == 0
        return preferred.best(asked, allowed, _ranks(found.rows, asked.rows, asked.offsets), self._config.mining)

    def choose(self, anchors: pa.Table, found: Candidates, dropped: rules.Fates | None = None) -> Choice:
        """The fate of every candidate of a slice of anchors; without random negatives.

        Args:
            anchors: a slice of ingest's anchors.
            found: their candidates.
            dropped: the result of `Filters.of_documents` for these candidates, if the caller has it.
        """
        anchor, offsets, reference = self._references(found)
        positives = self._reference_rows(found.positives, found.positive_scores, offsets)
        depth = self._config.mining.depth or found.rows.shape[1]
        assert isinstance(depth, int), "the config is not resolved"
        rows, scores = found.rows[:, :depth], found.scores[:, :depth]
        if dropped is None:
            dropped = self.filters.of_documents(anchors, np.arange(len(rows)), rows)
        else:
            dropped = dropped[:, :depth].copy()
        first = self._preferred(anchors, found)
        wanted = (self.rules.num_negatives - first.instead(self._config.mining))[anchor]
        if len(first.rows):
            dropped[rules.contains(rows, first.rows, first.offsets)] = Fate.PREFERRED
        uniform = self._uniform(anchors, rows)
        own: Mask | None = None
        if self._config.output.include_positives:
            # Positives of other splits, and copies of a positive, would be false negatives too.
            own = rules.contains(rows, found.positives, found.offsets)
            dropped[own] = Fate.TAKEN
        if self._config.mining.margin_reference == "each":
            dropped = dropped[anchor]
        fates = np.empty(dropped.shape, np.uint8)

        def select(units: Ints) -> None:
            step = max(1, candidates.CELLS // max(1, rows.shape[1]))
            for some in (units[low : low + step] for low in range(0, len(units), step)):
                at = anchor[some]
                block = rows[at], scores[at], reference[some]
                codes = self.filters.of_scores(anchors, at, *block, dropped[some], positives[some])
                if own is not None:  # cutoffs do not apply to preferred negatives
                    codes[own[at]] = Fate.TAKEN
                numbers = None if uniform is None else uniform[at]
                fates[some] = rules.select(*block, codes, numbers, self.rules, wanted[some])

        select(np.arange(len(anchor)))
        if self.filters.has_pairs:
            matters = [Fate.TAKEN, Fate.BEFORE_WINDOW]
            if self.rules.sampling_strategy != "top":
                matters.append(Fate.NOT_SAMPLED)
            waiting = np.ones(fates.shape, np.bool_)
            if own is not None:
                waiting &= ~own[anchor]
            # The replacement of a dropped candidate may have to be dropped too; the others are never compared.
            while len(cell := np.flatnonzero(waiting & np.isin(fates, matters))):
                unit, column = np.divmod(cell, rows.shape[1])
                waiting[unit, column] = False
                codes = self.filters.of_pairs(anchors, anchor[unit], rows[anchor[unit], column])
                dropped[unit, column] = np.where(codes, codes, dropped[unit, column])
                select(np.unique(unit[codes > 0]))
        return Choice(anchor, offsets, reference, rows, scores, fates, first, wanted)

    def _references(self, found: Candidates) -> tuple[Ints, Ints, Floats]:
        """The units of a slice: the anchor of each, where its positives start, and the score that margins refer to."""
        if self._config.mining.margin_reference == "each":
            anchor = np.repeat(np.arange(len(found.rows)), np.diff(found.offsets))
            return anchor, np.arange(len(anchor) + 1), found.positive_scores
        reference = rules.reference_scores(found.positive_scores, found.offsets, self._reference)
        return np.arange(len(found.rows)), found.offsets, reference

    def _with_random(self, units: Units, vectors: Floats) -> Units:
        """The units with random negatives, after the mined ones."""
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
        sources = np.full(len(rows), SOURCES.index("random"), np.uint8)
        return _joined(_Negatives(unit, rows, scores, np.full(len(rows), -1), sources), units)

    def without_itself(self, found: Candidates, units: Units) -> tuple[Candidates, Units]:
        """A copy without the document that is the anchor itself (`mining.anchor_id`), which occupies a rank."""
        itself = filters.own_documents(self.filters.lookup, units.anchors, found.rows)
        if not itself.any():
            return found, units
        found = found.without(itself)
        return found, replace(units, positive_ranks=_ranks(found.rows, found.positives, found.offsets))

    def _check_shortage(self, units: Units) -> None:
        wanted = self._config.mining.wanted
        short = units.counts < wanted
        if self._config.mining.on_shortage != "fail" or not short.any():
            return
        names = ", ".join(repr(units.anchors["id"][int(at)].as_py()) for at in units.anchor[short][:5])
        raise InputError(
            f"at least {int(short.sum())} anchors have fewer than {wanted} negatives: {names}",
            field="mining.on_shortage",
            remedy="Widen the window, lower the margins, raise search.depth, or set mining.on_shortage: keep or drop",
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
    """Rows of a mapped table; without a copy if they are consecutive."""
    together = bool((np.diff(rows) == 1).all())
    return table.slice(int(rows[0]) if len(rows) else 0, len(rows)) if together else table.take(pa.array(rows))


class _Negatives(NamedTuple):
    """Negatives of units, (m,) each: their unit, ascending, and as in `Units`."""

    unit: Ints
    rows: Ints
    scores: Floats
    ranks: Ints
    sources: npt.NDArray[np.uint8]


def _joined(more: _Negatives, units: Units, *, before: bool = False) -> Units:
    """The units with more negatives, before or after those they have."""
    own = np.repeat(np.arange(len(units.anchor)), units.counts)
    order = np.argsort(np.concatenate([more.unit, own] if before else [own, more.unit]), kind="stable")

    def joined(there: npt.NDArray[Any], new: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.concatenate([new, there] if before else [there, new])[order]

    counts = np.bincount(more.unit, minlength=len(units.anchor))
    return replace(
        units,
        negatives=joined(units.negatives, more.rows),
        negative_offsets=units.negative_offsets + np.concatenate([[0], np.cumsum(counts)]),
        negative_scores=joined(units.negative_scores, more.scores),
        negative_ranks=joined(units.negative_ranks, more.ranks),
        negative_sources=joined(units.negative_sources, more.sources),
    )


def _ranks(found: Ints, rows: Ints, offsets: Ints) -> Ints:
    """Raw rank of every row among its anchor's candidates, -1 beyond the depth; `rows` are ragged by `offsets`."""
    ranks = np.full(len(rows), -1, np.int64)
    counts, depth = np.diff(offsets), max(1, found.shape[1])
    anchor = np.repeat(np.arange(len(counts)), counts)
    few = np.flatnonzero(counts[anchor] <= rules.LONG)
    step = max(1, candidates.CELLS // depth)
    for here in (few[low : low + step] for low in range(0, len(few), step)):
        hit = found[anchor[here]] == rows[here, None]
        ranks[here] = np.where(hit.any(axis=1), hit.argmax(axis=1), -1)
    for at in np.flatnonzero(counts > rules.LONG):
        own, there = slice(*offsets[at : at + 2]), found[at]
        order = np.argsort(there)
        place = order[np.minimum(np.searchsorted(there, rows[own], sorter=order), len(there) - 1)]
        ranks[own] = np.where(there[place] == rows[own], place, -1)
    return ranks


def _where(values: Ints, offsets: Ints, keep: Mask) -> tuple[Ints, Ints]:
    """The kept values of ragged lists, still ragged."""
    return values[keep], np.concatenate([[0], np.cumsum(keep)])[offsets].astype(np.int64)
