"""Tasks in actors of Ray, on the nodes of a cluster: `negpipe.worker.Actor`.

An actor is of one stage, has its cores and its GPU for itself, and makes one part after the other; paths and keys
travel, never arrays. An actor or a node that is lost counts as a death, see `executors.crew`: its task is tried again
wherever there is room. With the driver Ray ends its actors, and what they had published is kept. The run directory, the
store and what a stage reads are paths that every node sees.
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

_PATIENCE = 60.0  # seconds without an actor, after which that is told
_DETAIL = 300  # characters of what Ray says of a death
_BESIDE = {"messages": 1, "looks": 1}  # methods of an actor that are called beside its tasks, and their threads


def examine(stages: list[Stage], context: Context) -> None:
    """What can be known before anything runs: the cluster answers, and has nodes that are large enough.

    Raises:
        ConfigError: it does not, or has none.
    """
    cluster.connect(context.config)
    for stage in stages:
        budget = cluster.granted(stage.within(context))
        cluster.room(context.config, cluster.demand(budget), stage.name)


def run(stage: Stage, tasks: Iterator[Task], context: Context, progress: Progressed) -> None:
    """See `negpipe.engine.stage.Executor`.

    Raises:
        NegpipeError: what a task raised, or TaskFailedError for an actor that died too often.
        VersionsError: a node has other versions of libraries than the one that came first.
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
    crew = _Crew(stage, tasks, context, progress, demand=demand, taken=deque([first]))
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
    """An actor that was asked for; `host` is empty until Ray has started it."""

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
class _Crew(Crew[_Actor]):
    """Actors get a task when they are there, so that none waits for one that has no room."""

    demand: Demand = field(kw_only=True)
    taken: deque[Task] = field(kw_only=True)
    """Tasks in nobody's hands, taken to see how many actors are worth starting, or lost by one."""
    versions: Mapping[str, str] = field(default_factory=dict)
    starts: Counter[int] = field(default_factory=Counter)
    """Actors that ended before they were there, by the number of their place."""
    lonely: float = 0.0
    """Seconds without any actor."""

    def start(self, number: int | None = None) -> None:
        """Ask for an actor: another one, or one in the place of one that is gone."""
        import ray

        number = len({worker.number for worker in self.workers}) if number is None else number
        log = log_of(self.stage, self.context, number)
        shown = environment(self.context.budget)
        if devices.is_gpu(self.context.budget.device):
            del shown["CUDA_VISIBLE_DEVICES"]  # Ray's to say
        # The module lies above this one, as it knows all stages: it is named, and not imported.
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
            self.workers.append(worker)  # the next turn is another one's
            try:
                message = ray.get(next(stream))
            except (ray.exceptions.RayError, StopIteration) as error:
                self.mourn(worker, error)
            else:
                self.take(worker, message)

    def take(self, worker: _Actor, message: Mapping[str, Any]) -> None:
        """Take a message of an actor."""
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
        """Try what a lost actor was at again, be it its own start.

        Raises:
            TaskFailedError: it was tried too often.
        """
        detail = _detail(error)
        if worker.task:
            self.lose(
                worker, worker.task, f"its {'node' if 'node' in detail[:40] else 'process'} was lost: {detail}"
            )
            return
        worker.end()
        self.starts[worker.number] += 1
        if self.starts[worker.number] > RETRIES:
            raise TaskFailedError(
                f"{self.stage.name}: a worker failed to start {RETRIES + 1} times; last cause: {detail}. Its log,"
                f" {worker.log}, ends with: {last_line(worker.log)}"
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
    """What Ray says of a death, without its advice; of an exception in an actor, its last line."""
    said = str(error).strip()
    _, dead, why = said.partition("The actor is dead because ")
    return (why.partition(" Some common causes")[0] if dead else said.split("\n")[-1])[:_DETAIL].strip()
