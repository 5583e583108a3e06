"""A real Ray cluster on this machine: a head without cores, and nodes of one core each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from befalls import Control
from real_runs import Run

from negpipe import graph
from negpipe.config.file import load_config

ACTOR = ("executor.kind=ray", "executor.workers=null", "resources.cpus=1", "resources.memory_budget=64MiB")


@dataclass(frozen=True)
class Nodes:
    """The cluster, and what befalls the workers of its nodes."""

    cluster: Any
    control: Control

    def fill(self, count: int = 3) -> None:
        """Have at least so many nodes."""
        for node in [*self.cluster.worker_nodes]:
            if any(kind == "raylet" for kind, _ in node.dead_processes()):
                self.cluster.remove_node(node, allow_graceful=False)
        while len(self.cluster.worker_nodes) < count:
            self.add()

    def add(self, gpus: int = 0, **environment: str) -> Any:
        """Have one more node, of one core or as many as GPUs, whose workers have this environment too."""
        workers, shown = max(1, gpus), {**self.control.environment, **environment}
        settings: dict[str, Any] = {"num_cpus": workers, "num_gpus": gpus, "memory": workers * 2 * 2**30}
        settings |= {"object_store_memory": 80 * 2**20, "env_vars": shown}
        return patiently(lambda: self.cluster.add_node(**settings))

    @contextmanager
    def one_more(self, **settings: Any) -> Iterator[Any]:
        """The same for a while: once it is over, Ray counts that node no more."""
        node = self.add(**settings)
        try:
            yield node
        finally:
            self.cluster.remove_node(node)
            self.cluster.wait_for_nodes()

    @property
    def address(self) -> str:
        return f"executor.ray.address={self.cluster.address}"

    def mine(self, run: Run, *overrides: str, **options: Any) -> graph.Result:
        return graph.mine(load_config(run.config, [*ACTOR, self.address, *overrides]), **options)


def patiently(start: Callable[[], Any]) -> Any:
    """Ray gives a node 30 seconds to start, which a busy machine may not do."""
    for _ in range(3):
        try:
            return start()
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
    return start()


@contextmanager
def started(control: Control) -> Iterator[Nodes]:
    from ray.cluster_utils import Cluster

    # A dead node is to be missed soon, and one of a busy machine not to be taken for dead.
    system = {"health_check_period_ms": 1000, "health_check_initial_delay_ms": 5000}
    system |= {"prestart_worker_first_driver": False}
    head = {"num_cpus": 0, "object_store_memory": 80 * 2**20, "_system_config": system}
    head |= {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        made = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
    try:
        yield Nodes(made, control)
    finally:
        made.shutdown()
