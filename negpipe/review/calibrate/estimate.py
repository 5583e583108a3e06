"""Estimates leak, hardness and coverage of every setting, with an interval for the leak.

leak = suspects taken / negatives taken, over all trials. For `random`, both are expectations: from a pool of w
candidates with h suspects, it takes min(n, w), of which min(n, w) * h / w are suspects (the mean of the
hypergeometric distribution). For `simans` and `weighted`, whose probabilities have no closed form, it is the mean of
16 draws. The interval is the percentile bootstrap over anchors (Efron and Tibshirani, 1993, chapter 13): anchors
are drawn with replacement, all trials of an anchor together, the same draws for every setting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from negpipe.config.schema import Config
from negpipe.data.arrays import Ints, Mask
from negpipe.data.namesakes import Namesakes
from negpipe.data.tables import Rows
from negpipe.review.calibrate.grid import Setting
from negpipe.review.calibrate.trials import TrialBlock, Trials
from negpipe.select import rules
from negpipe.select.filters import own_documents
from negpipe.select.rules import Fate
from negpipe.select.selector import Choice, Selector

Doubles = npt.NDArray[np.float64]

DRAWS = 16
_RESAMPLES = 1000
_AT_ONCE = 50  # resamples at a time


@dataclass(frozen=True)
class Estimate:
    """The effect of one setting. Numbers are None if no negative was taken.

    Attributes:
        leak: share of false negatives among those taken; `lo` to `hi` is its 95 % interval, by the rule of three if
            none was taken.
        leaking: anchors with a nonzero expected number of false negatives.
        negatives: expected number of negatives taken.
        score, rank: means over the negatives; ranks are raw, 0-based, without the anchor itself.
        distance: mean of the positive's score minus theirs.
        coverage: share of the anchors that get all their negatives, for any shown positive.
    """

    setting: Setting
    leak: float | None
    lo: float | None
    hi: float | None
    leaking: int
    negatives: float
    score: float | None
    rank: float | None
    distance: float | None
    coverage: float


@dataclass(frozen=True)
class Calibration:
    """All settings, tried on the same trials.

    Attributes:
        method: a name in `METHODS`.
        anchors: number of anchors tried, out of `all_anchors`.
        trials: total number of trials.
        num_negatives: number wanted in each trial.
        estimates: with the config's setting first.
    """

    method: str
    anchors: int
    all_anchors: int
    trials: int
    num_negatives: int
    estimates: list[Estimate]


def calibrate(
    config: Config,
    corpus: Rows,
    namesakes: Namesakes,
    slices: Iterable[Trials],
    settings: Sequence[Setting],
    *,
    method: str,
    all_anchors: int,
    threads: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> Calibration:
    """Try every setting on every trial.

    Args:
        config: a resolved config; provides everything that a setting does not set.
        corpus, namesakes: ingest's documents, and the positives of anchors with the same text.
        slices: trials, one slice of anchors at a time.
        settings: the settings to try.
        method: how the trials were created.
        all_anchors: number of anchors of the run.
        threads: number of settings tried at a time. Does not affect results.
        progress: called with the number of finished trials.
    """
    selectors = [_selectors(config, setting, corpus, namesakes) for setting in settings]
    sums = np.zeros((len(settings), len(_SUMS)))
    pieces: list[npt.NDArray[np.float32]] = []
    done, wanted = 0, config.mining.num_negatives
    with ThreadPoolExecutor(threads) as pool:
        for trials in slices:
            anchors, owner = np.unique(trials.anchor, return_inverse=True)
            # For each setting and anchor: suspects taken, negatives taken, trials short of negatives.
            table = np.zeros((len(settings), 3, len(anchors)))
            first = 0
            for block in trials.blocks():
                owners = owner[first : first + len(block.lists)]
                judged = _judge(block, corpus, selectors[0][0])
                tried = pool.map(partial(_tried, block, judged, wanted=wanted), selectors, settings)
                for number, (totals, *of_trials) in enumerate(tried):
                    sums[number] += totals
                    for row, values in enumerate(of_trials):
                        table[number, row] += np.bincount(owners, values, minlength=len(anchors))
                first += len(block.lists)
                progress(len(block.lists))
            pieces.append(table.astype(np.float32))
            done += first
    by_anchor = np.concatenate([np.zeros((len(settings), 3, 0), np.float32), *pieces], axis=2)
    intervals = bootstrap(by_anchor[:, 0], by_anchor[:, 1], config.seed)
    estimates = [
        _estimate(setting, own, total, interval)
        for setting, own, total, interval in zip(settings, by_anchor, sums, intervals, strict=True)
    ]
    return Calibration(method, by_anchor.shape[2], all_anchors, done, config.mining.num_negatives, estimates)


def bootstrap(suspects: npt.NDArray[np.float32], taken: npt.NDArray[np.float32], seed: int) -> Doubles:
    """95 % percentile intervals of sum(suspects) / sum(taken), resampling columns.

    Args:
        suspects: (s, a), for s settings and a anchors; likewise taken.
        seed: of the resampling.

    Returns:
        (s, 2) float64, NaN if nothing is taken.
    """
    anchors = suspects.shape[1]
    if not anchors:
        return np.full((len(suspects), 2), np.nan)
    random = np.random.default_rng(seed)
    leaks = []
    for _ in range(0, _RESAMPLES, _AT_ONCE):
        drawn = random.integers(anchors, size=(_AT_ONCE, anchors))
        times = np.stack([np.bincount(one, minlength=anchors) for one in drawn], axis=1).astype(np.float32)
        total = taken @ times
        leaks.append(np.divide(suspects @ times, total, out=np.full_like(total, np.nan), where=total > 0))
    every = np.concatenate(leaks, axis=1).astype(np.float64)
    filled = ~np.isnan(every).all(axis=1)
    intervals = np.full((len(suspects), 2), np.nan)
    if filled.any():
        intervals[filled] = np.nanpercentile(every[filled], [2.5, 97.5], axis=1).T
    return intervals


def rule_of_three(anchors: int) -> float:
    """Upper end of the 95 % interval of the share of anchors with a false negative, if none of `anchors` has one
    (Hanley and Lippman-Hand, 1983). So is that of negatives, if anchors get equally many."""
    return min(1.0, 3 / max(1, anchors))


def to_table(calibration: Calibration) -> pa.Table:
    """One row per setting, with the facts of the calibration."""
    fixed = {
        "method": calibration.method,
        "anchors": calibration.anchors,
        "trials": calibration.trials,
        "num_negatives": calibration.num_negatives,
    }
    rows = []
    for estimate in calibration.estimates:
        row = asdict(estimate)
        rows.append({**row.pop("setting"), **row, **fixed})
    schema = {
        **dict.fromkeys(("range_min", "range_max"), pa.int64()),
        "sampling_strategy": pa.string(),
        **dict.fromkeys(("relative_margin", "absolute_margin", "max_score", "leak", "lo", "hi"), pa.float64()),
        "leaking": pa.int64(),
        **dict.fromkeys(("negatives", "score", "rank", "distance", "coverage"), pa.float64()),
        "method": pa.string(),
        **dict.fromkeys(("anchors", "trials", "num_negatives"), pa.int64()),
    }
    return pa.Table.from_pylist(rows, schema=pa.schema(schema))


_SUMS = ("score", "rank", "distance", "referred")
"""Sums over the negatives taken; the last counts those with a positive's score as reference."""


def _selectors(config: Config, setting: Setting, corpus: Rows, namesakes: Namesakes) -> list[Selector]:
    """The selectors of one setting, one per draw; for `random`, a single one that takes the entire pool."""
    applied = setting.applied(config)
    draws = 1
    if setting.sampling_strategy == "random":
        width = setting.range_max - setting.range_min
        changes = {"sampling_strategy": "top", "num_negatives": width}
        applied = applied.model_copy(update={"mining": applied.mining.model_copy(update=changes)})
    elif setting.sampling_strategy != "top":
        draws = DRAWS
    seeded = (applied.model_copy(update={"seed": applied.seed + draw}) for draw in range(draws))
    # Random negatives are left out, so the number of documents that can be candidates is not needed.
    return [Selector(one, corpus, namesakes, searchable=len(corpus)) for one in seeded]


@dataclass(frozen=True)
class _Judged:
    """Facts independent of the setting, (t, k): why a candidate is excluded, whether it is a suspect, and its rank.

    Ranks exclude the anchor itself (`mining.anchor_id`).
    """

    excluded: npt.NDArray[np.uint8]
    suspects: Mask
    ranks: npt.NDArray[np.int32]


def _judge(trials: TrialBlock, corpus: Rows, selector: Selector) -> _Judged:
    rows, every = trials.found.rows, np.arange(len(trials.found.rows))
    texts = corpus.numbers("normalized", np.maximum(rows, 0))
    suspects = rules.contains(texts, trials.suspects, trials.offsets, trials.lists) & (rows >= 0)
    ranks = np.cumsum(~own_documents(selector.filters.lookup, trials.anchors, rows), axis=1, dtype=np.int32) - 1
    if trials.shown is None:
        return _Judged(selector.filters.of_documents(trials.anchors, every, rows), suspects, ranks)
    suspects &= texts != trials.shown[:, None]
    return _Judged(selector.filters.of_documents(trials.anchors, every, rows, suspects), suspects, ranks)


def _tried(
    trials: TrialBlock, judged: _Judged, selectors: Sequence[Selector], setting: Setting, wanted: int
) -> tuple[Doubles, Doubles, Doubles, Doubles]:
    """The sums over all negatives and, per trial: suspects taken, negatives taken, whether some are missing."""
    suspects, taken, short = (np.zeros(len(trials.lists)) for _ in range(3))
    sums = np.zeros(len(_SUMS))
    whole = trials.found.rows.shape[1]
    for selector in selectors:
        waiting = np.arange(len(trials.lists))
        # Most find the first ones among few candidates: only the others use all.
        narrow = 2 * (setting.range_min + wanted) + 16
        for width in (narrow, whole) if setting.sampling_strategy == "top" and narrow < whole else (whole,):
            found = trials.found.narrowed(width)
            everyone = len(waiting) == len(trials.lists)
            anchors = trials.anchors if everyone else trials.anchors.take(pa.array(waiting))
            choice = selector.choose(
                anchors, found if everyone else found.take(waiting), judged.excluded[waiting, :width]
            )
            chosen = choice.fates == Fate.TAKEN
            pool = chosen.sum(axis=1)
            # With `margin_reference: each` a trial may have several units.
            lacks = np.bincount(choice.anchor, pool < wanted, minlength=len(waiting))
            if width < whole:
                chosen[lacks[choice.anchor] > 0] = False
                pool = chosen.sum(axis=1)
            share = np.minimum(1.0, wanted / np.maximum(1, pool)) if setting.sampling_strategy == "random" else 1.0
            weight = np.broadcast_to(share, pool.shape)
            trial = waiting[choice.anchor]
            false = (chosen & judged.suspects[trial, : chosen.shape[1]]).sum(axis=1)
            suspects += np.bincount(trial, false * weight, minlength=len(suspects))
            taken += np.bincount(trial, pool * weight, minlength=len(taken))
            sums += _sums(choice, chosen, judged.ranks[trial, : chosen.shape[1]], pool, weight)
            if width == whole:
                short[waiting] += lacks
            waiting = waiting[lacks > 0]
    count = len(selectors)
    return sums / count, suspects / count, taken / count, short / count


def _sums(choice: Choice, chosen: Mask, ranks: npt.NDArray[np.int32], pool: Ints, weight: Doubles) -> Doubles:
    """Sums over the chosen negatives, weighted by unit, in the order of `_SUMS`."""
    scores = np.where(chosen, choice.scores[choice.anchor], 0).sum(axis=1, dtype=np.float64)
    placed = np.where(chosen, ranks, 0).sum(axis=1, dtype=np.float64)
    referred = np.isfinite(choice.reference)
    distances = np.where(referred, pool * np.where(referred, choice.reference, 0) - scores, 0.0)
    return np.array([weight @ values for values in (scores, placed, distances, pool * referred)])


def _estimate(setting: Setting, own: npt.NDArray[np.float32], sums: Doubles, interval: Doubles) -> Estimate:
    suspects, taken, short = own.astype(np.float64)
    total = float(taken.sum())
    score, rank, distance, referred = sums.tolist()
    lo, hi = (None if np.isnan(value) else float(value) for value in interval)
    leaking = int(np.count_nonzero(suspects))
    if hi is not None and not leaking:  # resampling zeros gives zeros, however few they are
        hi = rule_of_three(int(np.count_nonzero(taken)))
    return Estimate(
        setting=setting,
        leak=float(suspects.sum()) / total if total else None,
        lo=lo,
        hi=hi,
        leaking=leaking,
        negatives=total,
        score=score / total if total else None,
        rank=rank / total if total else None,
        distance=distance / referred if referred else None,
        coverage=float(np.mean(short == 0)) if len(short) else 0.0,
    )
