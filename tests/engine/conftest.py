"""The run that tests of kills, rivals, shards and clusters copy and compare with."""

from __future__ import annotations

import pytest
from beir_data import numbered_folder, precomputed_config
from real_runs import Run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An ordinary run, undisturbed, small, and of many parts."""
    folder = tmp_path_factory.mktemp("whole")
    run = Run(precomputed_config(folder / "run", numbered_folder(folder / "beir", 160, 80)))
    run.mine()
    return run
