"""Runs tasks in worker subprocesses on this machine: `python -m negpipe.worker`, JSON lines both ways.

Output that is not a message counts as a death, see `executors.crew`. Workers end with this process, however it ends:
they watch their standard input.
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
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from negpipe.engine.executors.crew import (
    GRACE,
    MEMORY_HINT,
    OUT_OF_MEMORY,
    TAIL,
    Crew,
    Worker,
    environment,
    head,
    log_of,
)
from negpipe.engine.stage import Context, Progressed, Stage, Task
from negpipe.store.files import bytes_in, explained

logger = logging.getLogger(__name__)

NOT_A_MESSAGE = 76
"""Exit code of a worker that received a line that is not a message (EX_PROTOCOL of sysexits.h)."""
STACK_SIGNAL = signal.SIGUSR1
"""Makes a worker write the stacks of its threads to its log, whatever it is doing."""
LONGEST = 2**24
"""Maximum bytes of a line; the longest are error texts."""
_FRAMES = 6  # of a stack in a warning; the log has all of them
_FRAME = re.compile(r'File "(?:.*/)?([^"/]+)", line (\d+) in (.+)')


@dataclass(kw_only=True, eq=False)
class _Worker(Worker):
    """A process."""

    process: subprocess.Popen[bytes]
    listening: bool = False
    unsent: queue.SimpleQueue[bytes | None] = field(default_factory=queue.SimpleQueue)

    def send(self, message: dict[str, Any]) -> None:
        """Queue it for the writing thread: a stopped process does not read."""
        self.unsent.put(line_of(message))

    def dismiss(self) -> None:
        self.unsent.put(None)

    def end(self) -> None:
        """A process stuck in a broken disk or driver ends when that releases it."""
        self.process.kill()
        self.dismiss()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE)

    @property
    def place(self) -> str:
        return f"process {self.process.pid} on {platform.node()}"

    def whereabouts(self) -> str:
        """Read from the stacks that it writes to its log."""
        if not self.listening:
            return "it has not read its task yet"
        begin = bytes_in(self.log)
        self.process.send_signal(STACK_SIGNAL)
        size, deadline = begin, time.monotonic() + GRACE
        while time.monotonic() < deadline:
            time.sleep(0.1)
            before, size = size, bytes_in(self.log)
            if begin < size == before:
                break
        if size == begin:
            return "it does not report its stack: it was stopped, or is waiting for a disk or a driver"
        with self.log.open("rb") as log:
            log.seek(begin)
            stacks = log.read().decode(errors="replace")
        # The main thread is the last, the innermost call of a thread the first.
        frames = _FRAME.findall(re.split(r"(?m)^(?:Current thread|Thread) ", stacks)[-1])[:_FRAMES]
        calls = ", called by ".join(f"{name} ({file}:{line})" for file, line, name in frames)
        return f"it is in {calls or 'non-Python code'}"


_Lines = queue.Queue[tuple[_Worker, bytes]]


def run(stage: Stage, tasks: Iterator[Task], context: Context, progress: Progressed) -> None:
    """See `negpipe.engine.stage.TaskExecutor`.

    Raises:
        NegpipeError: the error of a task, or TaskFailedError if a worker died too often.
    """
    crew = _LocalCrew(stage, tasks, context, progress)
    workers, names = context.workers, context.devices()
    if workers < len(names):
        logger.warning(
            "%s: using %d of %d devices, one worker each (executor.workers, resources.cpus)",
            stage.name,
            workers,
            len(names),
        )
    try:
        for number in range(workers):
            if task := next(tasks, None):
                crew.start(task, names[number % len(names)])
        crew.work()
    finally:
        _stop(crew.workers)


@dataclass
class _LocalCrew(Crew[_Worker]):
    lines: _Lines = field(default_factory=queue.Queue)

    def start(self, task: Task, device: str) -> None:
        worker = _start(self.stage, self.context.on(device), len(self.workers), self.lines)
        self.workers.append(worker)
        worker.give(task)

    def retry(self, task: Task, worker: _Worker) -> None:
        self.start(task, worker.device)

    def listen(self, seconds: float) -> None:
        with suppress(queue.Empty):
            self.take(*self.lines.get(timeout=seconds))

    def take(self, worker: _Worker, line: bytes) -> None:
        """Handle a line of a worker; an empty one means that it has ended."""
        task = worker.task
        if task is None:
            return
        worker.silent = worker.warned = 0.0
        message = _answer(line, task)
        if not line:
            self.lose(worker, task, _cause(worker.process))
        elif message is None:
            self.lose(worker, task, f"it sent a line that is not a message: {line[:TAIL]!r}")
        elif "listening" in message:
            worker.listening = True
        else:
            self.hear(worker, message)


def _start(stage: Stage, context: Context, number: int, lines: _Lines) -> _Worker:
    log = log_of(stage, context, number)
    with explained(log.parent):
        log.parent.mkdir(parents=True, exist_ok=True)
        errors = log.open("wb")
    with errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "negpipe.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=os.environ | environment(context.budget),
        )
    worker = _Worker(process=process, log=log, device=context.budget.device)
    for serve, arguments in ((_write, (worker,)), (_read, (worker, lines))):
        threading.Thread(target=serve, args=arguments, daemon=True).start()
    worker.send(head(stage, context))
    return worker


def _write(worker: _Worker) -> None:
    assert worker.process.stdin is not None
    with suppress(BrokenPipeError), worker.process.stdin as stream:  # the reader reports that it has ended
        while (line := worker.unsent.get()) is not None:
            stream.write(line)
            stream.flush()


def _read(worker: _Worker, lines: _Lines) -> None:
    """Queue its lines, the last possibly cut off, then an empty one for its end."""
    assert worker.process.stdout is not None
    while line := worker.process.stdout.readline(LONGEST):
        lines.put((worker, line))
    with suppress(subprocess.TimeoutExpired):
        worker.process.wait(GRACE)
    lines.put((worker, b""))


def line_of(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def message_of(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a complete line; None for anything else."""
    try:
        message = json.loads(line.decode()) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def _answer(line: bytes, task: Task) -> dict[str, Any] | None:
    """A line as a message that a worker with this task may send; None for anything else."""
    message = message_of(line)
    match message:
        case {"listening": True} | {"units": int(), "note": str()} | {"error": str(), "text": str()}:
            return message
        case {"done": task.key}:
            return message
    return None


def _cause(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    if code is None:
        return "it closed its output"
    cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    if code in (-signal.SIGKILL, OUT_OF_MEMORY):
        cause += MEMORY_HINT
    if code == NOT_A_MESSAGE:
        cause += " (it received a line that is not a message)"
    return cause


def _stop(workers: list[_Worker]) -> None:
    for worker in workers:
        if worker.task is not None:
            worker.process.kill()
    for worker in workers:
        try:
            worker.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            worker.end()
