"""Runs tasks in Ray actors, on the nodes of a cluster: `negpipe.worker.Actor`.

An actor serves one stage, has its cores and GPU to itself, and makes one part after the other; only paths and keys are
transferred, never arrays. A lost actor or node counts as a death, see `executors.crew`: its task is retried wherever
there is room. Ray ends its actors when the driver ends; what they had published is kept. The run directory, the store
and the inputs of a stage are paths that every node must see.
"""

from __future__ import annotations

import json
import logging
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from negpipe.engine import devices, versions
from negpipe.engine.executors import cluster
from negpipe.engine.executors.cluster import Demand
from negpipe.engine.executors.crew import (
    GRACE,
    MEMORY_HINT,
    RETRIES,
    Crew,
    Worker,
    environment,
    head,
    last_line,
    log_of,
)
from negpipe.engine.stage import Context, Progressed, Stage, Task
from negpipe.errors import TaskFailedError, error_of

logger = logging.getLogger(__name__)

_PATIENCE = 60.0  # seconds without an actor before a warning
_DETAIL = 300  # characters of Ray's message about a death
_BESIDE = {"messages": 1, "looks": 1}  # methods of an actor called while it runs tasks, and their threads


def examine(stages: list[Stage], context: Context) -> None:
    """Check before anything runs that the cluster answers and has large enough nodes.

    Raises:
        ConfigError: it does not answer, or has none.
    """
    cluster.connect(context.config)
    for stage in stages:
        budget = cluster.granted(stage.within(context))
        cluster.room(context.config, cluster.demand(budget), stage.name)


def run(stage: Stage, tasks: Iterator[Task], context: Context, progress: Progressed) -> None:
    """See `negpipe.engine.stage.TaskExecutor`.

    Raises:
        NegpipeError: the error of a task, or TaskFailedError if an actor died too often.
        VersionsError: a node has other library versions than the first node.
    """
    if (first := next(tasks, None)) is None:
        return
    cluster.connect(context.config)
    budget = cluster.granted(context)
    demand = cluster.demand(budget)
    room, wanted = cluster.room(context.config, demand, stage.name), context.config.executor.workers
    if wanted and wanted > room:
        logger.warning("%s: executor.workers is %d, with room for %d (each %s)", stage.name, wanted, room, demand)
    actors = wanted or room
    config = context.config.model_copy(
        update={"executor": context.config.executor.model_copy(update={"workers": actors})}
    )
    context = replace(context, config=config, granted=budget)
    crew = _RayCrew(stage, tasks, context, progress, demand=demand, taken=deque([first]))
    try:
        while len(crew.workers) < actors:
            crew.start()
            if (further := next(tasks, None)) is None:
                break
            crew.taken.append(further)
        crew.work()
    finally:
        for worker in crew.workers:
            worker.end()


@dataclass(kw_only=True, eq=False)
class _Actor(Worker):
    """A requested actor; `host` is empty until Ray has started it."""

    handle: Any
    stream: Any
    number: int
    host: str = ""
    pid: int = 0
    gone: bool = False

    def send(self, message: dict[str, Any]) -> None:
        self.handle.run.remote(json.dumps(message))

    def dismiss(self) -> None:
        self.end()

    def end(self) -> None:
        import ray

        if not self.gone:
            self.gone = True
            ray.kill(self.handle)

    @property
    def place(self) -> str:
        return f"process {self.pid} on {self.host}"

    def whereabouts(self) -> str:
        import ray

        try:
            return str(ray.get(self.handle.whereabouts.options(concurrency_group="looks").remote(), timeout=GRACE))
        except ray.exceptions.RayError:
            return "it does not report its stack: it was stopped, or computes without pause"


@dataclass
class _RayCrew(Crew[_Actor]):
    """Actors get a task once they have started, so that no task waits for an actor without room."""

    demand: Demand = field(kw_only=True)
    taken: deque[Task] = field(kw_only=True)
    """Unassigned tasks: fetched to see how many actors are worth starting, or lost by an actor."""
    versions: Mapping[str, str] = field(default_factory=dict)
    starts: Counter[int] = field(default_factory=Counter)
    """Failed starts of actors, by actor number."""
    lonely: float = 0.0
    """Seconds without any actor."""

    def start(self, number: int | None = None) -> None:
        """Request an additional actor, or a replacement for a lost one."""
        import ray

        number = len({worker.number for worker in self.workers}) if number is None else number
        log = log_of(self.stage, self.context, number)
        shown = environment(self.context.budget)
        if devices.is_gpu(self.context.budget.device):
            del shown["CUDA_VISIBLE_DEVICES"]  # set by Ray
        # The module is in a higher layer, as it knows all stages: it is imported by name.
        remote: Any = ray.remote
        kind = remote(concurrency_groups=_BESIDE)(import_module("negpipe.worker").Actor)
        handle = kind.options(
            num_cpus=self.demand.cpus,
            num_gpus=self.demand.gpus,
            memory=self.demand.memory,
            runtime_env={"env_vars": shown},
            max_restarts=0,
            max_task_retries=0,
        ).remote(head(self.stage, self.context) | {"log": str(log.absolute()), "folder": str(Path.cwd())})
        stream = handle.messages.options(num_returns="streaming", concurrency_group="messages").remote()
        device = self.context.budget.device
        self.workers.append(_Actor(log=log, device=device, handle=handle, stream=stream, number=number))

    def following(self) -> Task | None:
        return self.taken.popleft() if self.taken else super().following()

    @property
    def busy(self) -> bool:
        return bool(self.taken) or super().busy

    def retry(self, task: Task, worker: _Actor) -> None:
        self.taken.appendleft(task)
        self.start(worker.number)

    def listen(self, seconds: float) -> None:
        import ray

        there = {worker.stream: worker for worker in self.workers if not worker.gone}
        ready: list[Any]
        ready, _ = ray.wait([*there], num_returns=1, timeout=seconds, fetch_local=False)
        for stream in ready:
            worker = there[stream]
            self.workers.remove(worker)
            self.workers.append(worker)  # the next turn goes to another one
            try:
                message = ray.get(next(stream))
            except (ray.exceptions.RayError, StopIteration) as error:
                self.mourn(worker, error)
            else:
                self.take(worker, message)

    def take(self, worker: _Actor, message: Mapping[str, Any]) -> None:
        """Handle a message of an actor."""
        worker.silent = worker.warned = 0.0
        if there := message.get("listening"):
            worker.host, worker.pid = there["host"], there["pid"]
            self.versions = self.versions or there["versions"]
            versions.check_same(self.versions, there["versions"], f"{self.stage.name}: its workers", worker.host)
            self.employ(worker)
        elif worker.task is None:
            raise error_of(dict(message))
        elif "ends" in message:
            self.lose(worker, worker.task, f"exit code {message['ends']}{MEMORY_HINT}")
        else:
            self.hear(worker, message)

    def mourn(self, worker: _Actor, error: Exception) -> None:
        """Retry the task of a lost actor, or its start.

        Raises:
            TaskFailedError: it was retried too often.
        """
        detail = _detail(error)
        if worker.task:
            self.lose(worker, worker.task, f"its {'node' if 'node' in detail[:40] else 'process'} was lost: {detail}")
            return
        worker.end()
        self.starts[worker.number] += 1
        if self.starts[worker.number] > RETRIES:
            raise TaskFailedError(
                f"{self.stage.name}: a worker failed to start {RETRIES + 1} times; last cause: {detail}."
                f"{cluster.hint(detail)} Its log, {worker.log}, ends with: {last_line(worker.log)}"
            )
        logger.warning("%s: a worker failed to start, starting it again: %s", self.stage.name, detail)
        self.start(worker.number)

    def watch(self, seconds: float) -> None:
        super().watch(seconds)
        there = any(worker.host and not worker.gone for worker in self.workers)
        self.lonely = 0.0 if there else self.lonely + seconds
        if self.lonely >= _PATIENCE:
            self.lonely = 0.0
            cluster.room(self.context.config, self.demand, self.stage.name)
            logger.warning("%s: waiting for room in the cluster for a worker (%s)", self.stage.name, self.demand)


def _detail(error: Exception) -> str:
    """Ray's message about a death, without its advice; for an exception in an actor, the last line."""
    said = str(error).strip()
    _, dead, why = said.partition("The actor is dead because ")
    return (why.partition(" Some common causes")[0] if dead else said.split("\n")[-1])[:_DETAIL].strip()
