"""What befalls actors and nodes of a Ray cluster; the file that `NODE_CONTROL` names says what, for each stage.

Python imports this module when it starts with this folder on PYTHONPATH. A worker notes each file of a part that it
publishes, and then sleeps, waits until others have published so many, or kills its node or itself in the middle of its
task. `first`: only the first worker of the stage does.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

_CONTROL = Path(os.environ.get("NODE_CONTROL", "/nowhere"))
_replace, _version = os.replace, importlib.metadata.version
_first: dict[str, bool] = {}


def _told() -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads(_CONTROL.read_text())
    except (OSError, ValueError):
        return {}
    return told


def _is_first(what: str) -> bool:
    """Whether this process was the first of all to ask."""
    if what not in _first:
        try:
            os.close(os.open(f"{_CONTROL}.{what}", os.O_CREAT | os.O_EXCL))
            _first[what] = True
        except FileExistsError:
            _first[what] = False
    return _first[what]


def _watched_replace(source: Any, target: Any, **rest: Any) -> None:
    _replace(source, target, **rest)
    path = Path(target)
    stage, told = path.parent.name, _told()
    if ".negpipe" in path.parts or stage not in told:
        return
    with Path(f"{_CONTROL}.notes").open("a") as notes:
        notes.write(f"{stage} {path.name} {os.getpid()}\n")
    if told[stage].get("first") and not _is_first(stage):
        return
    if told[stage].get("kills"):
        os.kill(os.getppid() if told[stage]["kills"] == "node" else os.getpid(), signal.SIGKILL)
    time.sleep(told[stage].get("sleeps", 0))
    while _by_others(stage) < told[stage].get("waits", 0):
        time.sleep(0.1)


def _by_others(stage: str) -> int:
    lines = [line.split() for line in Path(f"{_CONTROL}.notes").read_text().splitlines()]
    return sum(at == stage and pid != str(os.getpid()) for at, _, pid in lines)


def _watched_version(name: str) -> str:
    asking = sys._getframe(1).f_globals.get("__name__")
    if asking == "negpipe.engine.versions" and name == _told().get("older") and _is_first("older"):
        return "0.0.1"
    return _version(name)


if _CONTROL.parent.is_dir():
    os.replace = _watched_replace  # type: ignore[assignment]
    importlib.metadata.version = _watched_version  # type: ignore[assignment]
