"""Reading a config from a file or a mapping, with overrides; every error has its location in the file."""

from __future__ import annotations

import copy
import json
import logging
import re
import reprlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from negpipe.config import kept, safe_yaml
from negpipe.config.cluster import Cluster
from negpipe.config.schema import Config
from negpipe.config.section import Section
from negpipe.config.training import flat
from negpipe.errors import ConfigError, closest

logger = logging.getLogger(__name__)
CONFIG_FOLDER = Path("configs")
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 200


def find_config(name: str) -> Path:
    """The file of a config given by path, run directory, or name in configs/.

    Raises:
        ConfigError: the file does not exist; the message lists the places searched and similar names.
    """
    if name.startswith("s3://"):
        raise ConfigError(
            f"a run directory in a bucket stores no config: instead of {name}, name the config that it was made with,"
            f" as in `negpipe status my.yaml --set run_dir={name}` (without --set if the config names this run_dir)"
        )
    named = (CONFIG_FOLDER / name, (CONFIG_FOLDER / name).with_suffix(".yaml"))
    run = [kept.path_in(Path(name))] if Path(name).is_dir() else []
    tried = list(dict.fromkeys([Path(name), *run, *named]))
    for path in tried:
        if path.is_file():
            return path
    if run and run[0].parent.is_dir():
        raise ConfigError(f"the run directory '{name}' has no stored config: name the file it was made with")
    if run:
        runs = [str(path) for path in sorted(Path(name).iterdir()) if kept.path_in(path).is_file()]
        more = f". Runs in it: {', '.join(runs)}" if runs else ""
        raise ConfigError(f"'{name}' is a folder, but neither a config nor a run directory{more}")
    places = ", ".join(str(path.absolute()) for path in tried)
    raise ConfigError(f"no config '{name}': looked for {places}. {_similar(Path(name))}")


def _similar(path: Path) -> str:
    """The config or run directory that a missing one probably means; else those there are, or how to write one."""
    folders = dict.fromkeys([path.parent, CONFIG_FOLDER])
    there = [found for folder in folders for found in folder.glob("[!.]*.y*ml")]
    runs = [found for found in path.parent.glob("*") if kept.path_in(found).is_file()]
    named = {found.stem if found.is_file() else found.name: found for found in reversed([*there, *runs])}
    if near := closest(path.stem if path.suffix in (".yaml", ".yml") else path.name, named):
        return f"Did you mean {named[near]}?"
    if there:
        return f"Configs here: {', '.join(sorted(map(str, there)))}."
    return "`negpipe init` writes a first config, `negpipe init FOLDER` one for your data."


def load_config(
    source: str | Path | dict[str, Any], overrides: list[str] | None = None, *, tell: bool = True
) -> Config:
    """Read, override and validate a config.

    Args:
        source: path, name in configs/, run directory (its stored config), or a mapping.
        overrides: `key.path=value` strings; the value is parsed as YAML, but taken verbatim if the setting is a text
            and the YAML value is not.
        tell: log differences from the config stored in a run directory. Not for callers that say which stages are stale
            and why.

    Raises:
        ConfigError: one line per problem, each with its location in the file.
    """
    before = None
    if isinstance(source, dict):
        name, tree = "config", json.loads(json.dumps(source, default=str))
    else:
        path = find_config(str(source))
        name = str(path)
        tree = _mapping(path, "settings, see `negpipe config schema`")
        run_dir = path.parents[1] if path.parts[-2:] == Path(kept.NAME).parts else None
        if run_dir is not None:
            before = copy.deepcopy(tree)
            tree["run_dir"] = str(run_dir)
            given: dict[str, Any] = {}
            for override in overrides or []:
                _override(given, override)
            overrides = [*kept.restored(tree, path, flat(given)), *(overrides or [])]
    for override in overrides or []:
        _override(tree, override)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        changed = tuple(override.partition("=")[0].strip() + "." for override in overrides or [])
        if any(".".join([*map(str, problem["loc"]), ""]).startswith(changed) for problem in problems):
            name += " with overrides"
        raise ConfigError("\n".join(f"{name}: {_explain(problem)}" for problem in problems)) from None
    for line in kept.changes(before, config) if before and tell else ():
        logger.info("%s", line)
    return config


def load_cluster(path: Path) -> Cluster:
    """Read and validate the description of a cluster.

    Raises:
        ConfigError: one line per problem, each with its location in the file.
    """
    tree = _mapping(path, "properties of a node: cores, memory, disk_bandwidth and others")
    try:
        return Cluster.model_validate(tree)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        raise ConfigError("\n".join(f"{path}: {_explain(problem, Cluster)}" for problem in problems)) from None


def _mapping(path: Path, what: str) -> dict[str, Any]:
    """The content of a YAML file that must be a mapping."""
    try:
        tree = safe_yaml.load(path.read_text(encoding="utf-8"))
    except ValueError as error:
        if path.suffix in (".jsonl", ".csv", ".tsv"):
            raise ConfigError(f"{path} is data: negpipe inspect {path} --write my.yaml writes a config") from None
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must be a mapping of {what}")
    return tree


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: expected key=value, for example --set mining.num_negatives=5")
    node = tree
    *folders, leaf = key.strip().split(".")
    for folder in folders:
        child = node.get(folder)
        if child is None:
            child = node[folder] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: '{folder}' is a value, not a section")
        node = child
    is_text = _is_text([*folders, leaf])
    try:
        node[leaf] = safe_yaml.load(value)
    except ValueError as error:
        if not is_text:
            raise ConfigError(f"--set {override}: the value is not valid YAML: {error}") from None
        node[leaf] = value
    if is_text and not isinstance(node[leaf], str | None):
        node[leaf] = value


def _is_text(path: list[str]) -> bool:
    """Whether a setting is a text or null, so that `{text}` is not a mapping and 1e5 not a number."""
    model: type[BaseModel] | None = Config
    for folder in path[:-1]:
        model = _model(model.model_fields[folder].annotation) if model and folder in model.model_fields else None
    field = model.model_fields.get(path[-1]) if model else None
    return field is not None and {*(get_args(field.annotation) or (field.annotation,))} <= {str, type(None)}


def _explain(problem: Any, root: type[BaseModel] = Config) -> str:
    place = ".".join(str(step) for step in problem["loc"])
    before = f"{place}: " if place else ""
    if problem["type"] == "extra_forbidden":
        *folders, leaf = problem["loc"]
        return f"{before}unknown key. {_hint(folders, str(leaf), root)}"
    if problem["type"] == "missing":
        return f"{before}this key is required"
    shown = problem["input"]
    got = "" if isinstance(shown, dict) else f" (got {_SHOWN.repr(shown)})"
    if problem["type"] == "model_type":
        return f"{before}expected a section with keys from {', '.join(_names(problem['loc'], root))}{got}"
    hint = ""
    share = problem["type"] == "float_parsing" or problem.get("ctx", {}).get("le") == 1
    if share and (percent := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%?\s*", str(shown))):
        hint = f": for {percent[1]} %, write {float(percent[1]) / 100:g}"
    # Without the words of the library for its own work.
    said = re.sub(r"^Value error, |, (unable to parse|got a number) .*", "", problem["msg"])
    return f"{before}{said.replace('Input should be', 'must be')}{got}{hint}"


_ELSEWHERE = {
    "negative_number": "mining.num_negatives",
    "num_hard_negatives": "mining.num_negatives",
    "range_for_sampling": "mining.range_min and mining.range_max (10-210: 10 and 210)",
    "hard_neg_margin": "mining.relative_margin (perc 0.95: 0.05) or mining.absolute_margin",
    "margin": "mining.relative_margin or mining.absolute_margin",
    "candidate_pool": "data.corpus",
    "input_file": "data.path",
}
"""Keys of other miners, and their names here."""


def _hint(folders: list[Any], leaf: str, root: type[BaseModel]) -> str:
    if root is Config and leaf in _ELSEWHERE:
        return f"Use {_ELSEWHERE[leaf]} instead; mining.compat applies all settings of another miner."
    elsewhere = [path for path in _paths(root) if path.rpartition(".")[2] == leaf]
    if elsewhere:
        return f"Did you mean '{' or '.join(elsewhere)}'?"
    known = _names(folders, root)
    near = closest(leaf, known, cutoff=0.5)
    return f"Did you mean '{near}'?" if near else f"Known here: {', '.join(known)}."


def _names(folders: Iterable[Any], root: type[BaseModel]) -> list[str]:
    """The keys known at a location in the file."""
    model: type[BaseModel] | None = root
    for folder in folders:
        model = _model(model.model_fields[folder].annotation) if model and folder in model.model_fields else None
    return sorted(model.model_fields) if model else []


def _paths(model: type[BaseModel], before: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield before + name
        inner = _model(field.annotation)
        if inner:
            yield from _paths(inner, f"{before}{name}.")


def _model(annotation: Any) -> type[BaseModel] | None:
    """The model in an annotation, even if optional."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model, get_args(annotation))), None)


def schema() -> dict[str, Any]:
    """JSON schema of the config, for editors."""
    tree = Config.model_json_schema()
    for section in _sections(Config):
        node = tree if section is Config else tree["$defs"][section.__name__]
        for key, text in section.described().items():
            node["properties"][key]["description"] = text
    return tree


def _sections(section: type[Section]) -> Iterator[type[Section]]:
    """A section and all sections in it."""
    yield section
    for field in section.model_fields.values():
        if (inner := _model(field.annotation)) and issubclass(inner, Section):
            yield from _sections(inner)
