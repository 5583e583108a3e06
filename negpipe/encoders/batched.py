"""Texts divided into calls of a model library, each monitored pass by pass."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from negpipe.config import machine
from negpipe.config.encoder import Encoder
from negpipe.encoders.backends import Library
from negpipe.encoders.batches import Batches
from negpipe.encoders.cuts import OnCut, watch
from negpipe.encoders.prompts import Kind
from negpipe.encoders.vectors import finished
from negpipe.errors import TaskFailedError

OnBatch = Callable[[int, int], None]
Vectors = NDArray[np.float32]


class Batched:
    """Runs calls, and checks and normalizes the results.

    It replaces the module's forward. FlagEmbedding reacts to any RuntimeError with a smaller batch,
    which would silently change bits or never end: failures are therefore raised as a TaskFailedError,
    which it does not catch. It also runs a call's first batch twice, once on trial: the second run gets
    the output of the first.

    Args:
        encoder: the settings.
        library: the model in its library.
        ahead: tokenize a call while the previous one computes. For a model on a GPU: on a CPU it gains nothing, and
            takes the memory of a second thread. Only FlagEmbedding tokenizes an entire call before its first pass.
        batches: the texts of each pass; None: the library batches them, `encoder.batch_size` at a time.
    """

    def __init__(self, encoder: Encoder, library: Library, *, ahead: bool, batches: Batches | None = None) -> None:
        if ahead and batches:
            raise ValueError("a call of several batches is tokenized one batch at a time")
        self._encoder, self._call, self._batches = encoder, library.call, batches
        self._forward, library.module.forward = library.module.forward, self._pass
        for tokenizer in library.tokenizers:
            watch(tokenizer, self._cut)
        self._ahead = 1 if ahead else 0  # calls
        self._current = threading.local()

    def encode(
        self, texts: Sequence[str], kind: Kind, on_batch: OnBatch, on_cut: OnCut | None = None
    ) -> Iterator[Vectors]:
        """See `negpipe.encoders.TextEncoder.encode`."""
        if not texts:
            raise ValueError("encode needs at least one text")
        step = self._encoder.call_size
        turns: deque[tuple[_Turn, Callable[[], Vectors]]] = deque()
        with ThreadPoolExecutor(1 + self._ahead) as pool:
            try:
                for start in range(0, len(texts), step):
                    after = turns[-1][0].tokenised if turns else None
                    turn = _Turn(start, list(texts[start : start + step]), kind, on_batch, on_cut, after)
                    run = partial(self._run, turn)
                    turns.append((turn, pool.submit(run).result if self._ahead else run))
                    if len(turns) > self._ahead:
                        yield self._result(*turns[0])
                        turns.popleft()
                        machine.give_back()  # batches of all shapes fragment the memory
                while turns:
                    yield self._result(*turns[0])
                    turns.popleft()
            finally:
                for turn, _ in turns:
                    turn.drop()

    def _run(self, turn: _Turn) -> Vectors:
        """Tokenize, wait for the turn, compute."""
        self._current.turn = turn
        # One at a time: a fast tokenizer cannot be used by two threads.
        if turn.after:
            turn.after.wait()
        try:
            if self._batches is None:
                return self._made(turn, turn.texts, self._encoder.batch_size)
            turn.counting = True
            batches = self._batches(turn.texts, turn.kind)
            turn.counting = False
            made = [self._made(turn, [turn.texts[row] for row in rows], len(rows)) for rows in batches]
            return np.concatenate(made)[np.argsort(np.concatenate(batches))]
        finally:
            turn.tokenised.set()

    def _made(self, turn: _Turn, texts: list[str], batch_size: int) -> Vectors:
        turn.given = turn.left = len(texts)
        turn.batch_size = batch_size
        return np.asarray(self._call(texts, turn.kind, batch_size), dtype=np.float32)

    def _result(self, turn: _Turn, run: Callable[[], Vectors]) -> Vectors:
        turn.begin.set()
        remedy = (
            "Check the text; if others fail too, the model's weights are damaged or"
            f" encoder.precision ({self._encoder.precision}) is too low for them"
        )
        return finished(run(), self._encoder, turn.start, remedy)

    def _pass(self, *args: Any, **kwargs: Any) -> Any:
        turn: _Turn = self._current.turn
        turn.wait()
        expected = min(turn.batch_size, turn.left)
        rows, width, tokens = _shape(kwargs if "attention_mask" in kwargs else args[0]) or (expected, 0, 0)
        if rows != expected:
            raise self._failed(turn, expected, width, "it was retried with fewer texts")
        if turn.held is not None:
            output, turn.held = turn.held, None
        else:
            try:
                output = self._forward(*args, **kwargs)
            except (RuntimeError, IndexError) as error:
                raise self._failed(turn, rows, width, str(error)) from error
            if self._encoder.backend == "flagembedding" and turn.left == turn.given:
                turn.held = output
                return output
        turn.left -= rows
        turn.on_batch(rows, tokens)
        return output

    def _cut(self, texts: int, tokens: int) -> None:
        turn: _Turn = self._current.turn
        if turn.on_cut and not turn.counting:
            turn.on_cut(texts, tokens)

    def _failed(self, turn: _Turn, rows: int, width: int, reason: str) -> TaskFailedError:
        setting = "batch_size" if self._batches is None else "batch_tokens"
        return TaskFailedError(
            f"the model failed on a batch of {rows} texts of {width} tokens: {reason}."
            f" If memory is insufficient, lower encoder.{setting} ({getattr(self._encoder, setting)});"
            f" if the model accepts fewer tokens, lower encoder.{turn.kind}_max_length"
        )


@dataclass
class _Turn:
    """One call of the library."""

    start: int
    texts: list[str]
    kind: Kind
    on_batch: OnBatch
    on_cut: OnCut | None
    after: threading.Event | None
    given: int = 0  # texts of the call
    left: int = 0  # those without a vector
    batch_size: int = 0  # texts per pass
    held: Any = None  # the output of the trial run
    counting: bool = False  # tokenizing to count, not for the model
    tokenised: threading.Event = field(default_factory=threading.Event)
    begin: threading.Event = field(default_factory=threading.Event)
    dropped: bool = False

    def wait(self) -> None:
        """Wait until the previous calls are done."""
        self.tokenised.set()
        self.begin.wait()
        if self.dropped:
            raise TaskFailedError("these texts are no longer needed")

    def drop(self) -> None:
        """Its vectors are no longer needed: stop before the next pass."""
        self.dropped = True
        self.begin.set()


def _shape(batch: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Texts of a batch, tokens of the longest, and of all without padding; None for models that do not report them,
    such as static embeddings."""
    if "cu_seq_lens_q" in batch:  # packed: where each text begins, and the end
        return len(batch["cu_seq_lens_q"]) - 1, int(batch["max_length_q"]), int(batch["cu_seq_lens_q"][-1])
    mask = batch.get("attention_mask")
    return None if mask is None else (*mask.shape, int(mask.sum()))
