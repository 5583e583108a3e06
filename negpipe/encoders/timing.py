"""How fast a model is here, measured in a process of its own: FAISS is in the caller's.

`python -m negpipe.encoders.timing` reads the job as JSON and answers with JSON, like a worker. It is no
`multiprocessing`, whose processes run the caller's script a second time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from negpipe.config import schema
from negpipe.encoders.encode import load
from negpipe.engine import devices
from negpipe.engine.budget import Budget
from negpipe.errors import NegpipeError, TaskFailedError, error_of, message_of

_WARM_UP = 8  # texts
_SECONDS = 5.0  # that a measurement is to take
_LEAST = 64  # texts of a measurement, however long they take
_TAIL = 300


@dataclass(frozen=True)
class Timed:
    """What a model did: (n, d) float32 vectors of the first n texts, and the seconds that they took."""

    vectors: NDArray[np.float32]
    seconds: float


def time_model(encoder: schema.Encoder, path: str, texts: list[str], budget: Budget) -> Timed:
    """Encode some seconds' worth of the texts, on one device.

    Raises:
        NegpipeError: what loading or encoding raised; TaskFailedError for a process that died.
    """
    job = {"encoder": encoder.model_dump(mode="json"), "path": path, "texts": texts, **asdict(budget)}
    done = subprocess.run(
        [sys.executable, "-m", "negpipe.encoders.timing"],
        input=json.dumps(job).encode(),
        capture_output=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": devices.visible(budget.device)},
        check=False,
    )
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        said = done.stderr.decode(errors="replace").strip()[-_TAIL:]
        raise TaskFailedError(
            f"the model could not be timed, its process ended with {done.returncode}: {said}"
        ) from None
    if "error" in answer:
        raise error_of(answer)
    return Timed(np.asarray(answer["vectors"], dtype=np.float32), float(answer["seconds"]))


def _timed(job: dict[str, Any]) -> dict[str, Any]:
    encoder = load(schema.Encoder(**job["encoder"]), job["path"], job["threads"], job["device"])

    def encode(texts: list[str]) -> tuple[list[Any], float]:
        started = time.perf_counter()
        blocks = list(encoder.encode(texts, "passage", lambda rows, tokens: None))
        return np.concatenate(blocks).tolist(), time.perf_counter() - started

    encode(job["texts"][:_WARM_UP])
    _, took = encode(job["texts"][:_WARM_UP])
    vectors, seconds = encode(job["texts"][: max(_LEAST, int(_WARM_UP * _SECONDS / took))])
    return {"vectors": vectors, "seconds": seconds}


def main() -> None:
    """Serve one job; what a library prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = json.loads(sys.stdin.buffer.read())
    try:
        answer = _timed(job)
    except NegpipeError as error:
        answer = dict(message_of(error))
    answers.write(json.dumps(answer))
    answers.flush()


if __name__ == "__main__":
    main()
