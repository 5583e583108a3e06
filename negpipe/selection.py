"""Selection over stored candidates: what `triplets`, `export` and `explain` all see.

One slice of anchors with its candidates becomes units. A unit is an anchor, or with
`mining.margin_reference: each` an (anchor, positive) pair; it has its positives, the negatives chosen for
them, and the fate of every candidate. The same config and the same parts give the same units.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from negpipe import candidates, mining
from negpipe.candidates import Candidates
from negpipe.config import Config
from negpipe.errors import InputError
from negpipe.mining import Fate
from negpipe.tables import Rows, open_table, ragged
from negpipe.texts import hashes

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Hashes = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Units:
    """What was chosen for u units of one slice of anchors.

    Attributes:
        anchors: the slice's rows of ingest's anchor table.
        anchor: (u,) row of `anchors` of each unit.
        positives: rows of all units' positives, ragged by `positive_offsets` (u + 1,); scores and grades alike.
        positive_ranks: raw rank of each positive, -1 beyond the depth.
        negatives: rows of all units' negatives by rank, ragged by `negative_offsets` (u + 1,); scores alike.
        negative_ranks: raw rank of each negative.
        fates: (u, k) uint8, what became of each candidate.
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
    fates: npt.NDArray[np.uint8]

    @property
    def shortage(self) -> Ints:
        """(u,) how many negatives each unit got."""
        return np.diff(self.negative_offsets)


class Selector:
    """Applies a config's mining rules; holds what all slices share."""

    def __init__(self, config: Config, corpus: Rows) -> None:
        self._config, self._corpus = config, corpus
        names = {field.name for field in fields(mining.Rules)}
        settings = config.mining.model_dump()
        self.rules = mining.Rules(**{name: value for name, value in settings.items() if name in names})
        self._verdicts = _read_verdicts(config.mining.exclude_file)

    def slices(self, anchors: Path, found: Path) -> Iterator[tuple[Candidates, Units]]:
        """Everything of one part, a slice of anchors at a time.

        Args:
            anchors: ingest's part of anchors.
            found: search's part of their candidates.

        Yields:
            the candidates of a slice as they are stored, and its units.

        Raises:
            DamagedError: a file is not whole.
            InputError: an anchor is short of negatives, with `mining.on_shortage: fail`.
        """
        table, start = open_table(anchors), 0
        for piece in candidates.read(found):
            units = self.select(table.slice(start, len(piece.rows)), piece)
            self._check_shortage(units)
            yield piece, units
            start += len(piece.rows)

    def select(self, anchors: pa.Table, found: Candidates) -> Units:
        """Choose negatives for a slice of anchors."""
        grades, _ = ragged(anchors["grades"])
        each = self._config.mining.margin_reference == "each"
        if each:
            anchor = np.repeat(np.arange(len(found.rows)), np.diff(found.offsets))
            offsets = np.arange(len(anchor) + 1)
            reference = found.positive_scores
        else:
            anchor, offsets = np.arange(len(found.rows)), found.offsets
            reference = mining.reference_scores(
                found.positive_scores, offsets, "max" if self._config.mining.margin_reference == "max" else "min"
            )
        depth = self._config.mining.depth or found.rows.shape[1]
        rows, scores = found.rows[:, :depth], found.scores[:, :depth]
        excluded, uniform = self._excluded(anchors, rows), self._uniform(anchors, rows)
        if self._config.output.include_positives:
            # Positives of other splits, and copies of a positive, would still be false negatives.
            excluded[mining.contains(rows, found.positives, found.offsets)] = Fate.TAKEN
        if each:
            rows, scores, excluded = rows[anchor], scores[anchor], excluded[anchor]
            uniform = None if uniform is None else uniform[anchor]
        fates = mining.select(rows, scores, excluded, reference, uniform, self.rules)
        taken = fates == Fate.TAKEN
        cell = np.flatnonzero(taken)
        return Units(
            anchors=anchors,
            anchor=anchor,
            positives=found.positives,
            positive_offsets=offsets,
            positive_scores=found.positive_scores,
            positive_ranks=_ranks(found),
            grades=grades.astype(np.float32),
            negatives=rows.ravel()[cell],
            negative_offsets=np.concatenate([[0], np.cumsum(taken.sum(axis=1))]),
            negative_scores=scores.ravel()[cell],
            negative_ranks=cell % max(1, rows.shape[1]),
            fates=fates,
        )

    def _check_shortage(self, units: Units) -> None:
        wanted = self._config.mining.num_negatives
        short = units.shortage < wanted
        if self._config.mining.on_shortage != "fail" or not short.any():
            return
        names = ", ".join(repr(units.anchors["id"][int(at)].as_py()) for at in units.anchor[short][:5])
        raise InputError(
            f"{int(short.sum())} anchors of this part have fewer than {wanted} negatives: {names}",
            field="mining.on_shortage",
            remedy="Widen the window or the margins, deepen search.depth, or set mining.on_shortage: keep or drop",
        )

    def _excluded(self, anchors: pa.Table, rows: Ints) -> npt.NDArray[np.uint8]:
        wanted = set(self._config.mining.exclude)
        found: dict[Fate, Mask] = {}
        known, offsets = ragged(anchors["known"])
        by_id, _ = ragged(anchors["known_by_id"])
        shared, shared_offsets = ragged(anchors["shared"])
        if "positive_id" in wanted:
            found[Fate.POSITIVE_ID] = mining.contains(rows, *_where(known, offsets, by_id))
        if "positive_text" in wanted:
            found[Fate.POSITIVE_TEXT] = mining.contains(rows, *_where(known, offsets, ~by_id))
        if "shared_anchor" in wanted:
            found[Fate.SHARED_ANCHOR] = mining.contains(rows, shared, shared_offsets)
        if wanted & {"positive_normalized", "anchor_text"}:
            normalized = self._corpus.numbers("normalized", np.maximum(rows, 0))
            if "positive_normalized" in wanted:
                own = self._corpus.numbers("normalized", known)
                found[Fate.POSITIVE_NORMALIZED] = mining.contains(normalized, own, offsets)
                if "shared_anchor" in wanted:
                    others = self._corpus.numbers("normalized", shared)
                    found[Fate.SHARED_ANCHOR] |= mining.contains(normalized, others, shared_offsets)
            if "anchor_text" in wanted:
                found[Fate.ANCHOR_TEXT] = normalized == anchors["normalized"].to_numpy()[:, None]
        if self._verdicts:
            ids = self._corpus.numbers("id_hash", np.maximum(rows, 0))
            found[Fate.EXCLUDED_FILE] = mining.contains(ids, *self._verdicts_of(anchors))
        return mining.exclusions(rows.shape, found)

    def _verdicts_of(self, anchors: pa.Table) -> tuple[Hashes, Ints]:
        lists = [self._verdicts.get(identity, []) for identity in anchors["id"].to_pylist()]
        offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in lists])]).astype(np.int64)
        return hashes(identity for ids in lists for identity in ids), offsets

    def _uniform(self, anchors: pa.Table, rows: Ints) -> npt.NDArray[np.float64] | None:
        if self._config.mining.sampling_strategy == "top":
            return None
        documents = self._corpus.numbers("id_hash", np.maximum(rows, 0))
        return mining.uniform(self._config.seed, anchors["id_hash"].to_numpy(), documents)


def _ranks(found: Candidates) -> Ints:
    """Raw rank of every positive, -1 beyond the depth."""
    anchor = np.repeat(np.arange(len(found.rows)), np.diff(found.offsets))
    ranks = np.full(len(anchor), -1, np.int64)
    for start in range(0, len(anchor), 4096):
        here = slice(start, start + 4096)
        hit = found.rows[anchor[here]] == found.positives[here, None]
        ranks[here] = np.where(hit.any(axis=1), hit.argmax(axis=1), -1)
    return ranks


def _where(values: Ints, offsets: Ints, keep: Mask) -> tuple[Ints, Ints]:
    """The kept values of ragged lists, still ragged."""
    return values[keep], np.concatenate([[0], np.cumsum(keep)])[offsets].astype(np.int64)


def _read_verdicts(name: str | None) -> dict[str, list[str]]:
    """`mining.exclude_file`: anchor id → document ids that are not to be its negatives.

    Raises:
        InputError: the file is missing or a row lacks anchor_id or document_id.
    """
    if name is None:
        return {}
    path = Path(name)
    verdicts: dict[str, list[str]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for line, row in _verdict_rows(path, file):
                try:
                    verdicts.setdefault(str(row["anchor_id"]), []).append(str(row["document_id"]))
                except (KeyError, TypeError):
                    raise InputError(
                        "every row needs anchor_id and document_id",
                        file=name,
                        row=line,
                        remedy='Write {"anchor_id": "…", "document_id": "…"} a line, or CSV with that header',
                    ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}", file=name, field="mining.exclude_file") from None
    return verdicts


def _verdict_rows(path: Path, file: Iterator[str]) -> Iterator[tuple[int, dict[str, str]]]:
    if path.suffix in (".csv", ".tsv"):
        yield from enumerate(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","), 2)
        return
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise InputError(f"not JSON: {error}", file=str(path), row=number) from None
