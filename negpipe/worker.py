"""`python -m negpipe.worker`: runs the tasks of one stage that it is sent on standard input.

The first line names the stage and the config; each further line is a task. Answers are JSON lines on
the standard output it was started with; anything a library prints goes to the log. It ends when its
input closes or holds what is not a message, in the middle of a task if need be: an unpublished part
leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import queue
import signal
import sys
import threading
from dataclasses import replace
from typing import Any, BinaryIO

from negpipe import graph
from negpipe.config import machine
from negpipe.config.file import load_config
from negpipe.config.schema import Config
from negpipe.engine.budget import Budget
from negpipe.engine.executors import local
from negpipe.engine.fingerprint import DigestCache
from negpipe.engine.manifest import Manifest
from negpipe.engine.stage import Context, Task, cache_path, opened
from negpipe.errors import NegpipeError, VanishedError, message_of
from negpipe.redaction import Redacting


def main() -> None:
    """Serve until the input closes."""
    # The parent decides what Ctrl-C means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.register(local.STACK_SIGNAL)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    log = logging.StreamHandler()
    log.setFormatter(Redacting("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[log])
    logging.captureWarnings(True)
    messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, messages), daemon=True).start()

    def answer(**message: Any) -> None:
        answers.write(local.line_of(message))
        answers.flush()

    answer(listening=True)
    head = messages.get()
    doing = str(head.get("stage"))
    try:
        stage, config = replace(graph.of_kind(head["kind"]), name=head["stage"]), load_config(head["config"])
        if stage.place(config) != "apart":  # A model's threads may be many, and one heap would make them wait.
            machine.share_freed_memory()
        context = _context(config, stage.name, head)
        with opened(stage, context) as running:
            while True:
                task = Task(**messages.get())
                doing = f"{stage.name}, part {task.key} ({task.kind}, {task.rows} rows)"
                running.run(task, lambda units, note: answer(units=units, note=note))
                answer(done=task.key)
    except NegpipeError as error:
        answer(**message_of(error))
        _log_trace()
    except Exception as error:
        _log_trace()
        if _out_of_memory(error):
            os._exit(local.OUT_OF_MEMORY)
        answer(error="failed", text=f"{doing}: {type(error).__name__}: {error}")


def _context(config: Config, stage: str, head: dict[str, Any]) -> Context:
    """What the stage is run with: the very inputs that its tasks were planned on."""
    run_dir = config.run_dir
    context = Context(config, run_dir, DigestCache(cache_path(run_dir)), stage=stage, granted=Budget(**head["budget"]))
    manifests: dict[str, Manifest] = {}
    for name, (made_by, digest) in head["inputs"].items():
        manifest = context.books(made_by).manifest()
        if manifest is None or manifest.digest != digest:
            raise VanishedError(
                f"the output of {made_by} in {run_dir} changed during the run: another process works on it."
                " Stop that, then run the same command again"
            )
        manifests[name] = manifest
    return replace(context, manifests=manifests)


def _out_of_memory(error: Exception) -> bool:
    # torch raises a RuntimeError: "can't allocate memory" on a CPU, "CUDA out of memory" on a GPU.
    said = str(error).lower()
    return isinstance(error, MemoryError) or "allocate memory" in said or "out of memory" in said


def _log_trace() -> None:
    with contextlib.suppress(OSError):  # the disk may be full, and what happened is to be told all the same
        logging.exception("the worker ends")
        sys.stderr.flush()


def _listen(stream: BinaryIO, messages: queue.SimpleQueue[dict[str, Any]]) -> None:
    code = 0
    for line in stream:
        message = local.message_of(line)
        if message is None:
            logging.error("this is not a message: %r", line[:200])
            code = local.NOT_A_MESSAGE
            break
        messages.put(message)
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    main()
