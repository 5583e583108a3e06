"""What executors with workers share: who works on what, and what becomes of deaths and of silence.

A worker that dies, or that is silent for longer than `executor.task_timeout`, is replaced and its task tried again, up
to `RETRIES` times; a task that fails with an explained error ends the run at once. Silence alone is warned about, with
where the worker stands.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from negpipe.engine import devices
from negpipe.engine.budget import Budget
from negpipe.engine.stage import Context, Progressed, Stage, Task
from negpipe.errors import TaskFailedError, error_of
from negpipe.store.files import BOOKS

logger = logging.getLogger(__name__)

RETRIES = 2
OUT_OF_MEMORY = 12
"""Exit code of a worker whose task did not fit into memory: it is tried again like one that was killed."""
SILENCE_SECONDS = 300.0
"""A worker that says nothing for so long is warned about, and again after twice as long."""
MEMORY_HINT = " (out of memory? lower executor.workers, encoder.batch_size or resources.memory_budget)"
TAIL = 200
"""Characters of what a worker said that a message quotes."""
GRACE = 5.0
"""Seconds for a process to end, and to say where it stands."""
_TICK = 0.5  # seconds between two looks at who is silent
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")


@dataclass(kw_only=True, eq=False)
class Worker(ABC):
    """One that runs tasks of a stage one after the other: what it works on, and for how long it has said nothing."""

    log: Path
    device: str
    task: Task | None = None
    silent: float = 0.0
    warned: float = 0.0

    def give(self, task: Task) -> None:
        """Hand it a task, without waiting for it."""
        self.task = task
        self.send({"key": task.key, "kind": task.kind, "rows": task.rows, "payload": task.payload})

    @abstractmethod
    def send(self, message: dict[str, Any]) -> None:
        """Hand it a message, without waiting for it."""

    @abstractmethod
    def dismiss(self) -> None:
        """Let it go: there will be no more tasks."""

    @abstractmethod
    def end(self) -> None:
        """Kill it."""

    @abstractmethod
    def whereabouts(self) -> str:
        """Where it stands, as a sentence that begins with "it"; the stacks of all its threads go to its log."""

    @property
    @abstractmethod
    def place(self) -> str:
        """Process and machine, for people."""


W = TypeVar("W", bound=Worker)


@dataclass
class Crew(ABC, Generic[W]):
    """The workers of one stage, and what becomes of what they say, and of their silence."""

    stage: Stage
    tasks: Iterator[Task]
    context: Context
    progress: Progressed
    workers: list[W] = field(default_factory=list)
    attempts: Counter[str] = field(default_factory=Counter)

    @abstractmethod
    def listen(self, seconds: float) -> None:
        """Take what a worker says, or give up after so long."""

    @abstractmethod
    def retry(self, task: Task, worker: W) -> None:
        """Begin the task of a worker that is gone once more, with another one in its place."""

    def following(self) -> Task | None:
        """The next task that is in nobody's hands."""
        return next(self.tasks, None)

    def work(self) -> None:
        """Until every task is done.

        Raises:
            NegpipeError: what a task raised, or TaskFailedError for a worker that died too often.
        """
        looked = time.monotonic()
        while self.busy:
            self.listen(_TICK)
            if (passed := time.monotonic() - looked) >= _TICK:
                self.watch(min(passed, 2 * _TICK))  # while this process was stopped itself, it could hear nobody
                looked = time.monotonic()

    @property
    def busy(self) -> bool:
        """Whether there is a task that is not done."""
        return any(worker.task for worker in self.workers)

    def hear(self, worker: W, message: Mapping[str, Any]) -> None:
        """Take a message of a worker about its task."""
        task = worker.task
        assert task is not None
        if "units" in message:
            self.progress(task, message["units"], message["note"], False)
        elif "error" in message:
            raise error_of(dict(message))
        elif "done" in message:
            self.progress(task, 0, "", True)
            worker.task = None
            self.employ(worker)

    def employ(self, worker: W) -> None:
        """Give a worker the next task; without one, it may go."""
        if following := self.following():
            worker.give(following)
        else:
            worker.dismiss()

    def lose(self, worker: W, task: Task, cause: str) -> None:
        """Try the task of a dead or dying worker again."""
        worker.task = None
        worker.end()
        self.attempts[task.key] += 1
        if self.attempts[task.key] > RETRIES:
            raise TaskFailedError(self._obituary(worker, task, cause))
        logger.warning("%s died: %s; retrying its task", self._of(worker, task), cause)
        self.retry(task, worker)

    def watch(self, seconds: float) -> None:
        """Count so many more seconds of everybody's silence: warn of it, or end it."""
        limit = self.context.config.executor.task_timeout
        for worker in [*self.workers]:
            task = worker.task
            if task is None:
                continue
            worker.silent += seconds
            if limit and worker.silent >= limit:
                self.lose(worker, task, f"executor.task_timeout ({limit:g} s of silence): {worker.whereabouts()}")
            elif worker.silent >= max(SILENCE_SECONDS, 2 * worker.warned):
                worker.warned = worker.silent
                logger.warning(
                    "%s has been silent for %.0f s: %s. Stacks of all its threads: %s. %s",
                    self._of(worker, task),
                    worker.silent,
                    worker.whereabouts(),
                    worker.log,
                    "executor.task_timeout will end it" if limit else "It keeps running: executor.task_timeout is null",
                )

    def _of(self, worker: W, task: Task) -> str:
        gpu = f" ({worker.device})" if devices.is_gpu(worker.device) else ""
        return (
            f"{self.stage.name}: the worker for part {task.key} ({task.kind}, {task.rows} rows), {worker.place}{gpu},"
        )

    def _obituary(self, worker: W, task: Task, cause: str) -> str:
        return (
            f"{self.stage.name}: the worker for part {task.key} ({task.kind}, {task.rows} rows) died {RETRIES + 1}"
            f" times; last cause: {cause}. Its log, {worker.log}, ends with: {last_line(worker.log)}"
        )


def last_line(log: Path) -> str:
    """The end of what a worker logged."""
    lines = []
    with suppress(OSError):  # somebody may have deleted it
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip()[-TAIL:] for line in reversed(lines) if line.strip()), "(nothing)")


def environment(budget: Budget) -> dict[str, str]:
    """What a worker's libraries see of the machine: so many threads, and no GPU but its own."""
    shown = {"CUDA_VISIBLE_DEVICES": devices.visible(budget.device)}
    return dict.fromkeys(_THREADS, str(budget.threads)) | {"PYTHONUNBUFFERED": "1"} | shown


def head(stage: Stage, context: Context) -> dict[str, Any]:
    """What a worker is told before its first task: plain JSON."""
    return {
        "kind": stage.kind or stage.name,
        "stage": stage.name,
        "config": context.config.model_dump(mode="json"),
        "budget": asdict(context.budget),
        "inputs": {name: [manifest.stage, manifest.digest] for name, manifest in context.manifests.items()},
    }


def log_of(stage: Stage, context: Context, number: int) -> Path:
    """Where a worker logs."""
    name = "-".join(filter(None, (stage.name, context.shard, str(number))))
    return context.run_dir / BOOKS / "logs" / f"{name}.log"
