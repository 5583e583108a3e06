"""The section of the model that encodes texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from negpipe.config.section import Section
from negpipe.config.server import Server
from negpipe.config.values import Device, Folder, Size

PRECISIONS: Mapping[str, tuple[str, ...]] = {
    "torch": ("float32", "bfloat16", "float16"),
    "onnx": ("float32", "int8"),
    "openvino": ("float32", "bfloat16", "int8"),
}
"""The precisions (encoder.precision) of each encoder.runtime, if the device supports them."""
BATCH_SIZE = 32
"""Default number of texts per forward pass."""
_CALL_TEXTS = 2048  # whose tokens are in memory: about 7 kB per text
OF_RUNNING = (
    *("revision", "model_class", "pooling", "query_prompt_name", "passage_prompt_name", "query_max_length"),
    *("passage_max_length", "batch_size", "batch_tokens", "call_texts", "precision", "attention", "runtime"),
    *("device", "devices", "trust_remote_code"),
)
"""Settings of a model that runs on this machine."""


def _joins_two(form: str) -> bool:
    try:
        joined = form.format("<instruction>", "<text>")
    except (IndexError, KeyError, ValueError):
        return False
    return "<instruction>" in joined and "<text>" in joined


class Encoder(Section):
    """The model that encodes texts, or precomputed vectors."""

    backend: Literal["flagembedding", "sentence-transformers", "http", "precomputed"] = "flagembedding"
    """Library that runs the model. http: a server runs it. precomputed: you provide the vectors."""
    model: str | None = None
    """Hub name, local folder, or pkg://PACKAGE/FOLDER; http: its name on the server."""
    revision: str | None = None
    """Hub revision of the model; null: the latest."""
    model_class: str | None = None
    """FlagEmbedding class (encoder-only-base, encoder-only-m3, decoder-only-base, decoder-only-icl); null: from the
    model's name, else encoder-only-base."""
    pooling: Literal["cls", "mean", "last_token"] | None = None
    """Pooling (flagembedding); null: the model's known pooling, else cls."""
    query_instruction: str | None = None
    """Prefix of every anchor."""
    query_instruction_format: str = "{}{}"
    """Format that joins instruction and anchor."""
    passage_instruction: str | None = None
    """Prefix of every document."""
    passage_instruction_format: str = "{}{}"
    """Format that joins instruction and document."""
    query_prompt_name: str | None = None
    """Name of the model's prompt for anchors; null: that of Sentence Transformers' encode_query, none with
    flagembedding. query_instruction takes precedence; '' there means no prompt."""
    passage_prompt_name: str | None = None
    """The same for documents, with encode_document and passage_instruction."""
    query_max_length: int = Field(64, ge=4)
    """Maximum tokens of an anchor."""
    passage_max_length: int = Field(512, ge=4)
    """Maximum tokens of a document."""
    batch_size: int = Field(BATCH_SIZE, ge=1)
    """Texts per forward pass; part of the identity, as it changes bits."""
    batch_tokens: int | None = Field(None, ge=1)
    """Tokens per forward pass, including padding, instead of batch_size: as many texts of similar length as fit. 4096
    is fast on CPUs; `negpipe plan` times it. Part of the identity, as it changes bits."""
    call_texts: int | None = Field(None, ge=1)
    """Texts passed to the model at a time and batched by length; part of the identity. null: 2048, or 32 batches if
    that is more."""
    normalize: bool = True
    """Scale every vector to length 1, so that scores are cosines."""
    truncate_dim: int | None = Field(None, ge=1)
    """Keep only the first N dimensions (Matryoshka); normalize rescales them."""
    storage: Literal["float16", "float32"] = "float16"
    """Data type of stored vectors."""
    precision: Literal["float32", "float16", "bfloat16", "int8"] = "float32"
    """Precision of the model; pooling is in float32. float16: on GPUs. bfloat16: on GPUs and CPUs that support it, not
    with runtime onnx. int8: runtimes onnx and openvino."""
    runtime: Literal["torch", "onnx", "openvino"] = "torch"
    """Runtime of the transformer. onnx, openvino: CPU only, with backend sentence-transformers, from a file exported
    once; install the negpipe extras of these names."""
    attention: Literal["flash_attention_2", "flash_attention_3"] | None = None
    """Packed attention: the texts of a forward pass are joined without padding. On GPUs, with backend
    sentence-transformers, precision float16 or bfloat16, and the package flash-attn or kernels. null: the model's
    default, with padding."""
    device: Device | None = None
    """cpu, cuda, cuda:1 …; null: all GPUs, else cpu. Changes no key, but may change bits."""
    devices: tuple[Device, ...] = ()
    """Several devices, such as [cuda:0, cuda:2], instead of device: one worker each."""
    trust_remote_code: bool = False
    """Run code shipped with the model. Dangerous."""
    corpus_vectors: str | None = None
    """precomputed: .npy or .parquet, one vector per corpus row."""
    anchor_vectors: str | None = None
    """precomputed: .npy or .parquet, one vector per anchor."""
    http: Server | None = None
    cache: Folder | None = None
    """Folder that caches vectors by text, shared by all runs that use it: a text already encoded by the same model with
    the same settings is not encoded again. Rows are then not reproducible bit for bit; whether the cache is on is part
    of the identity."""
    cache_size: Size = Field(10 * 2**30, ge=2**20)
    """Maximum size of the folder, such as 10GiB; the least recently used vectors are evicted."""

    @property
    def runs_here(self) -> bool:
        """Whether a library runs the model on this machine."""
        return self.backend in ("flagembedding", "sentence-transformers")

    @property
    def call_size(self) -> int:
        """Texts passed to the model at a time."""
        return self.call_texts or max(_CALL_TEXTS, 32 * self.batch_size)

    @model_validator(mode="after")
    def _needs(self) -> Encoder:
        for name in ("query_instruction_format", "passage_instruction_format"):
            if not _joins_two(getattr(self, name)):
                raise ValueError(f"{name} must contain two {{}}: first for the instruction, then for the text")
        if self.backend == "precomputed":
            if not (self.corpus_vectors and self.anchor_vectors):
                raise ValueError("backend 'precomputed' needs encoder.corpus_vectors and encoder.anchor_vectors")
            if self.cache is not None:
                raise ValueError("encoder.cache stores vectors made by a model: remove it with backend 'precomputed'")
        elif not self.model:
            raise ValueError(f"backend '{self.backend}' needs encoder.model")
        if self.device and self.devices:
            raise ValueError("device and devices are alternatives: remove one")
        if self.backend == "http" and self.http is None:
            raise ValueError("backend 'http' needs encoder.http.url: the server's address")
        return self

    @model_validator(mode="after")
    def _fits(self) -> Encoder:
        if self.batch_tokens is not None:
            if self.batch_size != BATCH_SIZE:
                raise ValueError("batch_size and batch_tokens are alternatives: remove one")
            longest = max(self.query_max_length, self.passage_max_length)
            if self.batch_tokens < longest:
                raise ValueError(
                    f"batch_tokens ({self.batch_tokens}) is below query_max_length or passage_max_length: set it to"
                    f" {longest} or more"
                )
        if self.precision not in PRECISIONS[self.runtime]:
            others = [name for name, known in PRECISIONS.items() if self.precision in known]
            raise ValueError(
                f"runtime '{self.runtime}' does not compute in {self.precision}: set precision to"
                f" {' or '.join(PRECISIONS[self.runtime])}, or runtime to {' or '.join(others)}"
            )
        if self.attention and (self.backend, self.runtime) != ("sentence-transformers", "torch"):
            raise ValueError(f"attention '{self.attention}' needs backend sentence-transformers and runtime torch")
        if self.attention and self.precision == "float32":
            raise ValueError(
                f"attention '{self.attention}' does not compute in float32: set precision to bfloat16 or float16"
            )
        if self.runtime != "torch":
            if self.backend != "sentence-transformers":
                raise ValueError(
                    f"runtime '{self.runtime}' does not support backend '{self.backend}': set backend to"
                    " sentence-transformers, or runtime to torch"
                )
            if gpu := next(
                (name for name in (self.device, *self.devices) if name and not name.startswith("cpu")), None
            ):
                raise ValueError(
                    f"runtime '{self.runtime}' runs on a CPU, not on '{gpu}': set device to cpu, or runtime to torch"
                )
        return self
