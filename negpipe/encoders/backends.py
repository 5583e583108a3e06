"""The model libraries behind a common interface: a module and a function.

A backend returns the module whose forward pass runs one batch, and the function that encodes the texts of one
call: (n, d) in any float type, in the order of the texts, not normalized. The lengths of queries and passages always
come from the config, never from a library's default; `prompts` determines their prefixes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from negpipe.config.encoder import Encoder
from negpipe.encoders.prompts import KINDS, TASKS, Kind, instructed, instruction, routed
from negpipe.errors import ConfigError

Call = Callable[[list[str], Kind, int], Any]
"""Texts, their kind, and the number of texts per forward pass."""


@dataclass(frozen=True)
class Library:
    """A model loaded by its library.

    Attributes:
        module: its forward pass runs one batch.
        call: encodes the texts of one call.
        tokenizers: its tokenizers, of transformers or others.
        width: dimension of its vectors; None if the library does not report it.
    """

    module: Any
    call: Call
    tokenizers: list[Any]
    width: int | None


def flagembedding(encoder: Encoder, path: str, device: str) -> Library:
    """FlagEmbedding's model classes, chosen by config, by the model's files or by its name.

    Raises:
        ConfigError: model class and pooling do not match, or are unknown.
    """
    from FlagEmbedding import FlagAutoModel

    model_class, pooling = class_and_pooling(encoder, path)
    query, passage = (instruction(encoder, path, kind) for kind in KINDS)
    model = FlagAutoModel.from_finetuned(
        path,
        model_class=model_class,
        pooling_method=pooling,
        normalize_embeddings=False,
        use_fp16=encoder.precision == "float16",
        use_bf16=encoder.precision == "bfloat16",
        # With exactly "cpu", it converts every model to float32.
        devices="cpu:0" if device == "cpu" and encoder.precision != "float32" else device,
        trust_remote_code=encoder.trust_remote_code,
        query_instruction_for_retrieval=query.text,
        query_instruction_format=query.form,
        passage_instruction_for_retrieval=passage.text,
        passage_instruction_format=passage.form,
        query_max_length=encoder.query_max_length,
        passage_max_length=encoder.passage_max_length,
    )
    _silence(model)
    # M3's class wraps the transformer.
    _end_in_float32(model.model.model if model_class == "encoder-only-m3" else model.model, "last_hidden_state")

    def call(texts: list[str], kind: Kind, batch_size: int) -> Any:
        encode = model.encode_queries if kind == "query" else model.encode_corpus
        found = encode(texts, batch_size=batch_size)
        return found["dense_vecs"] if isinstance(found, dict) else found

    width = getattr(getattr(model.model, "config", None), "hidden_size", None)
    return Library(model.model, call, [model.tokenizer], width)


def class_and_pooling(encoder: Encoder, path: str) -> tuple[str, str]:
    """From the config, else from the model's files, else from FlagEmbedding's table of names."""
    from FlagEmbedding.inference.embedder.model_mapping import AUTO_EMBEDDER_MAPPING, EMBEDDER_CLASS_MAPPING

    classes = {key.value: value for key, value in EMBEDDER_CLASS_MAPPING.items()}
    if encoder.model_class is not None and encoder.model_class not in classes:
        raise ConfigError(f"encoder.model_class: '{encoder.model_class}' is not one of {', '.join(classes)}")
    # By the configured name, as the folder of a hub model is named by its commit.
    known = AUTO_EMBEDDER_MAPPING.get(Path(encoder.model or "").name)
    pooling = encoder.pooling or _pooling_file(path) or (known.pooling_method.value if known else None)
    if encoder.model_class:
        model_class = encoder.model_class
    elif known:
        model_class = next(name for name, kind in classes.items() if kind is known.model_class)
    else:
        model_class = "decoder-only-base" if pooling == "last_token" else "encoder-only-base"
    pooling = pooling or str(classes[model_class].DEFAULT_POOLING_METHOD)
    if model_class != "encoder-only-m3" and model_class.startswith("decoder") != (pooling == "last_token"):
        raise ConfigError(
            f"encoder.pooling: '{pooling}' does not match model class '{model_class}':"
            " decoders use last_token, encoders cls or mean; set encoder.pooling and encoder.model_class"
        )
    return model_class, pooling


def _pooling_file(path: str) -> str | None:
    """The pooling of a Sentence Transformers folder, in FlagEmbedding's spelling."""
    file = Path(path) / "1_Pooling" / "config.json"
    if not file.is_file():
        return None
    settings = json.loads(file.read_text(encoding="utf-8"))
    named = settings.get("pooling_mode") or [
        key.removeprefix("pooling_mode_").removesuffix("_token").removesuffix("_tokens")
        for key, on in settings.items()
        if key.startswith("pooling_mode_") and on is True
    ]
    modes = [named] if isinstance(named, str) else named
    if len(modes) != 1 or modes[0] not in ("cls", "mean", "lasttoken"):
        raise ConfigError(
            f"encoder.pooling: {file} has {' and '.join(map(str, modes)) or 'none'}, which FlagEmbedding lacks:"
            " set encoder.backend to sentence-transformers, or encoder.pooling"
        )
    return "last_token" if modes[0] == "lasttoken" else str(modes[0])


def _silence(model: Any) -> None:
    """Disable the progress bars, for which there is no argument; `on_batch` reports progress."""

    def plain(items: Iterable[Any], **_: Any) -> Iterable[Any]:
        return items

    for base in type(model).__mro__:
        if base.__module__.startswith("FlagEmbedding."):
            vars(sys.modules[base.__module__]).update(tqdm=plain, trange=lambda *span, **_: range(*span))


def sentence_transformers(encoder: Encoder, path: str, device: str) -> Library:
    """Sentence Transformers, with the modules (pooling, dense layers …) in the model's folder."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Router

    model = SentenceTransformer(
        path,
        device=device,
        trust_remote_code=encoder.trust_remote_code,
        # Set even for float32, as the default is the type of the saved weights. Other runtimes start from float32.
        model_kwargs={
            "dtype": getattr(torch, encoder.precision if encoder.runtime == "torch" else "float32"),
            **({"attn_implementation": encoder.attention} if encoder.attention else {}),
        },
    )
    if encoder.truncate_dim is not None:
        model.truncate_dim = None  # overrides the model's folder
    inputs = [way[0] for way in model[0].sub_modules.values()] if isinstance(model[0], Router) else [model[0]]
    if encoder.attention and not all(getattr(module, "can_flatten_inputs", False) for module in inputs):
        raise ConfigError(f"encoder.attention: '{encoder.attention}' does not support this model: remove it")
    for module in inputs:
        _end_in_float32(module, "token_embeddings")
    instructions = {kind: instruction(encoder, path, kind) for kind in KINDS}
    routes = routed(encoder, path)

    def call(texts: list[str], kind: Kind, batch_size: int) -> Any:
        prompt, texts = instructed(instructions[kind], texts)
        for module in filter(_takes_length, inputs):
            module.max_seq_length = encoder.query_max_length if kind == "query" else encoder.passage_max_length
        found = model.encode(
            texts,
            prompt=prompt,
            batch_size=batch_size,
            show_progress_bar=False,
            convert_to_tensor=True,
            normalize_embeddings=False,
            **({"task": TASKS[kind]} if routes else {}),
        )
        return found.float().cpu().numpy()

    tokenizers = {id(one): one for module in inputs if (one := getattr(module, "tokenizer", None)) is not None}
    return Library(model, call, [*tokenizers.values()], model.get_embedding_dimension())


def _end_in_float32(transformer: Any, name: str) -> None:
    """Convert its token vectors, the output called `name`, to float32: the mean over hundreds of them, and later steps,
    cost no time, and would lose digits."""

    def widen(module: Any, args: Any, output: Any) -> Any:
        if name in output:
            output[name] = output[name].float()
        return output

    transformer.register_forward_hook(widen)


def _takes_length(module: Any) -> bool:
    """Whether it truncates texts to a length; a static embedding reads entire texts."""
    own = getattr(type(module), "max_seq_length", None)
    return own.fset is not None if isinstance(own, property) else hasattr(module, "max_seq_length")
