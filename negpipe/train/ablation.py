"""`negpipe ablate`: compares models trained in the same way with different mining settings.

A cell is one arm with one seed: an ordinary run under RUN/ablation, resumed and skipped like any other. All share a
store, so that texts are encoded and the base judged only once, and candidates searched once per depth. Cells run seed
by seed, so that every arm has a result after the first round.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from negpipe import graph
from negpipe.config.schema import Config
from negpipe.config.training import Ablate
from negpipe.engine.progress import Reporter
from negpipe.errors import ConfigError, InputError, RecallError, RowsError, TaskFailedError
from negpipe.review import measures
from negpipe.review.calibrate import recommend
from negpipe.review.wording import duration
from negpipe.store.files import publish
from negpipe.store.lock import run_lock
from negpipe.train import ablation_page
from negpipe.train.arms import CALIBRATED, Changes, arms, rules
from negpipe.train.children import Leak, check_place, child, inherit, leak, manifest, scores, table, written
from negpipe.train.comparison import METRICS
from negpipe.train.effects import Effect, Floats, effects, verdict
from negpipe.train.evaluation import BEST

logger = logging.getLogger(__name__)

FOLDER = "ablation"
TABLE = "ablation.parquet"
_SKIPPED = (ConfigError, InputError, RecallError, RowsError, TaskFailedError)
"""Errors of a single arm: the others continue."""


@dataclass(frozen=True)
class Cell:
    """A finished cell: one arm with one seed."""

    arm: str
    config: Config
    anchors: list[str]
    """Ids of the anchors it was judged on."""
    scores: Mapping[str, Floats]
    """By metric, (anchors,) values of the trained model."""
    base: Mapping[str, Floats]
    """The same for the model before training."""
    best: Mapping[str, Floats]
    """(anchors,) highest scores: best_positive_before, best_negative_before, and the same after; NaN if there is none.
    Empty for rerankers, whose scores are not comparable to those before."""
    losses: Floats
    """(steps,) training loss."""
    facts: Mapping[str, Any]
    """Rows, coverage, hardness and seconds."""


@dataclass(frozen=True)
class Ablation:
    """The results of an ablation.

    Attributes:
        folder: the folder of the cells and the table.
        effects: effects of the arms, best first.
        cells: by arm, one cell per seed.
        facts: by arm: rows, steps, coverage, distance, leak with its interval, seconds; over the seeds (leak: first).
        failed: by cell, why it has no result.
    """

    folder: Path
    effects: list[Effect]
    cells: dict[str, list[Cell]]
    facts: dict[str, dict[str, Any]]
    failed: dict[str, str]

    @property
    def anchors(self) -> int:
        """Held-out anchors, the same for every cell."""
        return len(self.cells[self.effects[0].arm][0].anchors)

    @property
    def bases(self) -> dict[str, dict[str, float]]:
        """By arm, means of the metrics before training."""
        return {
            arm: {name: float(each.mean()) for name, each in own[0].base.items()} for arm, own in self.cells.items()
        }

    @property
    def verdict(self) -> str:
        """One sentence."""
        return verdict(self.effects)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The table, unrounded: one row per arm, best first."""
        for effect in self.effects:
            row = effect.document()
            means, spreads = row.pop("means"), row.pop("spreads")
            yield (
                row
                | {name: means[name] for name in METRICS}
                | {f"{name}_spread": spreads[name] for name in METRICS}
                | self.facts[effect.arm]
            )

    def document(self) -> dict[str, Any]:
        """As JSON."""
        rows = [effect.document() | self.facts[effect.arm] for effect in self.effects]
        return {
            "verdict": self.verdict,
            "anchors": self.anchors,
            "bases": self.bases,
            "arms": rows,
            "failed": self.failed,
        }


def ablate(config: Config, *, reporter: Reporter | None = None, **options: Any) -> Ablation:
    """Run every missing cell, compare the arms, and write `RUN/ablation/ablation.parquet`.

    Args:
        config: with a section `train`, and optionally a section `ablate`.
        reporter: receives progress.
        options: passed to `graph.train`.

    Raises:
        ConfigError: the config has no section `train`, or the settings of an arm are incompatible with it.
        LockedError: another process works on the same ablation.
        InputError: no cell finished; the message says why.
    """
    graph.check_trains(config)
    check_place(config, "ablate")
    if importlib.util.find_spec("statsmodels") is None:
        raise ConfigError("ablate: statsmodels is not installed: run `pip install 'negpipe[train]'`")
    folder, failed = config.run_dir / FOLDER, dict[str, str]()
    options["reporter"] = reporter
    # Checked before anything runs; the settings that calibration recommends suit any config that mines.
    _configs(config, folder, arms(config, dict))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with run_lock(folder):
        changes = arms(config, lambda: _calibrated(config, folder, options, failed))
        made = _made(_configs(config, folder, changes), config, options, failed)
        if not made:
            raise InputError(f"no cell finished; the first error: {next(iter(failed.values()))}")
        found = _compared(config, folder, made, failed, reporter)
        _write(found)
        described = {arm: json.dumps(own, ensure_ascii=False, default=str) for arm, own in changes.items()}
        ablation_page.write(found, described)
    return found


def _made(
    configs: Mapping[tuple[str, int], Config], config: Config, options: Mapping[str, Any], failed: dict[str, str]
) -> list[Cell]:
    """The cells; the reasons for missing ones go to `failed`."""
    made: list[Cell] = []
    before = config
    ran = seconds = 0.0
    for number, ((arm, seed), own) in enumerate(configs.items()):
        left = f", about {duration((len(configs) - number) * seconds / ran)} left" if ran else ""
        logger.info("ablate: cell %d of %d: %s, seed %d%s", number + 1, len(configs), arm, seed, left)
        started = time.monotonic()
        written(own)
        inherit(own, before)
        try:
            result = graph.train(own, **options)
            cell = _cell(arm, own)
            if made and cell.anchors != made[0].anchors:
                raise InputError(f"it was judged on other anchors than '{made[0].arm}': they cannot be compared")
        except _SKIPPED as error:
            logger.error("ablate: %s, seed %d has no result: %s", arm, seed, error)
            failed[f"{arm}, seed {seed}"] = str(error)
            continue
        if "train" in result.ran:
            ran, seconds = ran + 1, seconds + time.monotonic() - started
        made.append(cell)
        before = own
        first = METRICS[0]
        logger.info("ablate: %s, seed %d: %s %.4f", arm, seed, first, made[-1].scores[first].mean())
    return made


def _configs(config: Config, folder: Path, found: Mapping[str, Changes]) -> dict[tuple[str, int], Config]:
    """The config of every cell by arm and seed, in execution order."""
    seeds = (config.ablate or Ablate()).seeds
    made: dict[tuple[str, int], Config] = {}
    names: dict[str, str] = {}
    for seed, arm in product(seeds, found):
        name = f"{re.sub('[^a-z0-9]+', '-', arm.lower()).strip('-')}-{seed}"
        if names.setdefault(name, arm) != arm:
            raise ConfigError(f"ablate.arms: '{arm}' and '{names[name]}' would share the folder {name}: rename one")
        changes = {**found[arm], "seed": seed, "train.seed": seed, "ablate": None, "output.report": False}
        try:
            made[arm, seed] = child(config, folder / name, changes)
        except ConfigError as error:
            hint = "" if config.ablate and arm in config.ablate.arms else ". Leave it out: see ablate.sets"
            raise ConfigError(f"ablate: the arm '{arm}': {error}{hint}") from None
    return made


def _calibrated(config: Config, folder: Path, options: Mapping[str, Any], failed: dict[str, str]) -> Changes | None:
    """The settings that `calibrate` recommends, other settings being defaults; None, with the reason in `failed`."""
    own = child(config, folder / "calibration", {**rules(config), "ablate": None, "output.report": False})
    logger.info("ablate: calibrating")
    try:
        graph.mine(own, **options)
        advice = recommend(measures.calibrate_settings(own, reporter=options["reporter"]), coverage=0.9, max_leak=0.05)
    except _SKIPPED as error:
        failed[CALIBRATED] = str(error)
        return None
    if advice.chosen is None:
        failed[CALIBRATED] = "no setting can be recommended"
        return None
    return rules(config, **asdict(advice.chosen.setting))


def _cell(arm: str, config: Config) -> Cell:
    """Read the results of a cell."""
    found, mined = scores(config), manifest(config, "triplets")
    after, base = ({name: found[f"{name}_{side}"].to_numpy() for name in METRICS} for side in ("after", "before"))
    (model,) = manifest(config, "train").of_kind("model")
    assert config.train is not None
    stats, learned = mined.stats, config.train.negatives
    means = [stats["scores"][side]["mean"] for side in ("positive", "negative")]
    asked = max(1, stats["wanted"] // config.mining.wanted)  # anchors, or pairs if each pair has separate negatives
    facts = {
        "rows": stats["rows"],
        "steps": model.meta["steps"],
        "coverage": 1 - stats["short_anchors"] / asked if learned else None,
        "distance": means[0] - means[1] if learned and None not in means else None,
        "seconds": sum(part.provenance["seconds"] for part in (*mined.parts, model)),
    }
    names = [name for name in found.column_names if name.startswith(BEST)]
    best = {name: found[name].to_numpy() for name in names}
    return Cell(
        arm,
        config,
        found["anchor_id"].to_pylist(),
        after,
        base,
        best,
        table(config, "model", "log")["loss"].to_numpy(),
        facts,
    )


def _compared(
    config: Config, folder: Path, cells: list[Cell], failed: dict[str, str], reporter: Reporter | None
) -> Ablation:
    by_arm: dict[str, list[Cell]] = {}
    for cell in cells:
        by_arm.setdefault(cell.arm, []).append(cell)
    facts = {}
    for arm, own in by_arm.items():
        means: dict[str, Any] = {}
        for name in own[0].facts:
            known = [cell.facts[name] for cell in own if cell.facts[name] is not None]
            means[name] = float(np.mean(known)) if known else None
        facts[arm] = means | asdict(_leak(own[0].config, reporter))
    values = {
        arm: {name: np.stack([cell.scores[name] for cell in own]) for name in METRICS} for arm, own in by_arm.items()
    }
    bases = {arm: own[0].base[METRICS[0]] for arm, own in by_arm.items()}
    return Ablation(folder, effects(values, bases, seed=config.seed), by_arm, facts, failed)


def _leak(config: Config, reporter: Reporter | None) -> Leak:
    """The leak of the negatives that are trained on."""
    assert config.train is not None
    if not config.train.negatives:
        return Leak(leak_missing="train.negatives is false: no mined negative is trained on")
    return leak(config, reporter)


def _write(found: Ablation) -> None:
    """Write the table, one row per arm."""
    rows = [*found.rows()]
    about = {"verdict": found.verdict, "bases": json.dumps(found.bases)}
    # A column of nulls has no type.
    kinds = {name: pa.string() if name in ("arm", "leak_missing") else pa.float64() for name in rows[0]}
    columns = {name: pa.array([row[name] for row in rows], kind) for name, kind in kinds.items()}
    made = pa.table(columns).replace_schema_metadata(about)
    publish(found.folder, TABLE, lambda file: pq.write_table(made, file, compression="zstd"))
