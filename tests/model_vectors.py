"""A model loaded and asked for vectors, for tests of encoders."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from negpipe import encoders
from negpipe.config.encoder import Encoder

BACKENDS = ["flagembedding", "sentence-transformers"]
TEXTS = [f"{'the list of file names is returned as text ' * (number % 7)}item {number}" for number in range(45)]


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def ignore(texts: int, tokens: int) -> None:
    pass


def settings(folder: Path | str, backend: str = "flagembedding", **more: Any) -> Encoder:
    return Encoder.model_validate({"backend": backend, "model": str(folder), "batch_size": 8, **more})


class Whole:
    """An encoder whose blocks are put together."""

    def __init__(self, encoder: encoders.TextEncoder) -> None:
        self.blocks = encoder.encode

    def encode(self, texts: list[str], kind: encoders.Kind, on_batch: encoders.OnBatch) -> Any:
        return np.concatenate(list(self.blocks(texts, kind, on_batch)))


def loaded(encoder: Encoder) -> Whole:
    return Whole(encoders.load(encoder, encoders.resolve_model(encoder, sha256).path, threads=1))
