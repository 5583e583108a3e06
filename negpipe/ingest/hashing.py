"""Digests of texts, by processes beside this one where there are many: Python takes them one by one.

`python -m negpipe.ingest.hashing` is such a process: texts come in on standard input, their digests go out, both as
Arrow streams. It ends when its input does.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pyarrow as pa

from negpipe.data.texts import digests, normalized_hashes

_MANY = 2**25  # bytes of texts, from which on processes are worth their start
_TEXTS = pa.schema([("text", pa.large_string())])
_HASHES = pa.schema([("d1", pa.uint64()), ("d2", pa.uint64()), ("normalized", pa.uint64())])


def hashed(texts: pa.Array) -> pa.RecordBatch:
    """Of texts without white space at their ends: both halves of their `digests`, and their `normalized_hashes`."""
    both = digests(texts)
    columns = (np.ascontiguousarray(both[:, 0]), np.ascontiguousarray(both[:, 1]), normalized_hashes(texts))
    return pa.record_batch([pa.array(column) for column in columns], schema=_HASHES)


class Hasher:
    """Digests of many texts, some of which are made ahead."""

    def __init__(self, processes: int) -> None:
        self._beside = processes > 1
        self._pool = ThreadPoolExecutor(processes)
        self._seen = 0
        self._local = threading.local()
        self._processes: list[subprocess.Popen[bytes]] = []

    def __call__(self, texts: pa.Array) -> Future[pa.RecordBatch]:
        """`hashed`, once it is there."""
        self._seen += texts.nbytes
        return self._pool.submit(self._asked if self._beside and self._seen > _MANY else hashed, texts)

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(cancel_futures=True)
        for process in self._processes:
            process.kill()
            process.wait()

    def _asked(self, texts: pa.Array) -> pa.RecordBatch:
        with suppress(OSError, pa.ArrowException, StopIteration):  # a process that was killed: it is done here
            process, out, answers = self._streams()
            try:
                out.write_batch(pa.record_batch([texts.cast(pa.large_string())], schema=_TEXTS))
                process.stdin.flush()
                batch: pa.RecordBatch = answers().read_next_batch()
                if len(batch) == len(texts):
                    return batch
            except BaseException:  # nothing it still says is an answer to what comes next
                process.kill()
                raise
        return hashed(texts)

    def _streams(self) -> Any:
        """Of this thread's process."""
        if not hasattr(self._local, "streams"):
            command = [sys.executable, "-m", "negpipe.ingest.hashing"]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._processes.append(process)
            out = pa.ipc.new_stream(pa.PythonFile(process.stdin, "w"), _TEXTS)
            opened: list[pa.RecordBatchReader] = []

            def answers() -> pa.RecordBatchReader:
                if not opened:  # what it writes begins with its first answer
                    opened.append(pa.ipc.open_stream(pa.PythonFile(process.stdout, "r")))
                return opened[0]

            self._local.streams = process, out, answers
        return self._local.streams


@contextmanager
def hasher(processes: int) -> Iterator[Hasher]:
    """A `Hasher`, closed at the end."""
    made = Hasher(processes)
    try:
        yield made
    finally:
        made.close()


def main() -> None:
    """Serve until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    with pa.ipc.new_stream(sys.stdout.buffer, _HASHES) as out:
        for batch in pa.ipc.open_stream(sys.stdin.buffer):
            out.write_batch(hashed(batch["text"]))
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
