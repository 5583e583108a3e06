"""Texts in, float32 vectors out, through FlagEmbedding or Sentence Transformers.

Guarantees: rows keep the order of the texts; the same texts, settings, library versions and device
give the same bits; memory does not grow with the number of texts beyond the result; a batch runs
at the configured size or the call fails, and a vector that is zero, NaN or infinite is an error,
never a row. torch and the model libraries are imported by `load`, not by this module.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from negpipe import config
from negpipe.encoders.backends import Call, Kind, flagembedding, sentence_transformers
from negpipe.errors import ConfigError, InputError, TaskFailedError

OnBatch = Callable[[int, int], None]
Vectors = NDArray[np.float32]

# Texts a library call sees, or 32 batches where that is more. It bounds memory (the tokens of a whole call are
# held, about 7 kB a text) and decides which texts share a batch: part of what a vector's last bits depend on.
CALL_TEXTS = 2048

_LIBRARIES = ("FlagEmbedding", "sentence-transformers", "transformers", "tokenizers", "torch", "numpy")


class Encoder(Protocol):
    """A loaded model."""

    def encode(self, texts: Sequence[str], kind: Kind, on_batch: OnBatch) -> Vectors:
        """Vectors of texts, (n, d) float32, of length 1 where `encoder.normalize` is set.

        Args:
            texts: at least one; without instruction, it is put before them here.
            kind: which instruction and which maximum length apply.
            on_batch: called after every forward pass with its texts and its tokens (padding not counted).

        Raises:
            InputError: a vector is zero or not finite; `row` is the text's offset in `texts`.
            TaskFailedError: the model failed on a batch, for example for lack of memory.
            ValueError: `texts` is empty.
        """


def load(encoder: config.Encoder, path: str, threads: int) -> Encoder:
    """Load the model in `path` (a `Model.path`), to run on `threads` CPU threads.

    Raises:
        ConfigError: device, precision, model class or pooling do not fit.
        InputError: the folder does not load as a model.
    """
    # Every new shape of a batch makes new CPU kernels. Keeping the usual 1024 of them gains no time, and pins the
    # heap: memory would grow by some 5 kB a text, for as long as new shapes come.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1")
    import torch
    from transformers.utils import logging

    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    device = _device(encoder)
    backend = flagembedding if encoder.backend == "flagembedding" else sentence_transformers
    try:
        module, call = backend(encoder, path, device)
    except ConfigError:
        raise
    except Exception as error:  # Loaders raise whatever the files, or code that came with them, make them raise.
        raise InputError(
            f"the model does not load: {type(error).__name__}: {error}",
            file=path,
            remedy="Check encoder.model, encoder.model_class and encoder.trust_remote_code, or fetch the model again",
        ) from error
    return _Batched(encoder, module, call)


def provenance(encoder: config.Encoder) -> dict[str, str]:
    """What vectors depend on beside their key: library versions, device and kind of CPU, precision."""
    import torch

    device = _device(encoder)
    if device.startswith("cuda"):
        kind = torch.cuda.get_device_name(device)
    else:
        kind = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    versions = {name: version(name) for name in _LIBRARIES}
    return versions | {"device": device, "device_kind": kind, "precision": encoder.precision}


def _device(encoder: config.Encoder) -> str:
    """The one device of this process, in the spelling both libraries take."""
    import torch

    name = encoder.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"encoder.device: '{name}' is no device: write cpu, cuda, cuda:1 …, or null") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"encoder.device: '{name}' is not there, torch sees {torch.cuda.device_count()} GPUs:"
            " set encoder.device to null or cpu"
        )
    if device.type == "cpu" and encoder.precision != "float32":
        raise ConfigError(f"encoder.precision: '{encoder.precision}' needs a GPU: set it to float32 on a CPU")
    # FlagEmbedding compares with "cpu", letter for letter.
    return "cpu" if device.type == "cpu" else str(device)


class _Batched:
    """Cuts texts into calls, watches every forward pass, and checks and normalises what comes back.

    It stands in for the module's forward. FlagEmbedding answers any RuntimeError with a smaller batch,
    which would change bits silently or go on for ever: a failure leaves here as a TaskFailedError,
    which it lets through. It also runs a call's first batch twice, once on trial: the second run gets
    the first one's output.
    """

    def __init__(self, encoder: config.Encoder, module: Any, call: Call) -> None:
        self._encoder, self._call = encoder, call
        self._forward, module.forward = module.forward, self._pass
        self._left, self._trial, self._kind = 0, False, "passage"
        self._held: Any = None
        self._on_batch: OnBatch = _ignore

    def encode(self, texts: Sequence[str], kind: Kind, on_batch: OnBatch) -> Vectors:
        """See `Encoder.encode`."""
        if not texts:
            raise ValueError("encode needs at least one text")
        self._on_batch, self._kind = on_batch, kind
        result: Vectors | None = None
        step = max(CALL_TEXTS, 32 * self._encoder.batch_size)
        for start in range(0, len(texts), step):
            some = list(texts[start : start + step])
            self._left, self._held = len(some), None
            self._trial = self._encoder.backend == "flagembedding"
            vectors = self._checked(np.asarray(self._call(some, kind), dtype=np.float32), start)
            if result is None:
                result = np.empty((len(texts), vectors.shape[1]), dtype=np.float32)
            result[start : start + len(some)] = vectors
        assert result is not None
        return result

    def _checked(self, vectors: Vectors, start: int) -> Vectors:
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        bad = ~(np.isfinite(lengths) & (lengths > 0))
        if bad.any():
            offset = int(np.argmax(bad))
            what = "zero" if lengths[offset, 0] == 0 else "not finite"
            raise InputError(
                f"the vector of this text is {what}",
                row=start + offset,
                remedy="Look at the text; if others fail too, the model's weights are damaged or"
                f" encoder.precision ({self._encoder.precision}) is too low for them",
            )
        return vectors / lengths if self._encoder.normalize else vectors

    def _pass(self, *args: Any, **kwargs: Any) -> Any:
        expected = min(self._encoder.batch_size, self._left)
        mask = _attention_mask(args, kwargs)
        rows, width = (expected, 0) if mask is None else mask.shape
        if rows != expected:
            raise self._failed(expected, width, "it was retried with fewer")
        if self._held is not None:
            output, self._held = self._held, None
        else:
            try:
                output = self._forward(*args, **kwargs)
            except (RuntimeError, IndexError) as error:
                raise self._failed(rows, width, str(error)) from error
            if self._trial:
                self._trial, self._held = False, output
                return output
        self._left -= rows
        self._on_batch(rows, 0 if mask is None else int(mask.sum()))
        return output

    def _failed(self, rows: int, width: int, reason: str) -> TaskFailedError:
        return TaskFailedError(
            f"the model failed on a batch of {rows} texts of {width} tokens: {reason}."
            f" If memory is short, lower encoder.batch_size ({self._encoder.batch_size});"
            f" if the model takes fewer tokens, lower encoder.{self._kind}_max_length"
        )


def _ignore(texts: int, tokens: int) -> None:
    pass


def _attention_mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """(texts, tokens), 1 for a token and 0 for padding; None for models without one, such as static embeddings."""
    batch = kwargs if "attention_mask" in kwargs else args[0]
    return batch.get("attention_mask")
