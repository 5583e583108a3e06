"""Shards that fail, for array tasks, which find this module by PYTHONPATH."""

from __future__ import annotations

import os
import signal
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

from negpipe import graph
from negpipe.config.schema import Config
from negpipe.engine.shards import Shard, Worked

ONCE = "killed"


def killed_once(config: Config, stage: str, shard: Shard, **options: Any) -> Worked:
    """The first of them is killed before it makes anything."""
    try:
        (Path(config.run_dir).parent / ONCE).touch(exist_ok=False)
    except FileExistsError:
        return graph.work(config, stage, shard, **options)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def killed(config: Config, stage: str, shard: Shard, **options: Any) -> Worked:
    """Shard 0 is always killed."""
    if shard.number == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return graph.work(config, stage, shard, **options)


def of_other_versions(config: Config, stage: str, shard: Shard, **options: Any) -> Worked:
    """Shard 0 runs where another numpy is installed."""

    def other(name: str) -> str:
        return "0.0.1" if name == "numpy" else version(name)

    with mock.patch("negpipe.engine.versions.version", other if shard.number == 0 else version):
        return graph.work(config, stage, shard, **options)
