"""Runs that a larger job is made of: rounds of `refresh`, arms of `ablate`.

Each is an ordinary run with a config and a run directory of its own. All of a job share a store, so that what is the
same for them is made once, and the source is read once.
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
"""The folder beside the run directories, where the config names no store."""
_READING = ("ingest", "held_out")  # the stages that read the source


def child(config: Config, folder: Path, changes: Mapping[str, Any]) -> Config:
    """The config with some keys changed and its run in another folder, checked like one that a user wrote.

    Args:
        config: of the job, as it was loaded: not a resolved one.
        folder: the run directory; its siblings share its store.
        changes: values by key, "mining.range_min"; a mapping takes the place of a whole section.

    Raises:
        ConfigError: the changes do not go with the config, or name no key of it.
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
    """Refuse a run directory in a bucket: the runs of a job lie in folders beside each other, and share a store there.

    Raises:
        ConfigError: it is in one.
    """
    if config.url:
        raise ConfigError(
            f"run_dir: {verb} makes several runs, in folders on a disk, not in {config.url}: use a folder"
        )


def written(run: Config) -> None:
    """Write a run's config beside its folder, so that every command can be asked of it."""
    text = yaml.safe_dump(redacted(run.model_dump(mode="json", exclude_unset=True)), sort_keys=False)
    publish(run.run_dir.parent, f"{run.run_dir.name}.yaml", lambda file: write_all(file, text.encode()))


def inherit(config: Config, before: Config) -> None:
    """Let a run that has not begun take over what another one of the same store has read of the source.

    The run itself finds out whether it would have read the same; if not, it reads.
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
    """What a stage of a run has made.

    Raises:
        NegpipeError: it is not there.
    """
    found = Books(run_of(run), stage).manifest()
    if found is None:
        raise NegpipeError(f"the output of {stage} in {run.run_dir} is missing: run the command again")
    return found


def table(run: Config, kind: str, role: str) -> pa.Table:
    """A table of what training made: of the part of a kind, the file of a role."""
    (part,) = manifest(run, "train").of_kind(kind)
    return pq.read_table(store_of(run).path(part.file(role).path))


def scores(run: Config) -> pa.Table:
    """Every metric of each held-out anchor, before and after."""
    return table(run, "evaluation", "scores")


@dataclass(frozen=True)
class Leak:
    """Estimated share of false negatives among what a run mined, see `calibrate`.

    Attributes:
        leak: None where it cannot be estimated, for the reason in `leak_missing`.
        leak_low, leak_high: hold it with 95 % confidence.
        leak_anchors: from which it is.
    """

    leak: float | None = None
    leak_low: float | None = None
    leak_high: float | None = None
    leak_anchors: int = 0
    leak_missing: str | None = None


def leak(run: Config, reporter: Reporter | None) -> Leak:
    """What the run's own setting leaks, by positives that are hidden."""
    if not run.mining.num_negatives:
        return Leak(leak_missing="mining.num_negatives is 0: no negative was mined")
    try:
        made = measures.calibrate_settings(run, lambda config: [calibrate.of_config(config)], reporter=reporter)
    except InputError as error:
        return Leak(leak_missing=error.problem)
    found = made.estimates[0]
    return Leak(found.leak, found.lo, found.hi, made.anchors)
