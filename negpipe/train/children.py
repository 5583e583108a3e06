"""Runs within a larger job: rounds of `refresh`, arms of `ablate`.

Each is an ordinary run with a separate config and run directory. All runs of a job share a store, so that identical
parts are made once, and the source is read once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.config.schema import Config
from negpipe.engine import shown
from negpipe.engine.manifest import Books, Manifest
from negpipe.engine.progress import Reporter
from negpipe.engine.stage import Context, cache_path
from negpipe.engine.state import digests_of
from negpipe.errors import ConfigError, InputError, NegpipeError
from negpipe.redaction import redacted
from negpipe.review import calibrate, measures
from negpipe.store.files import publish, write_all
from negpipe.store.opening import run_of, store_of

STORE = "store"
"""The folder next to the run directories, if the config sets no store."""
_READING = ("ingest", "held_out")  # the stages that read the source


def child(config: Config, folder: Path, changes: Mapping[str, Any]) -> Config:
    """The config with some keys changed and another run directory, validated like a user's config.

    Args:
        config: the job's config as loaded, not resolved.
        folder: the run directory; its siblings share its store.
        changes: values by key, "mining.range_min"; a mapping replaces an entire section.

    Raises:
        ConfigError: the changes are incompatible with the config, or name an unknown key.
    """
    tree = config.model_dump(mode="json", exclude_unset=True)
    tree |= {"run_dir": str(folder), "store": str(config.store or folder.parent / STORE)}
    for key, value in changes.items():
        *sections, leaf = key.split(".")
        node = tree
        for section in sections:
            inner = node.get(section)
            node[section] = node = inner if isinstance(inner, dict) else {}
        node[leaf] = value
    return load_config(tree)


def check_place(config: Config, verb: str) -> None:
    """Refuse a run directory in a bucket: the runs of a job are in sibling folders and share a store there.

    Raises:
        ConfigError: it is in a bucket.
    """
    if config.url:
        raise ConfigError(
            f"run_dir: {verb} makes several runs, in folders on a disk, not in {config.url}: use a folder"
        )


def written(run: Config) -> None:
    """Write a run's config next to its folder, so that every command works on it."""
    text = yaml.safe_dump(redacted(run.model_dump(mode="json", exclude_unset=True)), sort_keys=False)
    publish(run.run_dir.parent, f"{run.run_dir.name}.yaml", lambda file: write_all(file, text.encode()))


def inherit(config: Config, before: Config) -> None:
    """Let a new run take over the parts that another run of the same store has read from the source.

    The run itself checks whether it would have read the same; if not, it reads the source.
    """
    if config.store != before.store:
        return
    config.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    cache = cache_path(config.run_dir)
    if not cache.exists() and cache_path(before.run_dir).exists():
        digests = cache_path(before.run_dir).read_bytes()
        publish(cache.parent, cache.name, lambda file: write_all(file, digests))
    with digests_of(config) as cached:
        context = Context(config, config.run_dir, cached)
        for name in _READING:
            own, others = (Books(run_of(each), name) for each in (config, before))
            if own.content() is None and (manifest := others.manifest()):
                shown.show(graph.of_kind(name), context, manifest)
                own.write_manifest(manifest, None)


def manifest(run: Config, stage: str) -> Manifest:
    """The manifest of a stage of a run.

    Raises:
        NegpipeError: it does not exist.
    """
    found = Books(run_of(run), stage).manifest()
    if found is None:
        raise NegpipeError(f"the output of {stage} in {run.run_dir} is missing: run the command again")
    return found


def table(run: Config, kind: str, role: str) -> pa.Table:
    """A table written by training: the file of a role in the part of a kind."""
    (part,) = manifest(run, "train").of_kind(kind)
    return pq.read_table(store_of(run).path(part.file(role).path))


def scores(run: Config) -> pa.Table:
    """Every metric of each held-out anchor, before and after."""
    return table(run, "evaluation", "scores")


@dataclass(frozen=True)
class Leak:
    """Estimated share of false negatives among a run's mined negatives, see `calibrate`.

    Attributes:
        leak: None if it cannot be estimated, for the reason in `leak_missing`.
        leak_low, leak_high: its 95 % confidence interval.
        leak_anchors: number of anchors it is estimated from.
    """

    leak: float | None = None
    leak_low: float | None = None
    leak_high: float | None = None
    leak_anchors: int = 0
    leak_missing: str | None = None


def leak(run: Config, reporter: Reporter | None) -> Leak:
    """The leak of the run's own setting, estimated by hiding positives."""
    if not run.mining.num_negatives:
        return Leak(leak_missing="mining.num_negatives is 0: no negative was mined")
    try:
        made = measures.calibrate_settings(run, lambda config: [calibrate.of_config(config)], reporter=reporter)
    except InputError as error:
        return Leak(leak_missing=error.problem)
    found = made.estimates[0]
    return Leak(found.leak, found.lo, found.hi, made.anchors)
