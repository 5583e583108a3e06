"""What tests of kills, rivals, shards and clusters share: a run to copy and to compare with, and real clusters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray_nodes
import slurm_box
from befalls import Control
from beir_data import numbered_folder, precomputed_config
from real_runs import Run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An ordinary run, undisturbed, small, and of many parts."""
    folder = tmp_path_factory.mktemp("whole")
    run = Run(precomputed_config(folder / "run", numbered_folder(folder / "beir", 160, 80)))
    run.mine()
    return run


@pytest.fixture(scope="session")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ray_nodes.Nodes]:
    """A Ray cluster, which runs until the tests are over."""
    pytest.importorskip("ray")
    with ray_nodes.started(Control(tmp_path_factory.mktemp("control") / "told")) as nodes:
        yield nodes


@pytest.fixture(scope="session")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The configuration of a real Slurm of one node, which runs until the tests are over."""
    if not slurm_box.installed():
        pytest.skip("no slurmctld and slurmd, or no rights to run them (.ci/slurm installs them)")
    with slurm_box.started(tmp_path_factory.mktemp("slurm")) as file:
        yield file
