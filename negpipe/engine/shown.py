"""How a stage's parts appear to users in the run directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from negpipe.engine.fingerprint import key
from negpipe.engine.manifest import File, Manifest
from negpipe.engine.stage import Context, Shown, Stage


def show(stage: Stage, context: Context, manifest: Manifest) -> None:
    """Show the parts of a complete stage, and none made with other settings.

    Raises:
        StorageError: they cannot be shown; the previous view stays.
    """

    def of_the_first_edition() -> set[str]:
        """Names of the files that it wrote directly into the folder."""
        paths = (Path(file.path) for part in context.books(stage.name).records() for file in part.files)
        return {path.name for path in paths if path.parent.name.startswith(f".{stage.name}-")}

    for name, what in stage.views(manifest.parts).items():
        context.run.show(name, _paths(what), _version(what), context.store, of_the_first_edition)


def missing(stage: Stage, context: Context, manifest: Manifest) -> str | None:
    """A name that does not show the right files; None if all do."""
    for name, what in stage.views(manifest.parts).items():
        if not context.run.shows(name, _paths(what), _version(what), context.store):
            return name
    return None


def _version(what: Shown) -> str:
    """Identifies what a folder shows: names and content."""
    return key({name: file.digest for name, file in what.items()}) if isinstance(what, Mapping) else ""


def _paths(what: Shown) -> str | dict[str, str] | None:
    if isinstance(what, File):
        return what.path
    return {name: file.path for name, file in what.items()} if isinstance(what, Mapping) else None
