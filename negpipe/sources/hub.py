"""Datasets of the Hugging Face hub, and local folders with the same layout: the same code loads both.

A dataset is downloaded once into the library's cache and memory-mapped from there, so that an interrupted
download resumes, reading it again needs no network, and memory does not grow with the dataset.
"""

from __future__ import annotations

import http.client
import logging
import os
import re
import socket
import sys
import tempfile
import urllib.error
import urllib.request
from functools import lru_cache
from pathlib import Path
from typing import Any

from negpipe.config import safe_yaml
from negpipe.engine.fingerprint import key
from negpipe.errors import InputError, beneath
from negpipe.sources.places import extension_of, near

_log = logging.getLogger(__name__)

_NO_DATA = {".git", ".cache", "__pycache__"}


def load(path: str, subset: str | None, revision: str | None, *, streaming: bool = False) -> dict[str, Any]:
    """Every split of a hub dataset or of a local dataset folder, memory-mapped or streaming, by name.

    Raises:
        InputError: the dataset, subset or revision is not found, there is no network, or the data cannot be read.
    """
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    local = Path(path).is_dir()
    if not local:
        _look_for_the_hub()
    # The library's cache misses edits in a local folder, so it is rebuilt without comparing it to the earlier
    # state. With the absolute path, a folder called `csv` or `json` is not taken for a builder of that name.
    afresh: dict[str, Any] = {}
    if local:
        afresh = {"download_mode": "reuse_cache_if_exists", "verification_mode": "no_checks"}
        afresh["cache_dir"] = str(Path(datasets.config.HF_DATASETS_CACHE) / f"local-{_state(Path(path))}")
    name = str(Path(path).resolve()) if local else path
    try:
        if local and any((Path(path) / saved).is_file() for saved in ("dataset_dict.json", "state.json")):
            saved = datasets.load_from_disk(name)  # written by `save_to_disk`
            return dict(saved) if isinstance(saved, dict) else {"train": saved}
        found = datasets.load_dataset(name, subset, revision=revision, streaming=streaming, **afresh)
    except Exception as error:  # the library raises network, parser and builder errors of many kinds
        what = f"the subset '{subset}' of this dataset" if subset else "this dataset"
        raise _not_loaded(what, path, error) from error
    return dict(found)


def subsets(path: str, revision: str | None) -> list[str]:
    """The names of a dataset's configs; for a local folder, those in README.md.

    Raises:
        InputError: the dataset is not found, or cannot be queried.
    """
    return _stated(Path(path) / "README.md") if Path(path).is_dir() else _asked(path, revision)


@lru_cache(1)
def _look_for_the_hub() -> None:
    """Without a network, make the libraries read their cache only: they would repeat every request for half a minute.

    A hub that answers late or with an error is left to them: repeating may help.
    """
    import datasets
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    try:
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=10):
            return
    except urllib.error.URLError as error:
        if not isinstance(error.reason, socket.gaierror | ConnectionRefusedError):
            return
        _log.warning("the hub is not reachable (%s); reading its local cache only", error.reason.strerror)
    except (OSError, ValueError, http.client.HTTPException):
        return
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


@lru_cache(64)
def _asked(path: str, revision: str | None) -> list[str]:
    import datasets

    _look_for_the_hub()
    if stated := _stated(readme) if (readme := _cached_readme(path, revision)) else []:
        return stated  # offline, the library knows the subset `default` only
    try:
        return list(datasets.get_dataset_config_names(path, revision=revision))
    except Exception as error:  # as in `load`
        raise _not_loaded("this dataset", path, error) from error


def _cached_readme(path: str, revision: str | None) -> Path | None:
    """README.md of a dataset loaded before, in the folder of its commit; None: none, or the hub is reachable."""
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if not constants.HF_HUB_OFFLINE:
        return None
    try:
        found = try_to_load_from_cache(path, "README.md", repo_type="dataset", revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _stated(readme: Path) -> list[str]:
    if not readme.is_file():
        return []
    _, _, rest = readme.read_text(encoding="utf-8", errors="replace").partition("---")
    try:
        front = safe_yaml.load(rest.partition("\n---")[0])
    except ValueError:
        return []
    configs = front.get("configs") if isinstance(front, dict) else None
    return [str(one["config_name"]) for one in configs or [] if isinstance(one, dict) and "config_name" in one]


def _not_loaded(what: str, path: str, error: Exception) -> InputError:
    if problem := _cache_problem():
        return problem
    said = f"{what} cannot be loaded ({_short(error)})"
    if not Path(path).is_dir():
        return _missing(path, said)
    remedy = _pattern(Path(path)) or "Check the folder's README.md (configs) and its data files"
    return InputError(said, file=path, remedy=remedy)


def _pattern(folder: Path) -> str:
    """How to name the files of a folder without README.md that are read line by line; empty if there are none."""
    if (folder / "README.md").is_file():
        return ""
    for file in files(folder):
        if (ending := extension_of(file.name)) in (".jsonl", ".ndjson", ".csv", ".tsv"):
            below = folder if file.parent == folder else folder / "**"
            pattern = below / f"*{file.name[file.name.rindex(ending) :]}"
            return (
                f"Name the files of the split by a pattern, such as data.path={pattern}: then errors name the row, and"
                " data.max_bad_rows applies"
            )
    return ""


def _cache_problem() -> InputError | None:
    """An error if the library's cache, and not the data, is the cause; None: the cache is writable."""
    import datasets

    cache = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return None
    except OSError as error:
        named = next(
            (name for name in ("HF_DATASETS_CACHE", "HF_HOME", "XDG_CACHE_HOME") if name in os.environ), "HF_HOME"
        )
        problem = f"the datasets cache cannot be written ({error.strerror or error})"
        return InputError(problem, file=str(cache), field=named, remedy=f"Set {named} to a writable folder")


def files(folder: Path) -> list[Path]:
    """Every file of a local folder, following links, except files of version control and tools."""
    found, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = [] if real in seen else sorted(set(folders) - _NO_DATA)
        seen.add(real)
        found += [Path(root, name) for name in sorted(names)]
    return found


def _state(folder: Path) -> str:
    """A name for the current state of a local folder, for a separate cache: the library's is shared by all folders with
    the same name, reuses the columns of another or of an earlier state, and is written by all its readers.
    """
    stats = [(str(file.relative_to(folder)), file.stat()) for file in files(folder)]
    return key(str(folder.resolve()), [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])


def commit(path: str, subset: str | None, revision: str | None) -> str:
    """The commit of a hub dataset, without reading it; offline, that of the local cache.

    Raises:
        InputError: the dataset or revision does not exist, or is neither online nor in the cache.
    """
    if revision and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    _look_for_the_hub()
    if readme := _cached_readme(path, revision):
        return readme.parent.name
    try:
        return str(HfApi().dataset_info(path, revision=revision, timeout=30).sha)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise _missing(path, f"the hub has no such dataset ({_short(error)})") from None
    except Exception as error:  # many causes: offline mode, name resolution, proxies, timeouts
        _log.warning("%s: the hub is not reachable (%s); using the cached dataset", path, _short(error))
    try:
        return str(datasets.load_dataset_builder(path, subset, revision=revision).hash)
    except Exception as error:  # as above
        problem = f"neither the hub nor the local cache has this dataset ({_short(error)})"
        raise _missing(path, problem) from None


def _missing(path: str, problem: str) -> InputError:
    """The error for a name without a local path, and without a dataset that can be read."""
    remedy = (
        "Check the name and data.revision; private datasets require `hf auth login`; offline, use a local folder, or a"
        f" dataset that was loaded here before. {near(path)}".rstrip(". ")
    )
    return InputError(f"no local file or folder{beneath(path)}, and {problem}", file=path, remedy=remedy)


def _short(error: BaseException) -> str:
    while error.__cause__ is not None and type(error).__name__ == "DatasetGenerationError":
        error = error.__cause__
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= 240 else message[:237] + "..."
