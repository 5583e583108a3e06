"""The prefixes of texts: the instruction of the config, or a prompt of the model.

By default Sentence Transformers' `encode_query` and `encode_document` decide: they use the prompts "query" and
"document", or nothing if the model has no such prompt. Neither torch nor a library is imported: the prefix is part
of the identity of vectors, and is known before the model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, TypeAdapter, ValidationError

from negpipe.config.encoder import Encoder
from negpipe.errors import ConfigError, InputError

Kind = Literal["passage", "query"]
KINDS: tuple[Kind, ...] = ("query", "passage")

TASKS: Mapping[Kind, str] = {"query": "query", "passage": "document"}
"""The kinds in Sentence Transformers: the names of its default prompts and of a Router's routes."""

_FILE = "config_sentence_transformers.json"
_ROUTERS = ("Router", "Asym")


@dataclass(frozen=True)
class Instruction:
    """The prefix of texts.

    Attributes:
        text: the prefix, or None.
        form: the format that joins it and the text, with two {}.
        prompt: its name, if it is a prompt of the model.
    """

    text: str | None = None
    form: str = "{}{}"
    prompt: str | None = None


def instruction(encoder: Encoder, folder: str, kind: Kind) -> Instruction:
    """The prefix of texts of a kind, from the config or else from the model in a folder.

    Raises:
        ConfigError: the config names a prompt that the model does not have.
        InputError: the model's prompts cannot be read.
    """
    own: str | None = getattr(encoder, f"{kind}_instruction")
    if own is not None:
        return Instruction(own, getattr(encoder, f"{kind}_instruction_format"))
    if not encoder.runs_here:
        return Instruction()
    named, name = prompts(folder), getattr(encoder, f"{kind}_prompt_name")
    if name is not None and name not in named:
        raise ConfigError(f"encoder.{kind}_prompt_name: {unknown(name, named)}")
    if name is None and encoder.backend == "sentence-transformers":
        name = TASKS[kind]
    return Instruction(named[name], prompt=name) if named.get(name) else Instruction()


def unknown(name: str, named: Mapping[str, str]) -> str:
    """The message for a prompt that a model does not have."""
    return f"the model has no prompt '{name}'; its prompts: {', '.join(named) or 'none'}"


def prompts(folder: str) -> dict[str, str]:
    """The prompts in a model's folder, as read by Sentence Transformers.

    Raises:
        InputError: they cannot be read.
    """
    settings = _read(Path(folder) / _FILE, _Settings, _Settings())
    # Models of other types are loaded without prompts.
    named = settings.prompts if settings.model_type == "SentenceTransformer" else None
    return {name: text or "" for name, text in (named or {}).items()}


def routed(encoder: Encoder, folder: str) -> bool:
    """Whether the model has a Router, which sends queries and documents through separate modules."""
    return _has_module(encoder, folder, _ROUTERS)


def reads_whole(encoder: Encoder, folder: str) -> bool:
    """Whether the model never truncates: a static embedding has no maximum length."""
    return _has_module(encoder, folder, ("StaticEmbedding",))


def has_inputs_of_routes(encoder: Encoder, folder: str) -> bool:
    """Whether a Router's routes start with separate modules, and so with separate tokenizers."""
    starts = set()
    for module in _modules(encoder, folder):
        if module.kind in _ROUTERS:
            routes = _read(Path(folder) / module.path / "router_config.json", _Router, _Router()).structure
            starts |= {modules[0] for modules in routes.values() if modules}
    return len(starts) > 1


def _has_module(encoder: Encoder, folder: str, kinds: tuple[str, ...]) -> bool:
    return any(module.kind in kinds for module in _modules(encoder, folder))


def _modules(encoder: Encoder, folder: str) -> list[_Module]:
    """The modules of a model run by Sentence Transformers."""
    if encoder.backend != "sentence-transformers":
        return []
    modules: list[_Module] = _read(Path(folder) / "modules.json", list[_Module], [])
    return modules


def of_the_model(encoder: Encoder, folder: str) -> dict[str, str]:
    """What the model, not the config, determines about texts: part of the identity of vectors."""
    chosen = {kind: instruction(encoder, folder, kind) for kind in KINDS}
    texts = {f"{kind}_prompt": one.text for kind, one in chosen.items() if one.prompt is not None and one.text}
    return texts | ({"routes": ", ".join(TASKS.values())} if routed(encoder, folder) else {})


def unused(encoder: Encoder, folder: str) -> Iterator[str]:
    """Warnings about texts without a prompt if the model has unused prompts."""
    named = prompts(folder)
    chosen = {kind: instruction(encoder, folder, kind) for kind in KINDS}
    left = [name for name, text in named.items() if text and name not in {one.prompt for one in chosen.values()}]
    for kind, one in chosen.items():
        says_none = named.get(TASKS[kind]) == ""
        asked = getattr(encoder, f"{kind}_prompt_name") is not None
        if left and one.text is None and not says_none and not asked:
            what = "anchors" if kind == "query" else "documents"
            yield (
                f"{what} have no prompt, but the model has the prompts {', '.join(map(repr, left))}: set"
                f" encoder.{kind}_prompt_name to the one for {what}, or encoder.{kind}_instruction: '' for none"
            )


class _Settings(BaseModel):
    prompts: dict[str, str | None] | None = None
    model_type: str = "SentenceTransformer"


class _Module(BaseModel):
    type: str = ""
    path: str = ""

    @property
    def kind(self) -> str:
        return self.type.rpartition(".")[2]


class _Router(BaseModel):
    structure: dict[str, list[str]] = {}


def _read(file: Path, kind: Any, default: Any) -> Any:
    try:
        return TypeAdapter(kind).validate_json(file.read_bytes())
    except FileNotFoundError:
        return default
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            str(first["msg"]),
            file=str(file),
            field=".".join(map(str, first["loc"])) or None,
            remedy="Fetch the model again, or fix the file",
        ) from None


def instructed(instruction: Instruction, texts: list[str]) -> tuple[str, list[str]]:
    """The prompt of each text, and the texts; an empty prompt also overrides the library's choice."""
    if instruction.text is None:
        return "", texts
    form = instruction.form.replace("\\n", "\n")  # Like FlagEmbedding.
    if form.endswith("{}"):
        return form.format(instruction.text, ""), texts
    return "", [form.format(instruction.text, text) for text in texts]
