"""What befalls the processes of a run under torture, its workers included; `BLOW` in the environment says what.

Python imports this module when it starts with this folder on PYTHONPATH. The package knows nothing of it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import time
from pathlib import Path
from typing import Any, NoReturn

BLOW: dict[str, Any] = json.loads(os.environ.get("BLOW", "{}"))
_fsync, _replace, _dup = os.fsync, os.replace, os.dup
_seen = 0
_answers = -1  # where a worker answers


def _place(path: Path) -> tuple[str, str]:
    """Stage and kind of what is written: part, sidecar or manifest."""
    if ".negpipe" in path.parts:
        return path.parent.name, {"manifest.json": "manifest"}.get(path.name, "sidecar")
    folder = path.parent.name
    return ("triplets" if folder in ("rows", "ledger", "deeper") else folder), "part"


def _due(path: Path) -> bool:
    global _seen  # noqa: PLW0603
    if _place(path) != (BLOW["stage"], BLOW["what"]):
        return False
    _seen += 1
    return _seen == int(BLOW["nth"])


def _die() -> NoReturn:
    os.killpg(0, signal.SIGKILL)
    raise SystemExit


def _struck_fsync(handle: int) -> None:
    path = Path(f"/proc/self/fd/{handle}").readlink()
    if path.suffix == ".tmp" and _due(path):
        if BLOW["boundary"] == "memory":
            _use_up_memory()
        else:
            # What a blow before or within the write leaves: nothing of the file, or half of it.
            os.truncate(path, 0 if BLOW["boundary"] == "before write" else path.stat().st_size // 2)
            _die()
    _fsync(handle)


def _spared() -> bool:
    """Once a file is named, all but the first are. Without one: nobody."""
    if once := BLOW.get("once"):
        try:
            os.close(os.open(once, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return True
    return False


def _use_up_memory() -> None:
    if not _spared():
        bytearray(1 << 60)


def _watched_dup(handle: int) -> int:
    global _answers  # noqa: PLW0603
    made = _dup(handle)
    if handle == 1:
        _answers = made
    return made


def _waits_for_a_disk_that_is_gone() -> None:
    time.sleep(3600)


def _thinks() -> None:
    time.sleep(4)


def _misspeaking_replace(source: Any, target: Any, **rest: Any) -> None:
    _replace(source, target, **rest)
    if _answers >= 0 and _due(Path(target)) and not _spared():
        os.write(_answers, str(BLOW.get("says", "")).encode("latin-1"))
        if BLOW["then"] == "ends":
            os._exit(0)
        elif BLOW["then"] == "is stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif BLOW["then"] == "hangs":
            _waits_for_a_disk_that_is_gone()
        elif BLOW["then"] == "thinks":
            _thinks()


def _struck_replace(source: Any, target: Any, **rest: Any) -> None:
    due = _due(Path(target))
    if due and BLOW["boundary"] == "before rename":
        _die()
    _replace(source, target, **rest)
    if due:
        _die()


if BLOW.get("boundary") in ("before write", "mid-write", "memory"):
    os.fsync = _struck_fsync  # type: ignore[assignment]
elif BLOW.get("boundary") in ("before rename", "after rename"):
    os.replace = _struck_replace  # type: ignore[assignment]
elif "then" in BLOW:
    os.dup, os.replace = _watched_dup, _misspeaking_replace  # type: ignore[assignment]
if BLOW.get("locks") == "given to everybody":
    fcntl.flock = lambda handle, how: None
elif BLOW.get("locks") == "not there":

    def _flock(handle: int, how: int) -> NoReturn:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    fcntl.flock = _flock  # type: ignore[assignment]
