"""`python -m negpipe.worker`: runs the tasks of one stage that it is sent on standard input.

The first line names the stage and the config; each further line is a task. Answers are JSON lines on
the standard output it was started with; anything a library prints goes to the log. It ends when its
input closes, in the middle of a task if need be: an unpublished part leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import sys
import threading
from typing import Any, TextIO

from negpipe import machine
from negpipe.config_file import load_config
from negpipe.errors import NegpipeError, VanishedError, message_of
from negpipe.executors.local import OUT_OF_MEMORY
from negpipe.pipeline import load_context
from negpipe.redaction import Redacting
from negpipe.stage import Context, Task, run_task
from negpipe.stages import STAGES


def main() -> None:
    """Serve until the input closes."""
    # The parent decides what Ctrl-C means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    log = logging.StreamHandler()
    log.setFormatter(Redacting("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[log])
    logging.captureWarnings(True)
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin, lines), daemon=True).start()

    def answer(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    head = json.loads(lines.get())
    doing = head["stage"]
    try:
        stage, config = STAGES[head["stage"]], load_config(head["config"])
        if not stage.apart(config):  # A model's threads may be many, and one heap would make them wait.
            machine.share_freed_memory()
        context = load_context(config, before=stage.name)
        _check_inputs(context, head["inputs"])
        with stage.open(context) as shared:
            while True:
                task = Task(**json.loads(lines.get()))
                doing = f"{stage.name}, part {task.key} ({task.kind}, {task.rows} rows)"
                run_task(stage, task, shared, context, lambda units, note: answer(units=units, note=note))
                answer(done=task.key)
    except NegpipeError as error:
        answer(**message_of(error))
        _log_trace()
    except Exception as error:
        _log_trace()
        if _out_of_memory(error):
            os._exit(OUT_OF_MEMORY)
        answer(error="failed", text=f"{doing}: {type(error).__name__}: {error}")


def _check_inputs(context: Context, expected: dict[str, str]) -> None:
    """What this worker read from disk is what its tasks were planned on."""
    for name, digest in expected.items():
        if name in context.manifests and context.manifests[name].digest != digest:
            raise VanishedError(
                f"the output of {name} in {context.run_dir} changed during the run: another process works on it."
                " Stop that, then run the same command again"
            )


def _out_of_memory(error: Exception) -> bool:
    # torch raises a RuntimeError: "can't allocate memory" on a CPU, "CUDA out of memory" on a GPU.
    said = str(error).lower()
    return isinstance(error, MemoryError) or "allocate memory" in said or "out of memory" in said


def _log_trace() -> None:
    with contextlib.suppress(OSError):  # the disk may be full, and what happened is to be told all the same
        logging.exception("the worker ends")
        sys.stderr.flush()


def _listen(stream: TextIO, lines: queue.SimpleQueue[str]) -> None:
    for line in stream:
        lines.put(line)
    logging.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main()
