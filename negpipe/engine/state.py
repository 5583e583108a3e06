"""State of a stage: compares what is on disk with what the config asks for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from negpipe.config.schema import Config
from negpipe.engine import shown, versions
from negpipe.engine.fingerprint import DigestCache, key
from negpipe.engine.manifest import Manifest, Part
from negpipe.engine.stage import Context, Stage, cache_path
from negpipe.errors import DamagedError, count_of


@dataclass(frozen=True)
class State:
    """State of a stage. `reason` says why it is not current; `done` and `total` count parts if known; `versions` says
    what was made with other library versions than are installed."""

    stage: str
    state: Literal["current", "stale", "partial", "missing", "blocked", "damaged"]
    reason: str = ""
    manifest: Manifest | None = None
    done: int = 0
    total: int = 0
    versions: str | None = None


def look(stage: Stage, context: Context) -> State:
    """The state of a stage relative to the config, from its manifest and file sizes."""
    state, parts = _look(stage, context)
    return replace(state, versions=versions.describe(parts, versions.installed(stage.libraries(context.config))))


def _look(stage: Stage, context: Context) -> tuple[State, Sequence[Part]]:
    """Its state and its parts; there may be many, so they are read only once."""
    try:
        manifest = context.books(stage.name).manifest()
    except DamagedError as error:
        return State(stage.name, "damaged", str(error)), ()
    if absent := [name for name in stage.inputs if name not in context.manifests]:
        return State(stage.name, "blocked", f"waiting for {absent[0]}", manifest), manifest.parts if manifest else ()
    if manifest is not None:
        return _against(manifest, stage, context), manifest.parts
    parts = [*context.books(stage.name).parts()]
    if not parts:
        return State(stage.name, "missing", "no previous output"), ()
    done = len(parts)
    return State(stage.name, "partial", f"unfinished, {count_of(done, 'part')} on disk", done=done), parts


def _against(manifest: Manifest, stage: Stage, context: Context) -> State:
    """The state of a stage that has a manifest."""
    identity = identity_of(stage, context)
    serving = replace(identity, settings=stage.serving(manifest.settings, identity.settings))
    if manifest.key not in (identity.key, serving.key):
        return State(stage.name, "stale", _difference(manifest, identity, context.config), manifest)
    if any(part.lacks_roles for part in manifest.parts):
        return State(stage.name, "stale", "its records have the first edition's format, without file roles", manifest)
    files = [file for part in manifest.parts for file in part.files]
    sizes = context.store.sizes(file.path for file in files)
    problems = [problem for file in files if (problem := file.misfit(sizes.get(file.path)))]
    if problems:
        return State(stage.name, "damaged", f"{problems[0]} ({count_of(len(problems), 'file')} in all)", manifest)
    if hidden := shown.missing(stage, context, manifest):
        return State(stage.name, "damaged", f"{hidden} is missing or shows other files", manifest)
    return State(stage.name, "current", "", manifest)


@dataclass(frozen=True)
class Identity:
    """Everything that can change a stage's output."""

    stage: str
    version: int
    settings: dict[str, Any]
    sources: dict[str, str]
    inputs: dict[str, str]

    @property
    def key(self) -> str:
        return key(self.stage, self.version, self.settings, self.sources, self.inputs)


def identity_of(stage: Stage, context: Context) -> Identity:
    context = stage.within(context)
    inputs = {name: context.manifest(name).digest for name in stage.inputs}
    return Identity(stage.name, stage.version, stage.settings(context.config), stage.sources(context), inputs)


def _difference(manifest: Manifest, now: Identity, config: Config) -> str:
    """Why a manifest is stale, in terms of the config."""
    if manifest.version != now.version:
        return f"its output was made by version {manifest.version} of the stage, the current version is {now.version}"
    fresh = {**now.settings, **now.sources, **now.inputs}
    old = {**manifest.settings, **manifest.inputs}
    changed = [name for name in fresh if old.get(name, ...) != fresh[name]]
    lines = []
    for name in changed:
        if name in now.inputs:
            lines.append(f"the output of {name} changed")
            continue
        if name not in old:
            if not any(other in old for other in changed):  # a changed setting may add others
                lines.append(f"{name} was added")
            continue
        before, after = old[name], fresh[name]
        if name in now.sources:
            before, after = _setting(manifest.provenance.get("config", {}), name), _setting(config.model_dump(), name)
        lines += [f"the content of {name} changed"] if before == after else _changes(name, before, after)
    # Settings that came with a changed one disappear with it.
    gone = [name for name in old if name not in fresh] if not lines else []
    return "; ".join([*lines, *(f"{name} was removed" for name in gone)]) or "its identity changed"


def _changes(name: str, before: Any, after: Any) -> Iterator[str]:
    """The keys of a setting that changed; of a section, each on its own."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {**before, **after}:
            if before.get(key) != after.get(key):
                yield from _changes(f"{name}.{key}", before.get(key), after.get(key))
    else:
        yield f"{name} changed from {_shown(before)} to {_shown(after)}"


def _shown(value: Any) -> str:
    """A value as written in a config."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def _setting(tree: Any, name: str) -> Any:
    for step in name.split("."):
        tree = tree.get(step) if isinstance(tree, dict) else None
    return tree


@contextmanager
def digests_of(config: Config, *, rehash: bool = False) -> Iterator[DigestCache]:
    """The digests of source and model files; computed digests are saved, however the work ends."""
    digests = DigestCache(cache_path(config.run_dir), rehash=rehash)
    try:
        yield digests
    finally:
        digests.save()


def blocked(state: State, wanted: str) -> str:
    reason = f": {state.reason}" if state.reason else ""
    return (
        f"{wanted} needs the output of {state.stage}, which is {state.state}{reason}."
        f" Run `negpipe {state.stage} CONFIG` first, or `negpipe mine CONFIG` to run all stages"
        + (", or repeat the --set options that it was made with" if state.state == "stale" else "")
    )
