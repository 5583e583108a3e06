"""What befalls the processes that run tasks; the file that `WORKER_CONTROL` names says what, for each folder of parts.

Python imports this module when it starts with this folder on PYTHONPATH. A process notes each file of a part that it
publishes, and then sleeps, or kills its Ray node or itself, in the middle of its task. `first`: only the first process
of the stage does. `together`: before that, each waits until so many have published in the stage. `WORKER_PACE`: how
many times as long it sleeps as others.
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

_CONTROL = Path(os.environ.get("WORKER_CONTROL", "/nowhere"))
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


def _wait_for(processes: int, stage: str) -> None:
    """Wait until so many processes have noted a file of the stage."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        noted = [line.split() for line in Path(f"{_CONTROL}.notes").read_text().splitlines()]
        if len({pid for at, _, pid, *_ in noted if at == stage}) >= processes:
            return
        time.sleep(0.05)


def _watched_replace(source: Any, target: Any, **rest: Any) -> None:
    _replace(source, target, **rest)
    path = Path(target)
    stage, told = path.parent.name, _told()
    if ".negpipe" in path.parts or stage not in told:
        return
    with Path(f"{_CONTROL}.notes").open("a") as notes:
        threads = os.environ.get("RAYON_NUM_THREADS", "any")
        notes.write(f"{stage} {path.name} {os.getpid()} {os.getppid()} {threads}\n")
    if told[stage].get("first") and not _is_first(stage):
        return
    if told[stage].get("together"):
        _wait_for(told[stage]["together"], stage)
    if told[stage].get("kills"):
        os.kill(os.getppid() if told[stage]["kills"] == "node" else os.getpid(), signal.SIGKILL)
    time.sleep(told[stage].get("sleeps", 0) * int(os.environ.get("WORKER_PACE", "1")))


def _watched_version(name: str) -> str:
    asking = sys._getframe(1).f_globals.get("__name__")
    if asking == "negpipe.engine.versions" and name == _told().get("older") and _is_first("older"):
        return "0.0.1"
    return _version(name)


if _CONTROL.parent.is_dir():
    os.replace = _watched_replace  # type: ignore[assignment]
    importlib.metadata.version = _watched_version  # type: ignore[assignment]
