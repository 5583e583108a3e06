"""A real Slurm of one node on this machine."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from real_runs import PATIENCE

CONFIG = Path(__file__).with_name("engine") / "executors" / "slurm.conf"


def installed() -> bool:
    """Whether it could run here."""
    return bool(shutil.which("slurmctld") and shutil.which("slurmd")) and not os.geteuid()


@contextmanager
def started(folder: Path) -> Iterator[Path]:
    """Its configuration, SLURM_CONF, for as long as it runs."""
    file = folder / "slurm.conf"
    control, node = _free_port(), _free_port()
    host = platform.node().partition(".")[0]
    text = CONFIG.read_text(encoding="utf-8").replace("filled in {…}", "")
    for name, value in {"host": host, "folder": folder, "control": control, "node": node}.items():
        text = text.replace(f"{{{name}}}", str(value))
    file.write_text(text, encoding="utf-8")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    environment = os.environ | {"SLURM_CONF": str(file)}
    daemons = []
    try:
        for name in ("slurmctld", "slurmd"):
            with (folder / f"{name}.out").open("wb") as out:
                daemons.append(subprocess.Popen([name, "-D"], env=environment, stdout=out, stderr=out))
        deadline = time.monotonic() + PATIENCE
        while "idle" not in _asked(["sinfo", "--noheader", "--format=%T"], environment):
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text(encoding="utf-8")
            time.sleep(0.5)
        yield file
    finally:
        subprocess.run(["scancel", "--user=root"], env=environment, check=False)
        deadline = time.monotonic() + 20  # a daemon that ends leaves the processes of jobs that have not
        while _asked(["squeue", "--noheader"], environment) and time.monotonic() < deadline:
            time.sleep(0.5)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(PATIENCE)


def _asked(command: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
