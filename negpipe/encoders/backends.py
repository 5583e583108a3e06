"""The model libraries, each behind the same two things: a module and a function.

A backend returns the module whose forward runs one batch, and the function that encodes the texts
of one call: (n, d) in any float type, in the order of the texts, not normalised. Lengths of queries and passages
come from the config alone, never from a library's default; what is put before them says `prompts`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from negpipe.config.encoder import Encoder as Settings
from negpipe.encoders.prompts import KINDS, TASKS, Kind, instructed, instruction, routed
from negpipe.errors import ConfigError

Call = Callable[[list[str], Kind, int], Any]
"""Texts, as what they are encoded, and how many of them a forward pass has."""


@dataclass(frozen=True)
class Library:
    """A model as its library has it.

    Attributes:
        module: its forward runs one batch.
        call: encodes the texts of one call.
        tokenizers: that it uses, of transformers or others.
        width: numbers of its vectors; None where the library does not tell.
    """

    module: Any
    call: Call
    tokenizers: list[Any]
    width: int | None


def flagembedding(encoder: Settings, path: str, device: str) -> Library:
    """FlagEmbedding's own model classes, chosen by config, by the model's files or by its name.

    Raises:
        ConfigError: model class and pooling do not go together, or are not known.
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
        # On what it calls "cpu", letter for letter, it makes every model float32.
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
    # M3's class holds the transformer beside what it makes of its output.
    _end_in_float32(model.model.model if model_class == "encoder-only-m3" else model.model, "last_hidden_state")

    def call(texts: list[str], kind: Kind, batch_size: int) -> Any:
        encode = model.encode_queries if kind == "query" else model.encode_corpus
        found = encode(texts, batch_size=batch_size)
        return found["dense_vecs"] if isinstance(found, dict) else found

    width = getattr(getattr(model.model, "config", None), "hidden_size", None)
    return Library(model.model, call, [model.tokenizer], width)


def class_and_pooling(encoder: Settings, path: str) -> tuple[str, str]:
    """What the config says, else what the model's own files say, else what FlagEmbedding knows of its name."""
    from FlagEmbedding.inference.embedder.model_mapping import AUTO_EMBEDDER_MAPPING, EMBEDDER_CLASS_MAPPING

    classes = {key.value: value for key, value in EMBEDDER_CLASS_MAPPING.items()}
    if encoder.model_class is not None and encoder.model_class not in classes:
        raise ConfigError(f"encoder.model_class: '{encoder.model_class}' is not one of {', '.join(classes)}")
    # By the configured name: the folder of a hub model is called by its commit.
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
            f"encoder.pooling: '{pooling}' does not go with model class '{model_class}':"
            " decoders take last_token, encoders cls or mean; set encoder.pooling and encoder.model_class"
        )
    return model_class, pooling


def _pooling_file(path: str) -> str | None:
    """The pooling that a Sentence Transformers folder names, in FlagEmbedding's spelling."""
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
            f"encoder.pooling: {file} asks for {' and '.join(map(str, modes)) or 'none'}, which FlagEmbedding has not:"
            " set encoder.backend to sentence-transformers, or encoder.pooling"
        )
    return "last_token" if modes[0] == "lasttoken" else str(modes[0])


def _silence(model: Any) -> None:
    """Take the progress bars away, which no argument switches off; progress is reported by `on_batch`."""

    def plain(items: Iterable[Any], **_: Any) -> Iterable[Any]:
        return items

    for base in type(model).__mro__:
        if base.__module__.startswith("FlagEmbedding."):
            vars(sys.modules[base.__module__]).update(tqdm=plain, trange=lambda *span, **_: range(*span))


def sentence_transformers(encoder: Settings, path: str, device: str) -> Library:
    """Sentence Transformers, with the modules (pooling, dense layers …) that the model's folder names."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Router

    model = SentenceTransformer(
        path,
        device=device,
        trust_remote_code=encoder.trust_remote_code,
        # Named even for float32: the default is the type the weights were saved in. Other runtimes begin with it.
        model_kwargs={"dtype": getattr(torch, encoder.precision if encoder.runtime == "torch" else "float32")},
    )

    if encoder.truncate_dim is not None:
        model.truncate_dim = None  # what the model's folder asks for gives way
    inputs = [way[0] for way in model[0].sub_modules.values()] if isinstance(model[0], Router) else [model[0]]
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
    """Hand on its vectors of tokens, the output called `name`, in float32: a mean over hundreds of them, and what comes
    behind it, costs no time and would lose digits."""

    def widen(module: Any, args: Any, output: Any) -> Any:
        if name in output:
            output[name] = output[name].float()
        return output

    transformer.register_forward_hook(widen)


def _takes_length(module: Any) -> bool:
    """Whether it cuts texts at a length; a static embedding reads them whole."""
    own = getattr(type(module), "max_seq_length", None)
    return own.fset is not None if isinstance(own, property) else hasattr(module, "max_seq_length")
