"""`python -m negpipe.worker`: runs the tasks of one stage that it is sent on standard input.

The first line names the stage and the config; each further line is a task. Answers are JSON lines on
the standard output it was started with; anything a library prints goes to the log. It ends when its
input closes, in the middle of a task if need be: an unpublished part leaves nothing behind.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import sys
import threading
import traceback
from typing import Any, TextIO

from negpipe.config import load_config
from negpipe.errors import NegpipeError, message_of
from negpipe.pipeline import load_context
from negpipe.stage import Task, run_task
from negpipe.stages import STAGES


def main() -> None:
    """Serve until the input closes."""
    # The parent decides what Ctrl-C means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin, lines), daemon=True).start()

    def answer(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    head = json.loads(lines.get())
    try:
        stage = STAGES[head["stage"]]
        context = load_context(load_config(head["config"]), before=stage.name)
        with stage.open(context) as shared:
            while True:
                task = Task(**json.loads(lines.get()))
                run_task(stage, task, shared, context, lambda units, note: answer(units=units, note=note))
                answer(done=task.key)
    except NegpipeError as error:
        traceback.print_exc()
        answer(**message_of(error))
    except Exception as error:
        traceback.print_exc()
        answer(error="failed", text=f"{head['stage']}: {type(error).__name__}: {error}")


def _listen(stream: TextIO, lines: queue.SimpleQueue[str]) -> None:
    for line in stream:
        lines.put(line)
    logging.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main()
