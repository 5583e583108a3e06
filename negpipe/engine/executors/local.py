"""Tasks in worker subprocesses on this machine: `python -m negpipe.worker`, JSON lines both ways.

A worker that dies (killed, out of memory), that says what is not a message, or that is silent for longer than
`executor.task_timeout` is replaced and its task tried again, up to `RETRIES` times; a task that fails with an
explained error ends the run at once. Silence alone is warned about, with where the worker stands. Workers end with
this process, however it ends: they watch their standard input.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from negpipe.engine import devices
from negpipe.engine.budget import Budget
from negpipe.engine.stage import Context, Progressed, Stage, Task
from negpipe.errors import TaskFailedError, error_of
from negpipe.store.files import BOOKS, bytes_in, explained

logger = logging.getLogger(__name__)

RETRIES = 2
OUT_OF_MEMORY = 12
"""Exit code of a worker whose task did not fit into memory: it is tried again like one that was killed."""
NOT_A_MESSAGE = 76
"""Exit code of a worker that was sent what is not a message (EX_PROTOCOL of sysexits.h)."""
SILENCE_SECONDS = 300.0
"""A worker that says nothing for so long is warned about, and again after twice as long."""
STACK_SIGNAL = signal.SIGUSR1
"""A worker that is sent it writes the stacks of its threads to its log, whatever it is doing."""
LONGEST = 2**24
"""Bytes of a line; a worker's longest is the text of an error."""
_TICK = 0.5  # seconds between two looks at who is silent
_GRACE = 5.0  # seconds for a process to end, and for stacks to be written
_TAIL = 200
_FRAMES = 6  # of a stack in a warning; the log has all of them
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
_FRAME = re.compile(r'File "(?:.*/)?([^"/]+)", line (\d+) in (.+)')


@dataclass
class _Worker:
    """A process, its device, what it works on, and for how long it has said nothing."""

    process: subprocess.Popen[bytes]
    log: Path
    device: str
    task: Task | None = None
    listening: bool = False
    silent: float = 0.0
    warned: float = 0.0
    unsent: queue.SimpleQueue[bytes | None] = field(default_factory=queue.SimpleQueue)

    def send(self, message: dict[str, Any] | None) -> None:
        """Without waiting: a process that has stopped reads nothing. None: there will be no more."""
        self.unsent.put(None if message is None else line_of(message))

    def give(self, task: Task) -> None:
        self.task = task
        self.send({"key": task.key, "kind": task.kind, "rows": task.rows, "payload": task.payload})

    def end(self) -> None:
        """Kill it. One that a broken disk or driver holds ends when that lets go of it."""
        self.process.kill()
        self.send(None)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_GRACE)

    def whereabouts(self) -> str:
        """Where it stands, from the stacks that it writes to its log."""
        if not self.listening:
            return "it has not come as far as to read its task"
        begin = bytes_in(self.log)
        self.process.send_signal(STACK_SIGNAL)
        size, deadline = begin, time.monotonic() + _GRACE
        while time.monotonic() < deadline:
            time.sleep(0.1)
            before, size = size, bytes_in(self.log)
            if begin < size == before:
                break
        if size == begin:
            return "it does not say where it stands: it was stopped, or waits for a disk or a driver"
        with self.log.open("rb") as log:
            log.seek(begin)
            stacks = log.read().decode(errors="replace")
        # The main thread is the last, the innermost call of a thread the first.
        frames = _FRAME.findall(re.split(r"(?m)^(?:Current thread|Thread) ", stacks)[-1])[:_FRAMES]
        calls = ", called by ".join(f"{name} ({file}:{line})" for file, line, name in frames)
        return f"it stands in {calls or 'code that is not Python'}"


_Lines = queue.Queue[tuple[_Worker, bytes]]


def run(stage: Stage, tasks: Iterator[Task], context: Context, progress: Progressed) -> None:
    """See `negpipe.engine.stage.Executor`.

    Raises:
        NegpipeError: what a task raised, or TaskFailedError for a worker that died too often.
    """
    crew = _Crew(stage, tasks, context, progress)
    workers, names = context.workers, context.devices()
    if workers < len(names):
        logger.warning(
            "%s: %d of %d devices are used, a worker each (executor.workers, resources.cpus)",
            stage.name,
            workers,
            len(names),
        )
    try:
        for number in range(workers):
            if task := next(tasks, None):
                crew.start(task, names[number % len(names)])
        looked = time.monotonic()
        while any(worker.task for worker in crew.workers):
            with suppress(queue.Empty):
                crew.hear(*crew.lines.get(timeout=_TICK))
            if (passed := time.monotonic() - looked) >= _TICK:
                crew.watch(min(passed, 2 * _TICK))  # while this process was stopped itself, it could hear nobody
                looked = time.monotonic()
    finally:
        _stop(crew.workers)


@dataclass
class _Crew:
    """The workers of one stage, and what becomes of what they say, and of their silence."""

    stage: Stage
    tasks: Iterator[Task]
    context: Context
    progress: Progressed
    lines: _Lines = field(default_factory=queue.Queue)
    workers: list[_Worker] = field(default_factory=list)
    attempts: Counter[str] = field(default_factory=Counter)

    def start(self, task: Task, device: str) -> None:
        worker = _start(self.stage, self.context.on(device), len(self.workers), self.lines)
        self.workers.append(worker)
        worker.give(task)

    def lose(self, worker: _Worker, task: Task, cause: str) -> None:
        """Try the task of a dead or dying worker again."""
        worker.task = None
        worker.end()
        self.attempts[task.key] += 1
        if self.attempts[task.key] > RETRIES:
            raise TaskFailedError(_obituary(self.stage, task, worker, cause))
        logger.warning("%s died by %s; its task is tried again", _of(self.stage, task, worker), cause)
        self.start(task, worker.device)

    def hear(self, worker: _Worker, line: bytes) -> None:
        """Take a line of a worker; an empty one is its end."""
        task = worker.task
        if task is None:
            return
        worker.silent = worker.warned = 0.0
        message = _answer(line, task)
        if not line:
            self.lose(worker, task, _cause(worker.process))
        elif message is None:
            self.lose(worker, task, f"a line that is not a message: {line[:_TAIL]!r}")
        elif "listening" in message:
            worker.listening = True
        elif "units" in message:
            self.progress(task, message["units"], message["note"], False)
        elif "error" in message:
            raise error_of(message)
        else:
            self.progress(task, 0, "", True)
            if following := next(self.tasks, None):
                worker.give(following)
            else:
                worker.task = None
                worker.send(None)

    def watch(self, seconds: float) -> None:
        """Count so many more seconds of everybody's silence: warn of it, or end it."""
        limit = self.context.config.executor.task_timeout
        for worker in [*self.workers]:
            task = worker.task
            if task is None:
                continue
            worker.silent += seconds
            if limit and worker.silent >= limit:
                self.lose(worker, task, f"executor.task_timeout ({limit:g} s without a word): {worker.whereabouts()}")
            elif worker.silent >= max(SILENCE_SECONDS, 2 * worker.warned):
                worker.warned = worker.silent
                logger.warning(
                    "%s has said nothing for %.0f s: %s. The stacks of all its threads: %s. %s",
                    _of(self.stage, task, worker),
                    worker.silent,
                    worker.whereabouts(),
                    worker.log,
                    "executor.task_timeout will end it" if limit else "It is not ended: executor.task_timeout is null",
                )


def environment(budget: Budget) -> dict[str, str]:
    """What a worker's libraries see of the machine: so many threads, and no GPU but its own."""
    shown = {"CUDA_VISIBLE_DEVICES": devices.visible(budget.device)}
    return dict.fromkeys(_THREADS, str(budget.threads)) | {"PYTHONUNBUFFERED": "1"} | shown


def _start(stage: Stage, context: Context, number: int, lines: _Lines) -> _Worker:
    folder = context.run_dir / BOOKS / "logs"
    log = folder / f"{'-'.join(filter(None, (stage.name, context.shard, str(number))))}.log"
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        errors = log.open("wb")
    with errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "negpipe.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=os.environ | environment(context.budget),
        )
    worker = _Worker(process, log, context.budget.device)
    for serve, arguments in ((_write, (worker,)), (_read, (worker, lines))):
        threading.Thread(target=serve, args=arguments, daemon=True).start()
    worker.send(
        {
            "kind": stage.kind or stage.name,
            "stage": stage.name,
            "config": context.config.model_dump(mode="json"),
            "budget": asdict(context.budget),
            "inputs": {name: [manifest.stage, manifest.digest] for name, manifest in context.manifests.items()},
        }
    )
    return worker


def _write(worker: _Worker) -> None:
    assert worker.process.stdin is not None
    with suppress(BrokenPipeError), worker.process.stdin as stream:  # its end is reported by the reader
        while (line := worker.unsent.get()) is not None:
            stream.write(line)
            stream.flush()


def _read(worker: _Worker, lines: _Lines) -> None:
    """Hand on its lines, the last perhaps cut, then an empty one for its end."""
    assert worker.process.stdout is not None
    while line := worker.process.stdout.readline(LONGEST):
        lines.put((worker, line))
    with suppress(subprocess.TimeoutExpired):
        worker.process.wait(_GRACE)
    lines.put((worker, b""))


def line_of(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def message_of(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a whole line; None for anything else."""
    try:
        message = json.loads(line.decode()) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def _answer(line: bytes, task: Task) -> dict[str, Any] | None:
    """What a worker that has this task may say."""
    message = message_of(line)
    match message:
        case {"listening": True} | {"units": int(), "note": str()} | {"error": str(), "text": str()}:
            return message
        case {"done": task.key}:
            return message
    return None


def _of(stage: Stage, task: Task, worker: _Worker) -> str:
    gpu = f" ({worker.device})" if devices.is_gpu(worker.device) else ""
    process = f"process {worker.process.pid} on {platform.node()}{gpu}"
    return f"{stage.name}: the worker for part {task.key} ({task.kind}, {task.rows} rows), {process},"


def _cause(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    if code is None:
        return "closing its output"
    cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    if code in (-signal.SIGKILL, OUT_OF_MEMORY):
        cause += " (out of memory? lower executor.workers, encoder.batch_size or resources.memory_budget)"
    if code == NOT_A_MESSAGE:
        cause += " (it was sent what is not a message)"
    return cause


def _obituary(stage: Stage, task: Task, worker: _Worker, cause: str) -> str:
    lines = []
    with suppress(OSError):  # somebody may have deleted it
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
            worker.process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            worker.end()
