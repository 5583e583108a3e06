"""SIGTERM and Ctrl-C end a command within seconds, whatever it is doing.

Both are raised as exceptions in the main thread, so that resources are released in order. A library may raise another
error instead, or not return to Python for a long time (a DuckDB query may do either). In the latter case the process
exits at once, which costs only the part in progress.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

GRACE_SECONDS = 5
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Terminated(BaseException):
    """SIGTERM, raised in the main thread."""


@contextmanager
def prompt_end() -> Iterator[None]:
    """While active, SIGTERM raises Terminated and SIGINT KeyboardInterrupt; after GRACE_SECONDS the process exits."""
    arrived: list[type[BaseException]] = []

    def end(number: int, _: FrameType | None) -> NoReturn:
        arrived.append(Terminated if number == signal.SIGTERM else KeyboardInterrupt)
        raise arrived[-1]

    handlers = {number: signal.getsignal(number) for number in EXIT_CODES}
    for number, handler in handlers.items():
        if handler is not signal.SIG_IGN:  # a shell's background job
            signal.signal(number, end)
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    over = threading.Event()
    before = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(told, over), daemon=True).start()
    try:
        yield
    except Exception as error:
        if arrived:
            raise arrived[-1] from error
        raise
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(tell)  # ends the thread


def _watch(told: int, over: threading.Event) -> None:
    while number := os.read(told, 1):
        code = EXIT_CODES.get(signal.Signals(number[0]))
        if code and not over.wait(GRACE_SECONDS):
            os.write(2, b"Stopped during a part. Finished parts are kept: run the same command again to resume.\n")
            os._exit(code)
    os.close(told)
