"""Shared by executors with workers: assigning tasks, and handling dead and silent workers.

A worker that dies, or is silent for longer than `executor.task_timeout`, is replaced and its task retried, up to
`RETRIES` times; a task that fails with an explained error ends the run at once. Without a timeout, silence only leads
to warnings that show where the worker is.
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
"""Exit code of a worker whose task did not fit into memory: it is retried like that of a killed worker."""
SILENCE_SECONDS = 300.0
"""Silence after which a worker is warned about; again after twice as long, and so on."""
MEMORY_HINT = " (out of memory? lower executor.workers, encoder.batch_size or resources.memory_budget)"
TAIL = 200
"""Characters of a worker's output quoted in a message."""
GRACE = 5.0
"""Seconds that a process has to end, or to report its stack."""
_TICK = 0.5  # seconds between two checks for silent workers
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")


@dataclass(kw_only=True, eq=False)
class Worker(ABC):
    """Runs tasks of a stage one after the other. Tracks its current task and how long it has been silent."""

    log: Path
    device: str
    task: Task | None = None
    silent: float = 0.0
    warned: float = 0.0

    def give(self, task: Task) -> None:
        """Send it a task without waiting."""
        self.task = task
        self.send({"key": task.key, "kind": task.kind, "rows": task.rows, "payload": task.payload})

    @abstractmethod
    def send(self, message: dict[str, Any]) -> None:
        """Send it a message without waiting."""

    @abstractmethod
    def dismiss(self) -> None:
        """Release it: there are no more tasks."""

    @abstractmethod
    def end(self) -> None:
        """Kill it."""

    @abstractmethod
    def whereabouts(self) -> str:
        """Where it is, as a clause that begins with "it"; writes the stacks of all its threads to its log."""

    @property
    @abstractmethod
    def place(self) -> str:
        """Process and machine, for messages."""


W = TypeVar("W", bound=Worker)


@dataclass
class Crew(ABC, Generic[W]):
    """The workers of one stage; handles their messages and their silence."""

    stage: Stage
    tasks: Iterator[Task]
    context: Context
    progress: Progressed
    workers: list[W] = field(default_factory=list)
    attempts: Counter[str] = field(default_factory=Counter)

    @abstractmethod
    def listen(self, seconds: float) -> None:
        """Handle one message of a worker, or return after `seconds`."""

    @abstractmethod
    def retry(self, task: Task, worker: W) -> None:
        """Start the task of a lost worker again on a replacement."""

    def following(self) -> Task | None:
        """The next unassigned task."""
        return next(self.tasks, None)

    def work(self) -> None:
        """Run until every task is done.

        Raises:
            NegpipeError: the error of a task, or TaskFailedError if a worker died too often.
        """
        looked = time.monotonic()
        while self.busy:
            self.listen(_TICK)
            if (passed := time.monotonic() - looked) >= _TICK:
                self.watch(min(passed, 2 * _TICK))  # while this process itself was stopped, it received no messages
                looked = time.monotonic()

    @property
    def busy(self) -> bool:
        """Whether any task is unfinished."""
        return any(worker.task for worker in self.workers)

    def hear(self, worker: W, message: Mapping[str, Any]) -> None:
        """Handle a worker's message about its task."""
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
        """Give a worker the next task, or dismiss it if there is none."""
        if following := self.following():
            worker.give(following)
        else:
            worker.dismiss()

    def lose(self, worker: W, task: Task, cause: str) -> None:
        """Retry the task of a dead or dying worker."""
        worker.task = None
        worker.end()
        self.attempts[task.key] += 1
        if self.attempts[task.key] > RETRIES:
            raise TaskFailedError(self._obituary(worker, task, cause))
        logger.warning("%s died: %s; retrying its task", self._of(worker, task), cause)
        self.retry(task, worker)

    def watch(self, seconds: float) -> None:
        """Add `seconds` to every worker's silence; warn about silent workers, or end them."""
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
    """The last line of a worker's log."""
    lines = []
    with suppress(OSError):  # it may have been deleted
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip()[-TAIL:] for line in reversed(lines) if line.strip()), "(nothing)")


def environment(budget: Budget) -> dict[str, str]:
    """Environment of a worker: limits its libraries to its threads and its GPU."""
    shown = {"CUDA_VISIBLE_DEVICES": devices.visible(budget.device)}
    return dict.fromkeys(_THREADS, str(budget.threads)) | {"PYTHONUNBUFFERED": "1"} | shown


def head(stage: Stage, context: Context) -> dict[str, Any]:
    """The first message to a worker, before any task: plain JSON."""
    return {
        "kind": stage.kind or stage.name,
        "stage": stage.name,
        "config": context.config.model_dump(mode="json"),
        "budget": asdict(context.budget),
        "inputs": {name: [manifest.stage, manifest.digest] for name, manifest in context.manifests.items()},
    }


def log_of(stage: Stage, context: Context, number: int) -> Path:
    """The log file of a worker."""
    name = "-".join(filter(None, (stage.name, context.shard, str(number))))
    return context.run_dir / BOOKS / "logs" / f"{name}.log"
