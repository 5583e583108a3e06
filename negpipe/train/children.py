"""Configs of the runs that a larger job is made of: rounds of `refresh`, arms of `ablate`.

Each is an ordinary config with a run directory of its own, and all of a job share a store: what is the same for them is
made once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from negpipe.config.file import load_config
from negpipe.config.schema import Config

STORE = "store"
"""The folder beside the run directories, where the config names no store."""


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
