"""The section of the model that turns texts into vectors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from negpipe.config.section import Section
from negpipe.config.server import Server
from negpipe.config.values import Device, Size

PRECISIONS: Mapping[str, tuple[str, ...]] = {
    "torch": ("float32", "bfloat16", "float16"),
    "onnx": ("float32", "int8"),
    "openvino": ("float32", "bfloat16", "int8"),
}
"""What encoder.runtime computes in, encoder.precision, where the device has units for it."""
BATCH_SIZE = 32
"""Texts a forward pass, where nobody says."""
_CALL_TEXTS = 2048  # whose tokens are held: about 7 kB a text
OF_RUNNING = (
    *("revision", "model_class", "pooling", "query_prompt_name", "passage_prompt_name", "query_max_length"),
    *("passage_max_length", "batch_size", "batch_tokens", "call_texts", "precision", "runtime", "device", "devices"),
    "trust_remote_code",
)
"""Settings of a model that runs here."""


def _joins_two(form: str) -> bool:
    try:
        joined = form.format("<instruction>", "<text>")
    except (IndexError, KeyError, ValueError):
        return False
    return "<instruction>" in joined and "<text>" in joined


class Encoder(Section):
    """The model that turns texts into vectors, or the vectors themselves."""

    backend: Literal["flagembedding", "sentence-transformers", "http", "precomputed"] = Field(
        "flagembedding",
        description="Library that runs the model; http: a server does. precomputed: you bring the vectors.",
    )
    model: str | None = Field(
        None, description="Hub name, local folder, or pkg://PACKAGE/FOLDER; http: what the server calls it."
    )
    revision: str | None = Field(None, description="Hub revision of the model; null: the newest.")
    model_class: str | None = Field(
        None,
        description="FlagEmbedding class (encoder-only-base, encoder-only-m3, decoder-only-base, decoder-only-icl);"
        " null: by the model's name, else encoder-only-base.",
    )
    pooling: Literal["cls", "mean", "last_token"] | None = Field(
        None, description="Pooling (flagembedding); null: what the model is known to use, else cls."
    )
    query_instruction: str | None = Field(None, description="Put before every anchor.")
    query_instruction_format: str = Field("{}{}", description="How instruction and anchor are joined.")
    passage_instruction: str | None = Field(None, description="Put before every document.")
    passage_instruction_format: str = Field("{}{}", description="How instruction and document are joined.")
    query_prompt_name: str | None = Field(
        None,
        description="Name of the model's own prompt that is put before every anchor; null: the one that Sentence"
        " Transformers' encode_query takes, with flagembedding none. query_instruction wins, '' there means none.",
    )
    passage_prompt_name: str | None = Field(
        None, description="The same for documents: encode_document, passage_instruction."
    )
    query_max_length: int = Field(64, ge=4, description="Tokens of an anchor.")
    passage_max_length: int = Field(512, ge=4, description="Tokens of a document.")
    batch_size: int = Field(
        BATCH_SIZE, ge=1, description="Texts a forward pass; part of the identity, it changes bits."
    )
    batch_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens a forward pass in place of batch_size, padding counted: as many texts of about one length"
        " as have room; 4096 is fast on CPUs, `negpipe plan` times it. Part of the identity, it changes bits.",
    )
    call_texts: int | None = Field(
        None,
        ge=1,
        description="Texts handed to the model at a time, which share batches by length; part of the identity. null:"
        " 2048, or 32 batches where that is more.",
    )
    normalize: bool = Field(True, description="Scale every vector to length 1, so that scores are cosines.")
    truncate_dim: int | None = Field(
        None, ge=1, description="Numbers of a vector to keep (Matryoshka), the first; scaled again by normalize."
    )
    storage: Literal["float16", "float32"] = Field("float16", description="How vectors are stored.")
    precision: Literal["float32", "float16", "bfloat16", "int8"] = Field(
        "float32",
        description="What the model computes in; it pools in float32. float16: GPUs. bfloat16: GPUs and CPUs with units"
        " for it, not with runtime onnx. int8: runtimes onnx and openvino.",
    )
    runtime: Literal["torch", "onnx", "openvino"] = Field(
        "torch",
        description="What runs the transformer. onnx, openvino: on a CPU, for backend sentence-transformers, from a"
        " file exported once; negpipe's extras of these names.",
    )
    device: Device | None = Field(
        None, description="cpu, cuda, cuda:1 …; null: the GPUs there are, else cpu. Changes no key, but perhaps bits."
    )
    devices: tuple[Device, ...] = Field(
        (), description="Several, such as [cuda:0, cuda:2], in place of device: a worker for each."
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with the model. Dangerous.")
    corpus_vectors: str | None = Field(None, description="precomputed: .npy or .parquet, one vector a corpus row.")
    anchor_vectors: str | None = Field(None, description="precomputed: .npy or .parquet, one vector an anchor.")
    http: Server | None = None
    cache: Path | None = Field(
        None,
        description="Folder that keeps vectors by text, for all runs that name it: a text that was encoded before, by"
        " the same model in the same way, is not encoded again. Rows are then not reproducible bit for bit; whether it"
        " is on is part of the identity.",
    )
    cache_size: Size = Field(
        10 * 2**30,
        ge=2**20,
        description="Bytes that the folder may take, such as 10GiB; what was used longest ago makes room.",
    )

    @property
    def runs_here(self) -> bool:
        """Whether the model runs on this machine, by a library."""
        return self.backend in ("flagembedding", "sentence-transformers")

    @property
    def call_size(self) -> int:
        """Texts handed to the model at a time."""
        return self.call_texts or max(_CALL_TEXTS, 32 * self.batch_size)

    @model_validator(mode="after")
    def _needs(self) -> Encoder:
        for name in ("query_instruction_format", "passage_instruction_format"):
            if not _joins_two(getattr(self, name)):
                raise ValueError(f"{name} must hold two {{}}: the first is the instruction, the second the text")
        if self.backend == "precomputed":
            if not (self.corpus_vectors and self.anchor_vectors):
                raise ValueError("backend 'precomputed' needs encoder.corpus_vectors and encoder.anchor_vectors")
            if self.cache is not None:
                raise ValueError("encoder.cache keeps what a model makes: leave it out with backend 'precomputed'")
        elif not self.model:
            raise ValueError(f"backend '{self.backend}' needs encoder.model")
        if self.device and self.devices:
            raise ValueError("device and devices both say where the model runs: remove one")
        if self.backend == "http" and self.http is None:
            raise ValueError("backend 'http' needs encoder.http.url: the server's address")
        return self

    @model_validator(mode="after")
    def _fits(self) -> Encoder:
        if self.batch_tokens is not None:
            if self.batch_size != BATCH_SIZE:
                raise ValueError("batch_size and batch_tokens both say how large a forward pass is: remove one")
            longest = max(self.query_max_length, self.passage_max_length)
            if self.batch_tokens < longest:
                raise ValueError(
                    f"batch_tokens ({self.batch_tokens}) has no room for one text of query_max_length or"
                    f" passage_max_length: set it to {longest} or more"
                )
        if self.precision not in PRECISIONS[self.runtime]:
            others = [name for name, known in PRECISIONS.items() if self.precision in known]
            raise ValueError(
                f"runtime '{self.runtime}' does not compute in {self.precision}: set precision to"
                f" {' or '.join(PRECISIONS[self.runtime])}, or runtime to {' or '.join(others)}"
            )
        if self.runtime != "torch":
            if self.backend != "sentence-transformers":
                raise ValueError(
                    f"runtime '{self.runtime}' is not for backend '{self.backend}': set backend to"
                    " sentence-transformers, or runtime to torch"
                )
            if gpu := next(
                (name for name in (self.device, *self.devices) if name and not name.startswith("cpu")), None
            ):
                raise ValueError(
                    f"runtime '{self.runtime}' runs on a CPU, not on '{gpu}': set device to cpu, or runtime to torch"
                )
        return self
