"""Measures the speed of a model with one or several settings, in a separate process, as FAISS is in the caller's.

`python -m negpipe.encoders.timing` reads the job as JSON and writes one line of JSON for each way, like a worker. It
does not use `multiprocessing`, whose processes run the caller's script again. One process handles all ways, as
importing the libraries takes longer than measuring; if it dies, another continues after the way that killed it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from negpipe.config.encoder import Encoder
from negpipe.data.arrays import Floats
from negpipe.encoders.encode import load
from negpipe.encoders.prompts import Kind
from negpipe.engine import devices
from negpipe.engine.budget import Budget
from negpipe.errors import NegpipeError, TaskFailedError, error_of, message_of

_WARM_UP = 8  # texts
_SECONDS = 4.0  # target duration of a measurement
_LEAST = 64  # minimum texts of a measurement, however long they take
_LIMIT = 600.0  # seconds for a way to answer, including the export of the model
_TAIL = 300
# Read once per process, so that it applies to all ways.
_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}


@dataclass(frozen=True)
class Timed:
    """A measurement: (n, d) float32 vectors of the first n texts, the seconds they took, and (m, d) vectors of the
    first m anchors, not timed."""

    vectors: Floats
    seconds: float
    anchors: Floats


def time_models(
    ways: Sequence[Encoder], path: str, texts: Sequence[str], budget: Budget, anchors: Sequence[tuple[str, int]] = ()
) -> Generator[Timed | NegpipeError]:
    """Encode texts for some seconds in each way, on one device.

    Args:
        ways: settings of the encoder.
        path: the model's folder.
        texts: documents.
        budget: threads and the device.
        anchors: texts of anchors, each with the number of documents that must be encoded before it.

    Yields:
        for each way, when it is done, its measurement, or the error of loading or encoding; TaskFailedError if its
        process died, or did not answer for minutes.
    """
    job = {"path": path, "texts": list(texts), "anchors": list(anchors), **asdict(budget)}
    left = [encoder.model_dump(mode="json") for encoder in ways]
    while left:
        with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as asked:
            asked.write(json.dumps(job | {"ways": left}).encode())
            asked.seek(0)
            process = subprocess.Popen(
                [sys.executable, "-m", "negpipe.encoders.timing"],
                stdin=asked,
                stdout=subprocess.PIPE,
                stderr=said,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": devices.visible(budget.device), **_KERNELS},
            )
            waited = [0.0]
            try:
                yield from map(_answer, _lines(process, left, waited))
                code = process.wait() if left else 0  # it closes its output before it exits
            finally:
                process.kill()
                process.wait()
            if left:
                said.seek(0)
                last = said.read().decode(errors="replace").strip()[-_TAIL:]
                del left[0]
                hung = waited[0] >= _LIMIT
                why = f"no answer in {_LIMIT:,.0f} s" if hung else f"its process exited with {code}"
                yield TaskFailedError(f"the model could not be timed, {why}: {last}")


def _lines(
    process: subprocess.Popen[bytes], left: list[dict[str, Any]], waited: list[float]
) -> Iterator[dict[str, Any]]:
    """The answers of a process; answered ways are removed from the list, and the seconds waited for the last answer, or
    for none, are stored in `waited`."""
    assert process.stdout is not None
    while True:
        started, limit = time.monotonic(), threading.Timer(_LIMIT, process.kill)
        limit.start()
        try:
            line = process.stdout.readline()
        finally:
            limit.cancel()
            waited[0] = time.monotonic() - started
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:  # none, or truncated, if it died
            return
        del left[0]
        yield answer


def _answer(answer: dict[str, Any]) -> Timed | NegpipeError:
    if "error" in answer:
        return error_of(answer)
    vectors, anchors = (np.asarray(answer[name], dtype=np.float32) for name in ("vectors", "anchors"))
    return Timed(vectors, float(answer["seconds"]), anchors)


def _timed(way: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    encoder = load(Encoder(**way), job["path"], job["threads"], job["device"])

    def encode(texts: list[str], kind: Kind = "passage") -> tuple[list[Any], float]:
        started = time.perf_counter()
        blocks = list(encoder.encode(texts, kind, lambda rows, tokens: None))
        return np.concatenate(blocks).tolist(), time.perf_counter() - started

    encode(job["texts"][:_WARM_UP])
    _, took = encode(job["texts"][:_WARM_UP])
    vectors, seconds = encode(job["texts"][: max(_LEAST, int(_WARM_UP * _SECONDS / took))])
    asked = [text for text, needed in job["anchors"] if needed <= len(vectors)]
    anchors, _ = encode(asked, "query") if asked else ([], 0.0)
    return {"vectors": vectors, "seconds": seconds, "anchors": anchors}


def main() -> None:
    """Run a job; output of libraries goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = json.loads(sys.stdin.buffer.read())
    for way in job["ways"]:
        try:
            answer = _timed(way, job)
        except NegpipeError as error:
            answer = dict(message_of(error))
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
