"""Documents that must not become negatives: an ordered list of filters.

The order is the precedence: if several filters drop a candidate, the first is counted. Filters that use scores come
last, those that only use documents first. A filter is defined here and listed in `FILTERS`; the counts, the ledger's
columns and the output of `explain` follow from that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from negpipe.config.schema import Config, Mining
from negpipe.data.arrays import Floats, Hashes, Ints, Mask
from negpipe.data.namesakes import Namesakes
from negpipe.data.tables import Rows, ragged
from negpipe.data.texts import normalize
from negpipe.select import columns, duplicates, rules, verdicts
from negpipe.select.rules import Fate, Fates


@dataclass(frozen=True)
class Lookup:
    """Lookups for filters: the config, ingest's documents, and the positives of other anchors with the same text."""

    config: Config
    corpus: Rows
    namesakes: Namesakes
    threads: int = 1

    @property
    def mining(self) -> Mining:
        """The settings."""
        return self.config.mining

    @cached_property
    def duplicates(self) -> duplicates.Finder | None:
        """The comparison of texts, if configured."""
        threshold = self.mining.near_duplicate
        return None if threshold is None else duplicates.Finder(self.corpus, threshold, self.threads)


def _no_scores() -> Floats:
    return np.empty((0, 0), np.float32)


@dataclass(frozen=True)
class Grid:
    """n lines of k documents each, to be filtered.

    Attributes:
        anchors: rows of ingest's anchor table.
        anchor: (n,) the row of `anchors` that a line belongs to.
        rows: (n, k) of the corpus, -1 for no document.
        scores: (n, k), for filters that use scores; else empty.
        references: (n,) the positive score that margins refer to, NaN if there is none; likewise.
        spared: (n, k) documents that do not count as positives of a namesake, despite being known; None: none.
        positives: (n,) row of the positive that `references` come from, -1 if there is none; with scores only.
    """

    lookup: Lookup
    anchors: pa.Table
    anchor: Ints
    rows: Ints
    scores: Floats = field(default_factory=_no_scores)
    references: Floats = field(default_factory=_no_scores)
    spared: Mask | None = None
    positives: Ints | None = None

    @cached_property
    def known(self) -> tuple[Ints, Ints]:
        """Rows of the anchors' known positives, ragged."""
        return ragged(self.anchors["known"])

    @cached_property
    def normalized(self) -> Hashes:
        """(n, k) hashes of the documents' normalised texts."""
        return self.lookup.corpus.numbers("normalized", np.maximum(self.rows, 0))

    @cached_property
    def texts(self) -> Hashes:
        """(n,) hashes of the anchors' normalised texts."""
        hashes: Hashes = self.anchors["normalized"].to_numpy()[self.anchor]
        return hashes


Masking = Callable[[Grid], Mask]
"""(n, k): the documents of a grid to drop."""


@dataclass(frozen=True)
class Filter:
    """One reason to drop a candidate.

    Attributes:
        name: the reason, as named in the ledger and by `explain`.
        opened: returns its mask function over grids; None if not configured.
        explain: (settings, the candidate's score, the reference) → the reason, in words and numbers.
        sees: documents: properties of an anchor and a document; drawn documents pass through these too. scores: the
            scores of a unit as well. pairs: like documents, but so slow that it runs last, and only on documents that
            pass everything else and affect the choice.
        drawn: for a filter that sees scores: the mask over drawn documents, which have no scores yet.
        helps: the remedy for dropping too many.
        optional: the ledger has a column for it only if configured.
    """

    name: str
    opened: Callable[[Lookup], Masking | None]
    explain: Callable[[Mining, float, float], str]
    sees: Literal["documents", "scores", "pairs"] = "documents"
    drawn: Callable[[Lookup], Masking | None] = lambda lookup: None
    helps: str = ""
    optional: bool = False


def _says(text: str) -> Callable[[Mining, float, float], str]:
    return lambda mining, score, reference: text


def _positive(by_id: bool) -> Callable[[Lookup], Masking | None]:
    def opened(lookup: Lookup) -> Masking | None:
        # One text is one row, regardless of its ids: either setting bars it; the reason depends on the judged id.
        return mask if {"positive_id", "positive_text"} & set(lookup.mining.exclude) else None

    def mask(grid: Grid) -> Mask:
        (known, offsets), (judged, _) = grid.known, ragged(grid.anchors["known_by_id"])
        kept = judged if by_id else ~judged
        ends: Ints = np.concatenate([[0], np.cumsum(kept)])[offsets].astype(np.int64)
        return rules.contains(grid.rows, known[kept], ends, grid.anchor)

    return opened


def _positive_normalized(lookup: Lookup) -> Masking | None:
    def mask(grid: Grid) -> Mask:
        known, offsets = grid.known
        return rules.contains(grid.normalized, lookup.corpus.numbers("normalized", known), offsets, grid.anchor)

    return mask if "positive_normalized" in lookup.mining.exclude else None


def _shared_anchor(lookup: Lookup) -> Masking | None:
    def mask(grid: Grid) -> Mask:
        texts, lists = np.unique(grid.texts, return_inverse=True)
        shared, offsets = lookup.namesakes.of(texts)
        found = rules.contains(grid.rows, shared, offsets, lists)
        if "positive_normalized" in lookup.mining.exclude:
            found |= rules.contains(grid.normalized, lookup.corpus.numbers("normalized", shared), offsets, lists)
        if found.any():
            # Its own positives are among those of its text, and are barred by other reasons or not at all.
            found &= ~rules.contains(grid.rows, *grid.known, grid.anchor)
        return found if grid.spared is None else found & ~grid.spared

    return mask if "shared_anchor" in lookup.mining.exclude else None


def _anchor_text(lookup: Lookup) -> Masking | None:
    if "anchor_text" not in lookup.mining.exclude:
        return None
    return lambda grid: grid.normalized == grid.texts[:, None]


def _anchor_id(lookup: Lookup) -> Masking | None:
    """For sets in which the query is itself a document; with two separate numberings, equal ids mean nothing."""
    if lookup.mining.anchor_id == "never":
        return None

    def mask(grid: Grid) -> Mask:
        found: Mask = grid.rows == grid.anchors["same_id"].to_numpy()[grid.anchor][:, None]
        found &= grid.rows >= 0
        if found.any():
            found &= ~rules.contains(grid.rows, *grid.known, grid.anchor)
        if lookup.mining.anchor_id == "contained":
            line, column = np.nonzero(found)
            asked = grid.anchors["text"].take(pa.array(grid.anchor[line])).to_pylist()
            documents = lookup.corpus.strings("text", grid.rows[line, column]).to_pylist()
            pairs = ((normalize(one), normalize(other)) for one, other in zip(asked, documents, strict=True))
            found[line, column] = [bool(one and other) and (one in other or other in one) for one, other in pairs]
        return found

    return mask


def own_documents(lookup: Lookup, anchors: pa.Table, rows: Ints) -> Mask:
    """(n, k): rows that are the anchor of their line itself (`mining.anchor_id`)."""
    mask = _anchor_id(lookup)
    return mask(Grid(lookup, anchors, np.arange(len(rows)), rows)) if mask else np.zeros(rows.shape, np.bool_)


def _excluded_file(lookup: Lookup) -> Masking | None:
    if lookup.mining.exclude_file is None:
        return None
    named = verdicts.resolve(verdicts.read(Path(lookup.mining.exclude_file)), lookup.corpus)

    def mask(grid: Grid) -> Mask:
        lists = [named.get(identity, []) for identity in grid.anchors["id"].to_pylist()]
        offsets = np.concatenate([[0], np.cumsum([len(rows) for rows in lists])]).astype(np.int64)
        return rules.contains(
            grid.rows, np.array([row for rows in lists for row in rows], np.int64), offsets, grid.anchor
        )

    return mask if named else None


def _not_judged(lookup: Lookup) -> Masking | None:
    """For configs in which documents judged not relevant are the only negatives."""

    def mask(grid: Grid) -> Mask:
        refused, offsets = ragged(grid.anchors["refused"])
        grades, _ = ragged(grid.anchors["refused_grades"])
        judged = ~np.isnan(grades.astype(np.float64))
        ends: Ints = np.concatenate([[0], np.cumsum(judged)])[offsets].astype(np.int64)
        return ~rules.contains(grid.rows, refused[judged], ends, grid.anchor)

    return mask if lookup.mining.judged == "only" else None


def _near_duplicate(lookup: Lookup) -> Masking | None:
    finder = lookup.duplicates
    if finder is None:
        return None

    def mask(grid: Grid) -> Mask:
        owner = np.repeat(grid.anchor, grid.rows.shape[1])
        return finder.find(grid.rows.ravel(), owner, *grid.known).reshape(grid.rows.shape)

    return mask


def _cutoff(setting: str, mask: Callable[[Mining, float, Floats, Floats], Mask]) -> Callable[[Lookup], Masking | None]:
    """A filter with a threshold: (settings, threshold, scores, references as a column) → mask, in float32."""

    def opened(lookup: Lookup) -> Masking | None:
        mining, limit = lookup.mining, getattr(lookup.mining, setting)
        return None if limit is None else lambda grid: mask(mining, limit, grid.scores, grid.references[:, None])

    return opened


def _above(mining: Mining, scores: Floats, limit: npt.ArrayLike) -> Mask:
    return np.greater_equal(scores, limit) if mining.strict else np.greater(scores, limit)


def _below(mining: Mining, scores: Floats, limit: npt.ArrayLike) -> Mask:
    return np.less_equal(scores, limit) if mining.strict else np.less(scores, limit)


# Thresholds are rounded to float32, with the expressions of sentence-transformers 6 (`util/hard_negatives.py`): the
# same float32 scores give the same survivors. Equality with a margin holds for negative positives too.
_max_score = _cutoff("max_score", lambda mining, limit, s, p: _above(mining, s, np.float32(limit)))
_min_score = _cutoff("min_score", lambda mining, limit, s, p: _below(mining, s, np.float32(limit)))
_absolute_margin = _cutoff("absolute_margin", lambda mining, limit, s, p: _above(mining, s + np.float32(limit), p))
_relative_margin = _cutoff(
    "relative_margin", lambda mining, limit, s, p: _above(mining, s, p - np.abs(p) * np.float32(limit))
)


def _invalid_score(_: Lookup) -> Masking:
    return lambda grid: ~np.isfinite(grid.scores)


def _compared(score: float, over: bool, strict: bool, limit: float, detail: str, setting: str) -> str:
    """Both sides with enough digits to distinguish them."""
    sign = ("≥" if strict else ">") if over else ("≤" if strict else "<")
    digits = next((n for n in range(3, 9) if f"{score:.{n}f}" != f"{limit:.{n}f}"), 9)
    return f"{score:.{digits}f} {sign} {detail.format(f'{limit:.{digits}f}')} ({setting})"


def _above_max(mining: Mining, score: float, _: float) -> str:
    return _compared(score, True, mining.strict, mining.max_score or 0.0, "{}", "max_score")


def _below_min(mining: Mining, score: float, _: float) -> str:
    return _compared(score, False, mining.strict, mining.min_score or 0.0, "{}", "min_score")


def _within_absolute(mining: Mining, score: float, p: float) -> str:
    m = mining.absolute_margin or 0.0
    return _compared(score, True, mining.strict, p - m, f"{{}} = {p:.3f} - {m:g}", f"absolute_margin {m:g}")


def _within_relative(mining: Mining, score: float, p: float) -> str:
    m = mining.relative_margin or 0.0
    share = f"{1 - m:g} × {p:.3f}" if p >= 0 else f"{p:.3f} - {m:g} × {-p:.3f}"
    return _compared(score, True, mining.strict, p - abs(p) * m, f"{{}} = {share}", f"relative_margin {m:g}")


FILTERS = (
    Filter("positive_id", _positive(True), _says("a known positive of the anchor")),
    Filter("positive_text", _positive(False), _says("the text of a known positive, under another id")),
    Filter(
        "positive_normalized",
        _positive_normalized,
        _says("the text of a known positive except for case, white space or Unicode form"),
    ),
    Filter("shared_anchor", _shared_anchor, _says("a positive of another anchor with the same text")),
    Filter("anchor_text", _anchor_text, _says("the anchor's own text")),
    Filter("anchor_id", _anchor_id, _says("the anchor itself, by id")),
    Filter("excluded_file", _excluded_file, _says("listed for this anchor in mining.exclude_file")),
    Filter(
        "never_same",
        columns.never_same,
        columns.shares,
        helps="Name fewer columns in mining.never_same, or search deeper (mining.max_depth, search.depth)",
        optional=True,
    ),
    Filter(
        "only_same",
        columns.only_same,
        columns.differs,
        helps="Name fewer columns in mining.only_same, or search deeper (mining.max_depth, search.depth)",
        optional=True,
    ),
    Filter(
        "not_judged",
        _not_judged,
        _says("not judged for the anchor (judged only)"),
        helps="Set mining.judged: prefer",
        optional=True,
    ),
    Filter(
        "near_duplicate",
        _near_duplicate,
        _says("nearly the text of a positive"),
        sees="pairs",
        helps="Set a higher mining.near_duplicate, or search deeper (mining.max_depth, search.depth)",
    ),
    Filter("invalid_score", _invalid_score, _says("the score is not a finite number"), sees="scores"),
    Filter(
        "where",
        columns.where,
        lambda mining, score, reference: f"not {mining.where} (where)",
        sees="scores",
        drawn=columns.where_drawn,
        helps="Relax mining.where, or search deeper (mining.max_depth, search.depth)",
        optional=True,
    ),
    Filter(
        "max_score",
        _max_score,
        _above_max,
        sees="scores",
        helps="Set a higher mining.max_score, or search deeper (mining.max_depth, search.depth)",
    ),
    Filter("min_score", _min_score, _below_min, sees="scores", helps="Set a lower mining.min_score"),
    Filter(
        "absolute_margin",
        _absolute_margin,
        _within_absolute,
        sees="scores",
        helps="Set a smaller mining.absolute_margin, or null, or search deeper (mining.max_depth, search.depth)",
    ),
    Filter(
        "relative_margin",
        _relative_margin,
        _within_relative,
        sees="scores",
        helps="Set a smaller mining.relative_margin, or null, or search deeper (mining.max_depth, search.depth)",
    ),
)

_NOT_DROPPED = (Fate.TAKEN, Fate.PADDING, Fate.PREFERRED)
_CODES = {one.name: rules.FILTERED + place for place, one in enumerate(FILTERS)}
DROPS = _CODES | {fate.name.lower(): int(fate) for fate in Fate if fate not in _NOT_DROPPED}
"""Codes of the drop reasons, in their precedence."""
CODES = {fate.name.lower(): int(fate) for fate in _NOT_DROPPED} | DROPS
"""Codes of all fates of a candidate."""
NAMES = tuple(sorted(CODES, key=CODES.__getitem__))
"""The same, by code."""


HELPS = {
    **{one.name: one.helps for one in FILTERS if one.helps},
    "before_window": "Set a smaller mining.range_min",
    "after_window": "Set a larger mining.range_max",
    "shortage": "Set mining.on_shortage: keep",
}
"""Remedies by reason."""


def filter_of(code: int) -> Filter | None:
    """The filter with a code; None if there is none."""
    return FILTERS[code - rules.FILTERED] if code >= rules.FILTERED else None


class Filters:
    """The opened filters of a config."""

    def __init__(self, lookup: Lookup) -> None:
        self.lookup = lookup
        opened = [(one, one.opened(lookup)) for one in FILTERS]
        self._asked: list[tuple[str, int, Masking]]
        self._asked = [(one.sees, _CODES[one.name], mask) for one, mask in opened if mask]
        self._asked += [("drawn", _CODES[one.name], mask) for one in FILTERS if (mask := one.drawn(lookup))]
        unasked = {one.name for one, mask in opened if one.optional and not mask}
        self.reasons = {name: code for name, code in DROPS.items() if name not in unasked}
        """Codes of the drop reasons with columns in the ledger."""
        self.has_pairs = any(sees == "pairs" for sees, *_ in self._asked)

    def of_documents(self, anchors: pa.Table, anchor: Ints, rows: Ints, spared: Mask | None = None) -> Fates:
        """Documents that their anchor's unit must not have, regardless of score; see `Grid` for the arguments.

        Returns:
            (n, k) uint8, the code of the first filter that drops a document, 0 if none does.
        """
        grid = Grid(self.lookup, anchors, anchor, rows, spared=spared)
        return self._first("documents", grid, np.zeros(rows.shape, np.uint8))

    def of_drawn(self, anchors: pa.Table, anchor: Ints, rows: Ints, positives: Ints) -> Fates:
        """The same for drawn or preferred documents, regardless of their scores."""
        grid = Grid(self.lookup, anchors, anchor, rows, positives=positives)
        return self._first("drawn", grid, self.of_documents(anchors, anchor, rows))

    def of_pairs(self, anchors: pa.Table, anchor: Ints, rows: Ints) -> Fates:
        """The same with the slow filters, for (p,) rows; returns (p,)."""
        grid = Grid(self.lookup, anchors, anchor, rows[:, None])
        return self._first("pairs", grid, np.zeros((len(rows), 1), np.uint8))[:, 0]

    def of_scores(
        self,
        anchors: pa.Table,
        anchor: Ints,
        rows: Ints,
        scores: Floats,
        references: Floats,
        dropped: Fates,
        positives: Ints | None = None,
    ) -> Fates:
        """The same with the filters that see scores, for documents not yet in `dropped`."""
        grid = Grid(self.lookup, anchors, anchor, rows, scores, references, positives=positives)
        return self._first("scores", grid, dropped.copy())

    def _first(self, sees: str, grid: Grid, codes: Fates) -> Fates:
        for own, code, mask in self._asked:
            if own == sees:
                np.copyto(codes, np.uint8(code), where=(codes == 0) & mask(grid))
        return codes
