"""The graph of stages for a config, and the operations of the engine on it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from negpipe.config.schema import Config
from negpipe.data.candidates import DENSE, TEACHER
from negpipe.engine import pipeline, shards, upkeep
from negpipe.engine.executors import slurm
from negpipe.engine.manifest import Books
from negpipe.engine.shards import Shard, Worked
from negpipe.engine.stage import Context, Graph, Stage
from negpipe.engine.state import State, digests_of, look
from negpipe.engine.upkeep import Inventory
from negpipe.errors import ConfigError
from negpipe.stages import STAGES
from negpipe.stages.rescore import NAME as RESCORE
from negpipe.stages.rescore import recorded
from negpipe.stages.search import SLICES
from negpipe.store.opening import run_of

__all__ = [
    "Result",
    "Shard",
    "Worked",
    "check_trains",
    "clean",
    "commit",
    "inventory",
    "mine",
    "mining",
    "of_kind",
    "resolved",
    "sharded",
    "stages",
    "status",
    "superseded",
    "train",
    "work",
]


class Result(pipeline.Finished):
    """Result of a run: its rows, each stage's counts, which stages ran, and the store of the run directory."""

    @property
    def triplets(self) -> Path:
        """The folder of the training rows."""
        return self.run_dir / "triplets"


def stages(config: Config) -> Graph:
    """All stages of the config: those for mining, and those for training if there is a section `train`."""
    return mining(config) if config.train is None else _training(mining(config))


def of_kind(kind: str) -> Stage:
    """The stage that implements a kind."""
    known = {**STAGES, SLICES.name: SLICES}
    return known[kind] if kind in known else _training(STAGES)[kind]


def _training(mining: Graph) -> Graph:
    """The stages for mining and those of `negpipe.train`. That package is imported by name only: its rounds of mining
    and training run graphs, so it is above this module."""
    graph: Graph = import_module("negpipe.train").with_training(mining)
    return graph


def mining(config: Config, rescore: Stage | None = None) -> Graph:
    """The five stages, plus one for searching in slices; `rescore` follows search, and its candidates replace those of
    search. Without it, candidates that a Python program scored in this run directory are used."""
    rescore = rescore or _recorded(config)
    graph: dict[str, Stage] = {}
    for name, stage in STAGES.items():
        if name == "search" and config.search.slice_documents:
            graph[SLICES.name] = SLICES
        graph[name] = stage
        if rescore and name == rescore.provides:
            graph[rescore.name] = rescore
    return graph


def _recorded(config: Config) -> Stage | None:
    """The stage whose scores the config selects by, as an earlier program ran it."""
    if config.mining.score != TEACHER:
        return None
    manifest = Books(run_of(config), RESCORE).manifest()
    return None if manifest is None else recorded(manifest)


def mine(config: Config, *, rescore: Stage | None = None, **options: Any) -> Result:
    """Bring the stages for mining up to date, see `pipeline.mine`.

    Raises:
        ConfigError: also if no stage computes `mining.score`.
    """
    return _run(config, mining(config, rescore), rescore is not None, options)


def work(config: Config, stage: str, shard: Shard, **options: Any) -> Worked:
    """Compute the missing parts of a shard of a mining stage, see `shards.work`.

    Raises:
        ConfigError: also if the stage does not exist.
    """
    return shards.work(config, _shared(config, stage), stage, shard, **options)


def commit(config: Config, stage: str, **options: Any) -> Result:
    """Write the manifest of a stage computed in shards, see `shards.commit`.

    Raises:
        ConfigError: also if the stage does not exist.
    """
    return Result(**vars(shards.commit(config, _shared(config, stage), stage, **options)))


def sharded(config: Config) -> Graph:
    """The stages that can be computed in shards."""
    return {name: stage for name, stage in mining(config).items() if stage.place(config) != "caller"}


def _shared(config: Config, stage: str) -> Graph:
    """The stages for mining, if `stage` is one of them."""
    graph = mining(config)
    if stage not in graph:
        *names, last = sharded(config)
        raise ConfigError(f"{stage!r} cannot be computed in shards: choose from {', '.join(names)} and {last}")
    if stage == "triplets":
        _check_scores(config, graph)
    return graph


def train(config: Config, **options: Any) -> Result:
    """Bring all stages up to date, including those for training, see `pipeline.mine`.

    Raises:
        ConfigError: also if the config has no section `train`.
    """
    check_trains(config)
    return _run(config, stages(config), False, options)


def check_trains(config: Config) -> None:
    """Refuse a config without training.

    Raises:
        ConfigError: it has no section `train`.
    """
    if config.train is None:
        raise ConfigError("train: the config has no section train: add `train: {}` to train with the defaults")


def _run(config: Config, graph: Graph, in_caller: bool, options: dict[str, Any]) -> Result:
    if options.get("only") in (None, "triplets"):
        _check_scores(config, graph)
    if config.executor.kind == "slurm" and not in_caller:
        options = {"elsewhere": dict.fromkeys(sharded(config), slurm.arrays(config, work)), **options}
    return Result(**vars(pipeline.mine(config, graph, **options)))


def _check_scores(config: Config, graph: Graph) -> None:
    scores = (DENSE, TEACHER) if RESCORE in graph else (DENSE,)
    if config.mining.score not in scores:
        raise ConfigError(
            f"mining.score: no stage computes the score {config.mining.score!r}: set it to {' or '.join(scores)}"
        )
    if config.mining.score != DENSE and config.mining.draws:
        raise ConfigError(
            f"mining.score: random negatives have no {config.mining.score} score: set mining.num_random: 0, and not"
            " mining.on_shortage: random"
        )
    if config.mining.score != DENSE and config.mining.prefers:
        raise ConfigError(
            f"mining.score: negatives from the source may have no {config.mining.score} score: set"
            " mining.given_negatives: ignore and mining.judged: allow"
        )


def status(config: Config) -> list[State]:
    """The state of every stage. Read-only."""
    return pipeline.status(config, stages(config))


def inventory(config: Config) -> Inventory:
    """The recorded files of a run, see `upkeep.inventory`."""
    return upkeep.inventory(config, stages(config))


def superseded(config: Config) -> list[tuple[Path, int]]:
    """The files that `clean` deletes, see `upkeep.superseded`."""
    return upkeep.superseded(config, stages(config))


def clean(config: Config) -> int:
    """Delete what `superseded` lists. Returns the bytes freed."""
    return upkeep.clean(config, stages(config))


def resolved(config: Config) -> tuple[Config, bool]:
    """The config as the stages see it.

    Returns:
        the config, and whether it is complete: values that depend on the data are known once ingest is current.
    """
    mining, positives = config.mining, 0
    if mining.range_max is None or isinstance(mining.depth, str):
        with digests_of(config) as digests:
            state = look(STAGES["ingest"], Context(config, config.run_dir, digests))
        if state.state != "current" or state.manifest is None:
            return config, False
        positives = state.manifest.stats["max_positives"]
    config = config.resolved(positives)
    return config.model_copy(update={"search": config.search.model_copy(update={"depth": config.depth})}), True
