"""The ledger: the fate of every candidate, counted for each unit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from negpipe.config.schema import Config
from negpipe.data.arrays import Ints, Mask
from negpipe.data.tables import Rows
from negpipe.select import rules
from negpipe.select.filters import CODES
from negpipe.select.rules import Fate
from negpipe.select.selector import Selector, Units


def ledger(units: Units, config: Config, corpus: Rows, selector: Selector, searchable: int) -> pa.Table:
    """One row per unit: candidates seen, dropped for each reason, taken, the deepest rank used, why it is short.

    If given or judged negatives are configured, also their number, and the grades of all judged ones.
    """
    counts = rules.counts(units.fates, len(CODES))
    width, taken = units.fates.shape[1], units.fates == Fate.TAKEN
    each = config.mining.margin_reference == "each"
    positive = corpus.strings("id", units.positives) if each else pa.nulls(len(units.anchor))
    candidates_seen = width - counts[:, Fate.PADDING]
    deepest = np.where(taken.any(axis=1), width - 1 - taken[:, ::-1].argmax(axis=1), -1)
    reasons = {f"dropped_{name}": counts[:, code] for name, code in selector.filters.reasons.items()}
    preferred: dict[str, Any] = {}
    if config.mining.prefers:
        grades = units.negative_grades
        ends = np.concatenate([[0], np.cumsum(~np.isnan(grades))])[units.negative_offsets]
        judged = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(grades[~np.isnan(grades)]))
        preferred = {"preferred": units.of_source("given", "judged"), "judged_grades": judged}
    return pa.table(
        {
            "anchor_id": units.anchors["id"].take(pa.array(units.anchor)).cast(pa.string()),
            "positive_id": positive.cast(pa.string()),
            "candidates": candidates_seen,
            "taken": counts[:, Fate.TAKEN],
            **reasons,
            "deepest_rank": pa.array(deepest, mask=deepest < 0),
            **preferred,
            "random": units.of_source("random"),
            "short": units.counts < config.mining.wanted,
            "shortage_reason": pa.array(
                _shortage_reasons(units, counts, candidates_seen >= searchable, config), pa.string()
            ),
        }
    )


def _shortage_reasons(units: Units, counts: Ints, exhausted: Mask, config: Config) -> list[str | None]:
    """What a short unit ran out of: the corpus (`exhausted`), the window, or the candidates considered (depth)."""
    window = (counts[:, Fate.AFTER_WINDOW] > 0) | (config.mining.rank_over == "raw")
    reasons = np.where(exhausted, "corpus", np.where(window, "window", "depth"))
    short = units.counts < config.mining.wanted
    return [str(reason) if lacks else None for reason, lacks in zip(reasons, short, strict=True)]
