"""Runs that a larger job is made of: rounds of `refresh`, arms of `ablate`.

Each is an ordinary run with a config and a run directory of its own. All of a job share a store, so that what is the
same for them is made once, and the source is read once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.config.schema import Config
from negpipe.engine import shown
from negpipe.engine.manifest import Books
from negpipe.engine.stage import Context, cache_path
from negpipe.engine.state import digests_of
from negpipe.store.files import publish, write_all

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
            node[section] = node = node.get(section) or {}
        node[leaf] = value
    return load_config(tree)


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
            own, others = Books(config.run_dir, name), Books(before.run_dir, name)
            if own.content() is None and (manifest := others.manifest()):
                shown.show(graph.of_kind(name), context, manifest)
                own.write_manifest(manifest, None)
