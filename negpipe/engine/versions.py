"""Compares the library versions that made a part with the installed ones.

Versions are circumstances and in no key, since an upgrade must not discard vectors. But bytes may differ between
versions, so mixing parts of two versions is reported, and `--rebuild` recomputes the older ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version

from negpipe.engine.manifest import Part
from negpipe.errors import VersionsError


def installed(libraries: Iterable[str]) -> dict[str, str]:
    """The installed versions by name; missing libraries are left out."""
    found = {}
    for name in libraries:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def is_of_others(part: Part, now: dict[str, str]) -> bool:
    """Whether a part was made with other versions than these. A part without versions is trusted."""
    return bool(_differing(part, now))


def describe(parts: Iterable[Part], now: dict[str, str]) -> str | None:
    """A sentence saying how many parts were made with other versions than these; None if none."""
    count, total, older = 0, 0, Counter[tuple[str, str]]()
    for part in parts:
        differing = _differing(part, now)
        count, total = count + bool(differing), total + 1
        older.update(differing)
    if not count:
        return None
    known = ", ".join(f"{name} {then} ({now[name]} is installed)" for name, then in sorted(older))
    return (
        f"{count:,} of {total:,} parts were made with {known}: their bytes may differ from those of new ones;"
        " --rebuild recomputes them"
    )


def check_same(begun: Mapping[str, str], now: Mapping[str, str], what: str, host: str, remedy: str = "") -> None:
    """Require one version of each library for everything that is made together.

    Args:
        begun: the versions that the first process used.
        now: those of the process that continues.
        what: what is made, as the subject of a sentence ("encode: its shards").
        host: the machine where `now` is installed.
        remedy: what helps other than installing the same versions.

    Raises:
        VersionsError: they differ.
    """
    if begun == now:
        return
    differing = [each for each in sorted({*begun, *now}) if begun.get(each) != now.get(each)]
    had, has = (", ".join(f"{each} {there.get(each, '(none)')}" for each in differing) for there in (begun, now))
    raise VersionsError(f"{what} started with {had}, but {has} is installed on {host}: install the same there{remedy}")


def _differing(part: Part, now: dict[str, str]) -> list[tuple[str, str]]:
    made = part.provenance.get("libraries", part.provenance)  # encode's parts of the first edition hold them directly
    return [(name, made[name]) for name in now if name in made and made[name] != now[name]]
