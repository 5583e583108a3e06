"""The config that a run stores: complete, without secrets, and valid from any working directory.

It is in the run directory, so that every command accepts that directory instead of a config. When it is read, the run
directory is the one that contains it. User names, passwords and queries of addresses are left out: such addresses must
be set again, by the environment or `--set`.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from negpipe.config import presets, safe_yaml
from negpipe.config.schema import Config
from negpipe.config.training import flat
from negpipe.errors import ConfigError
from negpipe.redaction import is_redacted, redacted

NAME = ".negpipe/config.yaml"
"""Its path in a run directory."""
_PLACES = (
    *("run_dir", "store", "encoder.cache", "encoder.corpus_vectors", "encoder.anchor_vectors", "index.trained"),
    *("mining.exclude_file", "executor.slurm.folder", "resources.cache"),
)
_NAMES = (  # on the hub, unless a local file has that name
    *("data.path", "data.corpus.path", "data.queries.path", "data.qrels.path", "encoder.model", "train.base"),
    "train.guide",
)

_CIRCUMSTANCE = ("executor.", "resources.", "output.report")


def path_in(run_dir: Path) -> Path:
    """The path of the config stored in a run directory."""
    return run_dir / NAME


def text(config: Config) -> str:
    """The config as its run stores it: YAML, with absolute paths and without secrets."""
    tree = config.model_dump(mode="json")
    for key, section, leaf in _located(tree, config):
        value = section[leaf]
        absolute = _absolute if key in _PLACES else _absolute_if_here
        section[leaf] = [*map(absolute, value)] if isinstance(value, list) else absolute(value)
    return yaml.safe_dump(redacted(tree), sort_keys=False, allow_unicode=True)


def inputs(config: Config) -> Iterator[Path]:
    """The local files and folders that the config names, except run directory and store."""
    for key, section, leaf in _located(config.model_dump(mode="json"), config):
        if key not in ("run_dir", "store"):
            names = section[leaf] if isinstance(section[leaf], list) else [section[leaf]]
            for name in map(os.path.expanduser, names):
                found = [name] if Path(name).exists() else glob.glob(name, recursive=True)  # noqa: PTH207 (see sources.places)
                yield from map(Path, found)


def _located(tree: Any, config: Config) -> Iterator[tuple[str, Any, str]]:
    """The settings that name a place and are set: key, section in the tree, name in the section."""
    for key in (*_PLACES, *_NAMES):
        *folders, leaf = key.split(".")
        section = tree
        for folder in folders:
            section = section.get(folder) or {}
        if section.get(leaf) and not (key == "encoder.model" and config.encoder.backend == "http"):
            yield key, section, leaf


def alike(before: str, after: str) -> bool:
    """Whether two stored configs differ only in settings that do not change rows."""
    return _asked_for(before) == _asked_for(after)


def _asked_for(content: str) -> dict[str, Any] | None:
    try:
        tree = safe_yaml.load(content)
    except ValueError:  # edited by hand
        return None
    if not isinstance(tree, dict):
        return None
    return {key: value for key, value in flat(tree).items() if not key.startswith(_CIRCUMSTANCE)}


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)  # noqa: PTH100 (keeps links as the user named them)


def _absolute_if_here(name: str) -> str:
    if name.startswith("~"):  # expanded when it is read
        return name
    here = name.startswith(("./", "../")) or glob.has_magic(name) or Path(name).exists()
    return _absolute(name) if here else name


def variable(key: str) -> str:
    """The environment variable for a setting that contains a secret: NEGPIPE_DATA_PATH for data.path."""
    return f"NEGPIPE_{key.replace('.', '_').upper()}"


def restored(tree: dict[str, Any], path: Path, given: Collection[str]) -> list[str]:
    """Overrides from the environment for settings that a stored config lacks.

    A new value of a setting that sets defaults of others, such as `mining.compat`, removes those from the tree.

    Args:
        tree: the stored config, which is modified.
        path: its file.
        given: the settings overridden by the user.

    Raises:
        ConfigError: an address lacks its secret, and neither the user nor the environment sets it.
    """
    mining = tree.get("mining")
    if "mining.compat" in given and isinstance(mining, dict):
        for name in {name for preset in presets.PRESETS.values() for name in preset}:
            mining.pop(name, None)
    if "output.include_positives" in given and isinstance(mining, dict):
        mining.pop("relative_margin", None)
    secret = [key for key, value in flat(tree).items() if _lacks(value) and not _covered(key, given)]
    missing = [key for key in secret if variable(key) not in os.environ]
    if missing:
        what = "\n".join(
            f"{key} is {flat(tree)[key]}: set it with --set '{key}=…' or the environment variable {variable(key)}"
            for key in missing
        )
        raise ConfigError(f"{path} does not store user names, passwords and queries of addresses. {what}")
    return [f"{key}={os.environ[variable(key)]}" for key in secret]


def _lacks(value: Any) -> bool:
    return any(map(_lacks, value)) if isinstance(value, list) else isinstance(value, str) and is_redacted(value)


def _covered(key: str, given: Collection[str]) -> bool:
    return any(f"{key}.".startswith(f"{name}.") for name in given)


def changes(before: Mapping[str, Any], after: Config) -> list[str]:
    """Differences from the stored config, one line per setting."""
    was, now = flat(before), flat(redacted(after.model_dump(mode="json")))
    known = {*was, *(key for key in now if any(key.startswith(f"{section}.") for section in was))}  # not new defaults
    return [
        f"{key}: {_shown(now.get(key))}; the run was made with {_shown(was.get(key))}"
        for key in dict.fromkeys([*was, *now])
        if key in known and was.get(key) != now.get(key) and key != "run_dir"
    ]


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
