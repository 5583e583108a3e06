"""Rounds of mining and training: each mines with the model trained in the previous one, and trains it further.

ANCE (Xiong et al. 2021, https://arxiv.org/abs/2007.00808), offline: negatives are renewed between trainings, not during
them. A round is an ordinary run in `RUN_DIR/rounds/NUMBER`, with its config next to it; finished work is left alone, so
finished rounds cost nothing, and a killed one is resumed. The rounds share a store, and the source is read once. The
same config and input give the same table, however often the work was interrupted.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from negpipe import graph
from negpipe.config import machine
from negpipe.config.schema import Config
from negpipe.engine.budget import Budget
from negpipe.engine.fingerprint import digest
from negpipe.engine.progress import Reporter, Silent
from negpipe.errors import ConfigError
from negpipe.review import diff
from negpipe.store import view
from negpipe.store.files import publish
from negpipe.store.lock import run_lock
from negpipe.train import retriever, stage
from negpipe.train.children import Leak, check_place, child, inherit, leak, manifest, scores, written
from negpipe.train.comparison import METRICS, Comparison, compare, of_document

logger = logging.getLogger(__name__)

FOLDER, TABLE, BEST = "rounds", "rounds.parquet", "best"
"""The rounds' folder in the run directory; it contains their table and a link to the best round."""
_MEASURED = ("changed", *(field.name for field in fields(Leak)))


@dataclass(frozen=True)
class Round:
    """Result of one round.

    Attributes:
        number: from 1.
        rows: number of rows that it was trained on.
        dimension: dimension of the vectors it mined with; `trained_dimension`: that of the trained model's vectors.
        changed: share of its negatives (anchor, document) that the previous round did not have; None in the first.
        leak: estimated share of false negatives among its negatives, see `calibrate`; `leak_low` to `leak_high` is
            its 95 % interval, from `leak_anchors` anchors. None if it cannot be estimated, for the reason in
            `leak_missing`.
        mined, trained: digests of its rows, and of its model and scores.
        measured: key of `changed` and `leak`.
        compared: every metric on the held-out split, comparing its model with the previous one.
    """

    number: int
    rows: int
    dimension: int
    trained_dimension: int
    changed: float | None
    leak: float | None
    leak_low: float | None
    leak_high: float | None
    leak_anchors: int
    leak_missing: str | None
    mined: str
    trained: str
    measured: str
    compared: tuple[Comparison, ...]

    @property
    def score(self) -> float:
        """The metric that rounds are judged by: the first of `METRICS`."""
        return self.compared[0].after

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"compared": [one.document() for one in self.compared]}


@dataclass(frozen=True)
class Refreshed:
    """All rounds.

    Attributes:
        rounds: in order, at least one.
        best: the round whose model is best on the held-out split, the first among equals.
        compared: every metric, comparing its model with the one that the first round started from.
        stopped: why it stopped early; None: all requested rounds were run.
        model: the folder of the best model.
    """

    rounds: tuple[Round, ...]
    best: Round
    compared: tuple[Comparison, ...]
    stopped: str | None
    model: Path

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "model": str(self.model),
            "verdict": self.compared[0].verdict,
            "best": self.best.number,
            "stopped": self.stopped,
            "compared": [one.document() for one in self.compared],
            "rounds": [one.document() for one in self.rounds],
        }


def refresh(config: Config, rounds: int, *, reporter: Reporter | None = None, **options: Any) -> Refreshed:
    """Mine and train repeatedly until the held-out score stops rising.

    Args:
        config: with a section `train`; the first round is this config's own `train`.
        rounds: maximum number of rounds, at least 1.
        reporter: receives progress.
        options: passed to every round, see `pipeline.mine`.

    Raises:
        ConfigError: also where the config has no section `train`, or trains a reranker.
        LockedError: another process refreshes in this run directory.
    """
    graph.check_trains(config)
    check_place(config, "refresh")
    if config.train and config.train.kind == "reranker":
        raise ConfigError("train.kind: refresh needs a model that searches, and a reranker does not: set retriever")
    folder, stopped = config.run_dir / FOLDER, None
    runs: list[Config] = []
    done: list[Round] = []
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with run_lock(folder):
        known = _known(folder / TABLE)
        for number in range(1, rounds + 1):
            before = runs[-1] if runs else None
            run = _config_of(number, config, before)
            model = run.encoder.model or "the precomputed vectors"
            logger.info("round %d of %d: mining with %s, in %s", number, rounds, model, run.run_dir)
            named = _Named(f"round {number}, ", reporter or Silent())
            stats = graph.train(run, reporter=named, **options).stats
            runs.append(run)
            done.append(_judged(number, run, before, stats, known, named))
            _write(folder / TABLE, done)
            _tell(done[-1])
            if stopped := _not_risen(done):
                logger.info("stopping after this round: %s", stopped)
                break
        best = max(done, key=lambda one: one.score)
        view.point(folder / BEST, Path(str(best.number)))
        compared = _against_base(runs[0], runs[best.number - 1])
    return Refreshed(tuple(done), best, compared, stopped, folder / BEST / "model")


def _config_of(number: int, config: Config, before: Config | None) -> Config:
    """The config of a round; it is written next to its run directory, so that every command works on it."""
    changes: dict[str, Any] = {}
    if before:
        encoder = retriever.as_trained(stage.STAGE.config(before).encoder, before.run_dir / "model")
        changes = {"encoder": encoder.model_dump(mode="json", exclude_unset=True), "train.base": None}
    folder = config.run_dir / FOLDER
    run = child(config, folder / str(number), changes)
    written(run)
    inherit(run, before or config)
    return run


def _judged(
    number: int,
    run: Config,
    before: Config | None,
    stats: Mapping[str, Mapping[str, Any]],
    known: Mapping[str, Mapping[str, Any]],
    reporter: Reporter,
) -> Round:
    mined, trained = (manifest(run, name) for name in ("triplets", "train"))
    measured = digest(mined.key, manifest(before, "triplets").key if before else None, run.seed)
    return Round(
        number=number,
        rows=stats["triplets"]["rows"],
        dimension=stats["encode"]["dimension"],
        trained_dimension=min(stats["train"]["dimension"], run.encoder.truncate_dim or stats["train"]["dimension"]),
        **(known.get(measured) or _measure(run, before, reporter)),
        mined=mined.digest,
        trained=trained.digest,
        measured=measured,
        compared=tuple(of_document(one) for one in stats["train"]["compared"]),
    )


def _measure(run: Config, before: Config | None, reporter: Reporter) -> dict[str, Any]:
    """The values of `_MEASURED`."""
    changed = None
    if before:
        budget = Budget(run.resources.memory_budget, run.resources.cpus or machine.cores())
        sides = (diff.source_of(str(one.run_dir)) for one in (before, run))
        difference = diff.compare(*sides, examples=0, budget=budget, scratch=run.run_dir)
        changed = 1 - difference.kept / difference.b.negatives
    return {"changed": changed} | asdict(leak(run, reporter))


def _not_risen(done: Sequence[Round]) -> str | None:
    """Why there is no further round; None: the last one was better than any model before."""
    *earlier, last = done
    scores = [done[0].compared[0].before, *(one.score for one in earlier)]
    if last.score > max(scores):
        return None
    best = scores.index(max(scores))
    what = f"the model of round {best}" if best else "the base"
    return f"round {last.number} does not improve {METRICS[0]}: {last.score:.4f}, while {what} has {max(scores):.4f}"


def _against_base(first: Config, best: Config) -> tuple[Comparison, ...]:
    """Compare the best round's model with the base, anchor by anchor."""
    before, after = scores(first), scores(best)
    return tuple(
        compare(name, before[f"{name}_before"].to_numpy(), after[f"{name}_after"].to_numpy()) for name in METRICS
    )


def _tell(one: Round) -> None:
    """Log the result of a round."""
    first = one.compared[0]
    scores = f"{first.metric} {first.after:.4f} against {first.before:.4f} before"
    changed = "" if one.changed is None else f", {one.changed:.1%} of the negatives are new"
    leak = f"leak {one.leak:.1%}" if one.leak is not None else f"no leak rate: {one.leak_missing}"
    logger.info("round %d: %s%s, %s", one.number, scores, changed, leak)
    if one.trained_dimension != one.dimension:
        logger.warning(
            "round %d: vectors of the trained model have dimension %d, those it mined with %d: later rounds"
            " mine with vectors of another dimension",
            one.number,
            one.trained_dimension,
            one.dimension,
        )


def _write(path: Path, done: Sequence[Round]) -> None:
    rows = []
    for one in done:
        row = {name: value for name, value in asdict(one).items() if name != "compared"}
        for metric in one.compared:
            row |= {f"{metric.metric}_{name}": getattr(metric, name) for name in ("before", "after", "low", "high")}
        rows.append(row)
    table = pa.Table.from_pylist(rows)
    # A column of nulls has no type.
    kinds = dict.fromkeys(("changed", "leak", "leak_low", "leak_high"), pa.float64()) | {"leak_missing": pa.string()}
    table = pa.table({name: table[name].cast(kinds.get(name, table[name].type)) for name in table.column_names})
    publish(path.parent, path.name, lambda file: pq.write_table(table, file, compression="zstd"))


def _known(path: Path) -> dict[str, dict[str, Any]]:
    """Earlier measurements, by key."""
    try:
        rows = pq.read_table(path, columns=["measured", *_MEASURED]).to_pylist()
    except (OSError, ValueError, LookupError):
        return {}
    return {row.pop("measured"): row for row in rows}


@dataclass(frozen=True)
class _Named:
    """A reporter that shows to which round a stage belongs."""

    name: str
    reporter: Reporter

    def begin(self, stage: str, total: int, done: int, unit: str) -> None:
        self.reporter.begin(self.name + stage, total, done, unit)

    def advance(self, units: int, note: str) -> None:
        self.reporter.advance(units, note)

    def end(self) -> None:
        self.reporter.end()
