"""Which versions of libraries made a part, and whether they are those that are installed.

Versions are circumstance: they are in no key, since an upgrade must not throw vectors away. But bytes may differ
between them, so what would mix parts of two versions says so, and `--rebuild` makes the older ones again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version

from negpipe.engine.manifest import Part
from negpipe.errors import VersionsError


def installed(libraries: Iterable[str]) -> dict[str, str]:
    """The installed versions by name; libraries that are not there are left out."""
    found = {}
    for name in libraries:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def is_of_others(part: Part, now: dict[str, str]) -> bool:
    """Whether a part was made with other versions than these. One that does not say is believed."""
    return bool(_differing(part, now))


def describe(parts: Iterable[Part], now: dict[str, str]) -> str | None:
    """How many parts were made with other versions than these, in one sentence; None: none."""
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
    """Have one version of each library within what is made together.

    Args:
        begun: the versions it began with.
        now: those of who is to go on.
        what: that is made, as a subject ("encode: its shards").
        host: where those are installed.
        remedy: what helps beside installing the same.

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
