"""A config that is enough to look after a run directory."""

from __future__ import annotations

from pathlib import Path

from negpipe.config.file import load_config
from negpipe.config.schema import Config


def config_of(run_dir: Path | str, store: Path | None = None) -> Config:
    shared = {"store": str(store)} if store else {}
    return load_config({"run_dir": str(run_dir), "data": {"path": "nowhere"}, "encoder": {"model": "none"}, **shared})
