"""Texts in, float32 vectors out, through FlagEmbedding or Sentence Transformers.

Guarantees: rows keep the order of the texts; the same texts, settings, library versions and device
give the same bits; memory does not grow with the number of texts; a batch runs
at the configured size or the call fails; a zero, NaN or infinite vector is an error,
never a row. torch and the model libraries are imported by `load`, not by this module.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from typing import Protocol

from negpipe.config.encoder import Encoder
from negpipe.encoders import runtimes
from negpipe.encoders.backends import flagembedding, sentence_transformers
from negpipe.encoders.batched import Batched, OnBatch, Vectors
from negpipe.encoders.batches import batches_of
from negpipe.encoders.cuts import OnCut
from negpipe.encoders.precision import check_attention, check_precision
from negpipe.encoders.prompts import Kind
from negpipe.encoders.vectors import check_width
from negpipe.engine import devices
from negpipe.errors import InputError, NegpipeError


class TextEncoder(Protocol):
    """A loaded model."""

    def encode(
        self, texts: Sequence[str], kind: Kind, on_batch: OnBatch, on_cut: OnCut | None = None
    ) -> Iterator[Vectors]:
        """Vectors of texts, of length 1 with `encoder.normalize`: (m, d) float32 of the first m texts, then the next …

        Args:
            texts: at least one, without instruction, which is added here.
            kind: determines the instruction and the maximum length.
            on_batch: called after every forward pass with its number of texts and tokens (without padding).
            on_cut: called after tokenizing some texts, with the number of truncated texts and of the tokens that they
                lost; never if the tokenizer does not report it.

        Raises:
            ConfigError: the vectors are narrower than `encoder.truncate_dim`.
            InputError: a vector is zero or not finite; `row` is the text's offset in `texts`.
            TaskFailedError: the model failed on a batch, for example for lack of memory.
            ValueError: `texts` is empty.
        """


def load(encoder: Encoder, path: str, threads: int, device: str = devices.CPU) -> TextEncoder:
    """Load the model in `path` (a `Model.path`), to run on `threads` CPU threads and on a device (`engine.devices`),
    which runtimes other than torch ignore.

    Raises:
        ConfigError: precision, attention, model class, pooling, prompt, `encoder.truncate_dim` or
            `encoder.batch_tokens` is not suitable.
        InputError: the folder does not load as a model.
    """
    # Every new batch shape creates new CPU kernels, of which two caches would keep 1024 each. That gains nothing, and
    # cached kernels pin the heap: memory would grow by about 5 kB per text while new shapes come. In bfloat16, a few
    # kernels are shared by the layers of a batch, and save a sixth of the time of short texts.
    kept = "16" if encoder.precision == "bfloat16" else "1"
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", kept)
    os.environ.setdefault("LRU_CACHE_CAPACITY", "1")
    import torch
    from transformers.utils import logging

    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    device = devices.own(device if encoder.runtime == "torch" else devices.CPU)
    check_precision(encoder.precision, device, "encoder.precision")
    check_attention(encoder, device)
    backend = flagembedding if encoder.backend == "flagembedding" else sentence_transformers
    try:
        library = backend(encoder, path, device)
        if encoder.runtime != "torch":
            runtimes.exchange(library.module, encoder, path, threads)
    except NegpipeError:
        raise
    except Exception as error:  # Loaders raise any error caused by the files or code shipped with them.
        raise InputError(
            f"the model cannot be loaded: {type(error).__name__}: {error}",
            file=path,
            remedy="Check encoder.model, encoder.model_class and encoder.trust_remote_code, or fetch the model again",
        ) from error
    if library.width is not None:
        check_width(library.width, encoder.truncate_dim)
    batches = batches_of(encoder, path, library.tokenizers) if encoder.batch_tokens else None
    ahead = device != "cpu" and encoder.backend == "flagembedding" and batches is None
    return Batched(encoder, library, ahead=ahead, batches=batches)


def libraries(encoder: Encoder) -> tuple[str, ...]:
    """Distributions that may change the bits of a vector."""
    own = {"flagembedding": ("FlagEmbedding",), "sentence-transformers": ("sentence-transformers",)}
    shared = ("transformers", "tokenizers", "torch", "numpy")
    return (*own.get(encoder.backend, ()), *shared, *runtimes.libraries(encoder.runtime))


def provenance(encoder: Encoder, device: str) -> dict[str, str]:
    """What vectors depend on besides their key and the library versions: device, its kind, and precision."""
    import torch

    if devices.is_gpu(device):
        kind = torch.cuda.get_device_name(devices.own(device))
    else:
        kind = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {"device": device, "device_kind": kind, "precision": encoder.precision}
