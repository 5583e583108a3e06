"""`negpipe ablate`: the same training with different settings of mining, and which of them made the better model.

A cell is one arm with one seed: an ordinary run of its own under RUN/ablation, resumed and left alone like any other.
All share a store, so that texts are encoded, candidates searched and the base judged once. Cells go seed by seed, so
that every arm has a result when the first round is through.
"""

from __future__ import annotations

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
from negpipe.config.schema import Ablate, Config
from negpipe.engine.manifest import Books, Manifest, Part
from negpipe.engine.progress import Reporter
from negpipe.errors import ConfigError, InputError, RowsError, TaskFailedError
from negpipe.review import measures
from negpipe.review.calibrate import Estimate, of_config, recommend
from negpipe.review.wording import duration
from negpipe.store.files import publish
from negpipe.store.store import LocalStore
from negpipe.train import ablation_page
from negpipe.train.arms import CALIBRATED, Changes, arms, rules
from negpipe.train.children import child
from negpipe.train.comparison import METRICS
from negpipe.train.effects import Effect, Floats, effects, verdict

logger = logging.getLogger(__name__)

FOLDER = "ablation"
TABLE = "ablation.parquet"
_SKIPPED = (InputError, RowsError, TaskFailedError)
"""What is wrong with one arm alone: the others go on."""


@dataclass(frozen=True)
class Cell:
    """One arm with one seed, once it is made."""

    arm: str
    seed: int
    config: Config
    scores: Mapping[str, Floats]
    """By metric, (anchors,) values of the trained model."""
    base: Mapping[str, Floats]
    """The same of the model before."""
    losses: Floats
    """(steps,) of training."""
    facts: Mapping[str, Any]
    """Rows, coverage, hardness and seconds."""


@dataclass(frozen=True)
class Ablation:
    """All that came of it.

    Attributes:
        folder: where the cells and the table are.
        effects: of the arms, best first.
        facts: by arm: changes, rows, coverage, distance, leak with its interval, seconds; each over the seeds.
        base: means of the metrics before training.
        anchors: held-out anchors.
        seeds: by arm, the mean of the first metric of each seed.
        losses: by arm, of its first seed.
        failed: by cell, why there is no result.
    """

    folder: Path
    effects: list[Effect]
    facts: dict[str, dict[str, Any]]
    base: dict[str, float]
    anchors: int
    seeds: dict[str, list[float]]
    losses: dict[str, Floats]
    failed: dict[str, str]

    @property
    def verdict(self) -> str:
        """One sentence."""
        return verdict(self.effects)

    def document(self) -> dict[str, Any]:
        """As JSON."""
        rows = [effect.document() | self.facts[effect.arm] for effect in self.effects]
        return {
            "verdict": self.verdict,
            "anchors": self.anchors,
            "base": self.base,
            "arms": rows,
            "failed": self.failed,
        }


def ablate(config: Config, *, reporter: Reporter | None = None, **options: Any) -> Ablation:
    """Make every cell that is not made, compare the arms, and write `RUN/ablation/ablation.parquet`.

    Args:
        config: with sections `train` and, for other than its defaults, `ablate`.
        reporter: where progress goes.
        options: of `graph.train`.

    Raises:
        ConfigError: the config has no section `train`, or the settings of an arm do not go with it.
        InputError: no cell came to an end; the message says why.
    """
    if config.train is None:
        raise ConfigError("train: the config has no such section: add `train: {}` to compare models with its defaults")
    folder = config.run_dir / FOLDER
    options["reporter"] = reporter
    # Known before anything runs; what calibration recommends goes with any config that mines.
    _configs(config, folder, arms(config, dict))
    changes = arms(config, lambda: _calibrated(config, folder, options))
    configs = _configs(config, folder, changes)
    made, failed = [], {}
    ran = seconds = 0.0
    for number, ((arm, seed), own) in enumerate(configs.items()):
        left = f", about {duration((len(configs) - number) * seconds / ran)} left" if ran else ""
        logger.info("ablate: cell %d of %d: %s, seed %d%s", number + 1, len(configs), arm, seed, left)
        started = time.monotonic()
        try:
            result = graph.train(own, **options)
        except _SKIPPED as error:
            logger.error("ablate: %s, seed %d has no result: %s", arm, seed, error)
            failed[f"{arm}, seed {seed}"] = str(error)
            continue
        if "train" in result.ran:
            ran, seconds = ran + 1, seconds + time.monotonic() - started
        made.append(_cell(arm, seed, own))
        first = METRICS[0]
        logger.info("ablate: %s, seed %d: %s %.4f", arm, seed, first, made[-1].scores[first].mean())
    if not made:
        raise InputError(f"no cell came to an end; the first: {next(iter(failed.values()))}")
    found = _compared(config, folder, made, failed, reporter)
    _write(found)
    ablation_page.write(found, {arm: json.dumps(own, ensure_ascii=False) for arm, own in changes.items()})
    return found


def _configs(config: Config, folder: Path, found: Mapping[str, Changes]) -> dict[tuple[str, int], Config]:
    """The config of every cell by arm and seed, in the order they are made."""
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
            raise ConfigError(f"ablate: the arm '{arm}': {error}") from None
    return made


def _calibrated(config: Config, folder: Path, options: Mapping[str, Any]) -> Changes:
    """What `calibrate` recommends to who mines with negpipe's other defaults."""
    own = child(config, folder / "calibration", {**rules(config), "ablate": None, "output.report": False})
    logger.info("ablate: calibrates")
    graph.mine(own, **options)
    advice = recommend(measures.calibrate_settings(own, reporter=options["reporter"]), coverage=0.9, max_leak=0.05)
    if advice.chosen is None:
        raise InputError(
            "no setting can be recommended", field="ablate.sets", remedy=f"Leave '{CALIBRATED}' out of the sets"
        )
    return rules(config, **asdict(advice.chosen.setting))


def _cell(arm: str, seed: int, config: Config) -> Cell:
    """Read what a cell made."""
    store = LocalStore(config.store or config.run_dir)

    def manifest(stage: str) -> Manifest:
        found = Books(config.run_dir, stage, store).manifest()
        assert found is not None, "the cell is made"
        return found

    def table(part: Part, role: str) -> pa.Table:
        return pq.read_table(store.path(part.file(role).path))

    trained, mined = manifest("train"), manifest("triplets")
    (evaluation,), (model,) = trained.of_kind("evaluation"), trained.of_kind("model")
    scores, base = (
        {name: table(evaluation, "scores")[f"{name}_{side}"].to_numpy() for name in METRICS}
        for side in ("after", "before")
    )
    stats = mined.stats
    means = [stats["scores"][side]["mean"] for side in ("positive", "negative")]
    facts = {
        "rows": stats["rows"],
        "coverage": 1 - stats["short_anchors"] / max(1, manifest("ingest").stats["anchors"]),
        "distance": None if None in means else means[0] - means[1],
        "seconds": sum(part.provenance["seconds"] for part in (*mined.parts, model)),
    }
    return Cell(arm, seed, config, scores, base, table(model, "log")["loss"].to_numpy(), facts)


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
            values = [cell.facts[name] for cell in own if cell.facts[name] is not None]
            means[name] = float(np.mean(values)) if values else None
        leak = _leak(own[0].config, reporter)
        facts[arm] = means | {"leak": leak and leak.leak, "leak_low": leak and leak.lo, "leak_high": leak and leak.hi}
    scores = {
        arm: {name: np.stack([cell.scores[name] for cell in own]) for name in METRICS} for arm, own in by_arm.items()
    }
    base = cells[0].base
    return Ablation(
        folder,
        effects(scores, base, seed=config.seed),
        facts,
        {name: float(values.mean()) for name, values in base.items()},
        len(base[METRICS[0]]),
        {arm: values[METRICS[0]].mean(axis=1).tolist() for arm, values in scores.items()},
        {arm: own[0].losses for arm, own in by_arm.items()},
        failed,
    )


def _leak(config: Config, reporter: Reporter | None) -> Estimate | None:
    """The leak of a config's own setting; None: it mines none, or no anchor has a positive that can be hidden."""
    if config.train is None or not config.train.negatives or not config.mining.num_negatives:
        return None
    try:
        return measures.calibrate_settings(config, lambda own: [of_config(own)], reporter=reporter).estimates[0]
    except InputError as error:
        logger.warning("ablate: no leak is known: %s", error)
        return None


def _write(found: Ablation) -> None:
    """The table, a row an arm."""
    rows = [*_rows(found)]
    table = pa.table({name: [row[name] for row in rows] for name in rows[0]})
    table = table.replace_schema_metadata({"verdict": found.verdict, "base": json.dumps(found.base)})
    publish(found.folder, TABLE, lambda file: pq.write_table(table, file, compression="zstd"))


def _rows(found: Ablation) -> Iterator[dict[str, Any]]:
    for effect in found.effects:
        row = effect.document()
        means, spreads = row.pop("means"), row.pop("spreads")
        yield (
            row
            | {name: means[name] for name in METRICS}
            | {f"{name}_spread": spreads[name] for name in METRICS}
            | found.facts[effect.arm]
        )
