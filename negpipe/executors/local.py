"""Tasks in worker subprocesses on this machine: `python -m negpipe.worker`, JSON lines both ways.

A worker that dies (killed, out of memory) is replaced and its task tried again, up to `RETRIES`
times; a task that fails with an explained error ends the run at once. Workers end with this process,
however it ends: they watch their standard input.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from negpipe.errors import TaskFailedError, error_of
from negpipe.manifest import BOOKS
from negpipe.stage import Context, Stage, Task
from negpipe.storage import explained

RETRIES = 2
OUT_OF_MEMORY = 12
"""Exit code of a worker whose task did not fit into memory: it is tried again like one that was killed."""
_TAIL = 200
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")


@dataclass
class _Worker:
    process: subprocess.Popen[str]
    log: Path
    task: Task | None = None

    def send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # its end is reported by the reader


def run(
    stage: Stage, tasks: Iterator[Task], context: Context, progress: Callable[[Task, int, str, bool], None]
) -> None:
    """See `negpipe.stage.Executor`.

    Raises:
        NegpipeError: what a task raised, or TaskFailedError for a worker that died too often.
    """
    messages: queue.Queue[tuple[_Worker, dict[str, Any] | None]] = queue.Queue()
    retry: list[Task] = []
    attempts: dict[str, int] = {}
    workers: list[_Worker] = []

    def following() -> Task | None:
        return retry.pop() if retry else next(tasks, None)

    def assign(worker: _Worker, task: Task | None) -> None:
        worker.task = task
        if task is None:
            assert worker.process.stdin is not None
            worker.process.stdin.close()
        else:
            worker.send({"key": task.key, "kind": task.kind, "rows": task.rows, "payload": task.payload})

    def start(task: Task) -> None:
        worker = _start(stage, context, len(workers))
        workers.append(worker)
        threading.Thread(target=_read, args=(worker, messages), daemon=True).start()
        assign(worker, task)

    try:
        for _ in range(context.workers):
            task = following()
            if task is not None:
                start(task)
        while any(worker.task for worker in workers):
            worker, message = messages.get()
            task = worker.task
            if task is None:
                continue
            if message is None:
                worker.task = None
                attempts[task.key] = attempts.get(task.key, 0) + 1
                if attempts[task.key] > RETRIES:
                    raise TaskFailedError(_obituary(stage, task, worker))
                retry.append(task)
                start(retry.pop())
            elif "units" in message:
                progress(task, message["units"], message["note"], False)
            elif "error" in message:
                raise error_of(message)
            else:
                progress(task, 0, "", True)
                assign(worker, following())
    finally:
        _stop(workers)


def _start(stage: Stage, context: Context, number: int) -> _Worker:
    folder = context.run_dir / BOOKS / "logs"
    log = folder / f"{stage.name}-{number}.log"
    environment = os.environ | dict.fromkeys(_THREADS, str(context.threads)) | {"PYTHONUNBUFFERED": "1"}
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        errors = log.open("w", encoding="utf-8")
    with errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "negpipe.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
    worker = _Worker(process, log)
    worker.send(
        {
            "stage": stage.name,
            "config": context.config.model_dump(mode="json"),
            "run_dir": str(context.run_dir),
            "inputs": {manifest.stage: manifest.digest for manifest in context.manifests.values()},
        }
    )
    return worker


def _read(worker: _Worker, messages: queue.Queue[tuple[_Worker, dict[str, Any] | None]]) -> None:
    assert worker.process.stdout is not None
    for line in worker.process.stdout:
        messages.put((worker, json.loads(line)))
    worker.process.wait()
    messages.put((worker, None))


def _obituary(stage: Stage, task: Task, worker: _Worker) -> str:
    code = worker.process.returncode
    cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    if code in (-signal.SIGKILL, OUT_OF_MEMORY):
        cause += " (out of memory? lower executor.workers, encoder.batch_size or resources.memory_budget)"
    lines = worker.log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip()[-_TAIL:] for line in reversed(lines) if line.strip()), "(nothing)")
    return (
        f"{stage.name}: the worker for part {task.key} ({task.kind}, {task.rows} rows) died {RETRIES + 1} times,"
        f" the last time by {cause}. Its log, {worker.log}, ends with: {last}"
    )


def _stop(workers: list[_Worker]) -> None:
    for worker in workers:
        if worker.task is not None:
            worker.process.kill()
    for worker in workers:
        try:
            worker.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()
