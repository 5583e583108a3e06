"""Runs the tasks of one stage in a separate process: `python -m negpipe.worker`, or a Ray actor.

The first message has the stage and the config; each further one is a task. A process gets them as lines of JSON on
standard input, and answers on its original standard output; anything that a library prints goes to the log. It ends
when its input closes or contains something other than a message, even in the middle of a task: an unpublished part
leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import platform
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from negpipe import __version__, graph
from negpipe.config import machine
from negpipe.config.file import load_config
from negpipe.config.schema import Config
from negpipe.engine import versions
from negpipe.engine.budget import Budget
from negpipe.engine.executors import local
from negpipe.engine.executors.crew import OUT_OF_MEMORY
from negpipe.engine.fingerprint import DigestCache
from negpipe.engine.manifest import Manifest
from negpipe.engine.stage import Context, Opened, Stage, Task, cache_path, opened
from negpipe.errors import InputError, NegpipeError, VanishedError, message_of
from negpipe.redaction import Redacting
from negpipe.store.files import BOOKS, explained

_FRAMES = 6  # of a reported stack; the log has all of them


def main() -> None:
    """Serve until the input closes."""
    # The parent decides what Ctrl-C means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.register(local.STACK_SIGNAL)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _log_to_standard_error()
    messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, messages), daemon=True).start()

    def answer(**message: Any) -> None:
        answers.write(local.line_of(message))
        answers.flush()

    answer(listening=True)
    head = messages.get()
    doing = str(head.get("stage"))
    try:
        with ready(head) as running:
            while True:
                task = Task(**messages.get())
                doing = f"{head['stage']}, part {task.key} ({task.kind}, {task.rows} rows)"
                running.run(task, lambda units, note: answer(units=units, note=note))
                answer(done=task.key)
    except Exception as error:
        _log_trace()
        if _out_of_memory(error):
            os._exit(OUT_OF_MEMORY)
        answer(**_told(error, doing))


class Actor:
    """The same within Ray, which calls its methods concurrently, each in a separate thread: `messages` reports the
    progress of `run`."""

    def __init__(self, head: Mapping[str, Any]) -> None:
        """Start the log.

        Args:
            head: the first message of every worker, plus `log`, its log, and `folder`, the base of relative paths.
        """
        self._head = head
        self._running: Opened | None = None
        self._held = ExitStack()
        self._messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._thread = 0
        try:
            self._begin()
        except Exception as error:
            self._messages.put(_told(error, str(head["stage"])))

    def _begin(self) -> None:
        with contextlib.suppress(OSError):  # not needed for absolute paths
            os.chdir(self._head["folder"])
        stage, config = _of(self._head)
        for folder in filter(None, (None if config.url else config.run_dir / BOOKS, config.store)):
            if not folder.is_dir():
                raise InputError(
                    f"this folder of the run does not exist on {platform.node()}, where Ray placed {stage.name}",
                    file=str(folder),
                    remedy="With executor.kind: ray, run_dir, store and sources must be paths that all nodes see",
                )
        log = Path(self._head["log"])
        with explained(log.parent):
            log.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
        _log_to_standard_error()
        logging.info("process %d on %s", os.getpid(), platform.node())
        installed = versions.installed(stage.libraries(config)) | {"negpipe": __version__}
        self._messages.put({"listening": {"host": platform.node(), "pid": os.getpid(), "versions": installed}})

    def run(self, task: str) -> None:
        """Compute a part; the first call opens the stage."""
        self._thread = threading.get_ident()
        one = Task(**json.loads(task))
        try:
            if self._running is None:
                self._running = self._held.enter_context(ready(self._head))
            self._running.run(one, lambda units, note: self._messages.put({"units": units, "note": note}))
            self._messages.put({"done": one.key})
        except Exception as error:
            _log_trace()
            doing = f"{self._head['stage']}, part {one.key} ({one.kind}, {one.rows} rows)"
            self._messages.put({"ends": OUT_OF_MEMORY} if _out_of_memory(error) else _told(error, doing))

    def messages(self) -> Iterator[dict[str, Any]]:
        """The messages of a worker, as long as it lives."""
        while True:
            yield self._messages.get()

    def whereabouts(self) -> str:
        """The current position of the task; the stacks of all threads go to the log."""
        faulthandler.dump_traceback(2)
        frame = sys._current_frames().get(self._thread)
        frames = traceback.extract_stack(frame)[: -_FRAMES - 1 : -1] if frame else []
        calls = (f"{call.name} ({Path(call.filename).name}:{call.lineno})" for call in frames)
        return f"it is in {', called by '.join(calls) or 'no task yet'}"


@contextmanager
def ready(head: Mapping[str, Any]) -> Iterator[Opened]:
    """The worker's stage, opened."""
    stage, config = _of(head)
    if stage.place(config) != "apart":  # A model may have many threads, which would wait for a shared heap.
        machine.share_freed_memory()
    with opened(stage, _context(config, stage.name, head)) as running:
        yield running


def _of(head: Mapping[str, Any]) -> tuple[Stage, Config]:
    return replace(graph.of_kind(head["kind"]), name=head["stage"]), load_config(head["config"])


def _log_to_standard_error() -> None:
    log = logging.StreamHandler()
    log.setFormatter(Redacting("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[log], force=True)
    logging.captureWarnings(True)


def _told(error: Exception, doing: str) -> dict[str, str]:
    if isinstance(error, NegpipeError):
        return message_of(error)
    return {"error": "failed", "text": f"{doing}: {type(error).__name__}: {error}"}


def _context(config: Config, stage: str, head: Mapping[str, Any]) -> Context:
    """The context of the stage, with exactly the inputs that its tasks were planned on."""
    run_dir = config.run_dir
    context = Context(config, run_dir, DigestCache(cache_path(run_dir)), stage=stage, granted=Budget(**head["budget"]))
    manifests: dict[str, Manifest] = {}
    for name, (made_by, digest) in head["inputs"].items():
        manifest = context.books(made_by).manifest()
        if manifest is None or manifest.digest != digest:
            raise VanishedError(
                f"the output of {made_by} in {run_dir} changed during the run: another process is using it."
                " Stop that process, then run the same command again"
            )
        manifests[name] = manifest
    return replace(context, manifests=manifests)


def _out_of_memory(error: Exception) -> bool:
    # torch raises a RuntimeError: "can't allocate memory" on a CPU, "CUDA out of memory" on a GPU.
    said = "" if isinstance(error, NegpipeError) else str(error).lower()
    return isinstance(error, MemoryError) or "allocate memory" in said or "out of memory" in said


def _log_trace() -> None:
    with contextlib.suppress(OSError):  # the disk may be full, but the error must still be reported
        logging.exception("the worker failed")
        sys.stderr.flush()


def _listen(stream: BinaryIO, messages: queue.SimpleQueue[dict[str, Any]]) -> None:
    code = 0
    for line in stream:
        message = local.message_of(line)
        if message is None:
            logging.error("not a message: %r", line[:200])
            code = local.NOT_A_MESSAGE
            break
        messages.put(message)
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    main()
