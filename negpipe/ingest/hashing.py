"""Digests of texts, in separate processes if there are many texts, as Python hashes them one by one.

`python -m negpipe.ingest.hashing` is such a process: it reads texts from standard input and writes their digests, both
as Arrow streams. It exits when its input ends.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pyarrow as pa

from negpipe.data.texts import digests, normalized_hashes

_MANY = 2**25  # bytes of texts, above which starting processes pays off
_TEXTS = pa.schema([("text", pa.large_string())])
_HASHES = pa.schema([("d1", pa.uint64()), ("d2", pa.uint64()), ("normalized", pa.uint64())])


def hashed(texts: pa.Array) -> pa.RecordBatch:
    """For stripped texts: both halves of their `digests`, and their `normalized_hashes`."""
    both = digests(texts)
    columns = (np.ascontiguousarray(both[:, 0]), np.ascontiguousarray(both[:, 1]), normalized_hashes(texts))
    return pa.record_batch([pa.array(column) for column in columns], schema=_HASHES)


class _Process:
    """A separate process that handles one column at a time."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "negpipe.ingest.hashing"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._asked = pa.ipc.new_stream(pa.PythonFile(self.process.stdin, "w"), _TEXTS)
        self._answers: pa.RecordBatchReader | None = None

    def hashed(self, texts: pa.Array) -> pa.RecordBatch:
        """Raises OSError, ArrowException or StopIteration: the process has died."""
        assert self.process.stdin is not None
        try:
            self._asked.write_batch(pa.record_batch([texts.cast(pa.large_string())], schema=_TEXTS))
            self.process.stdin.flush()
            if self._answers is None:  # its output starts with its first answer
                self._answers = pa.ipc.open_stream(pa.PythonFile(self.process.stdout, "r"))
            return self._answers.read_next_batch()
        except BaseException:  # its further output does not answer the next request
            self.process.kill()
            raise


class Hasher:
    """Digests of many texts, some of which are computed ahead."""

    def __init__(self, threads: int) -> None:
        self._pool, self._beside = ThreadPoolExecutor(threads), threads > 1
        self._seen = 0
        self._local = threading.local()
        self.processes: list[subprocess.Popen[bytes]] = []

    def __call__(self, texts: pa.Array) -> Future[pa.RecordBatch]:
        """`hashed`, as a future."""
        self._seen += texts.nbytes
        return self._pool.submit(self._asked if self._beside and self._seen > _MANY else hashed, texts)

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(cancel_futures=True)
        for process in self.processes:
            process.kill()
            process.wait()

    def _asked(self, texts: pa.Array) -> pa.RecordBatch:
        """Ask this thread's process."""
        with suppress(OSError, pa.ArrowException, StopIteration):  # a killed process: compute it here
            if not hasattr(self._local, "process"):
                self._local.process = _Process()
                self.processes.append(self._local.process.process)
            batch: pa.RecordBatch = self._local.process.hashed(texts)
            return batch
        return hashed(texts)


def main() -> None:
    """Serve until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    with pa.ipc.new_stream(sys.stdout.buffer, _HASHES) as out:
        for batch in pa.ipc.open_stream(sys.stdin.buffer):
            out.write_batch(hashed(batch["text"]))
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
