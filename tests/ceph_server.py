"""The object gateway of a real Ceph of one box, behind the same proxy as moto's server, which passes all on at once."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import pytest
from object_server import CREDENTIALS, Bucket, proxied

PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
PATIENCE = 60.0


@contextmanager
def served(folder: Path) -> Iterator[Bucket]:
    """A new Ceph with an empty bucket, in this folder; skips without its programs."""
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        pytest.skip(f"no {', '.join(missing)} (.ci/ceph installs Debian's)")
    fsid, disk, monitor, gateway = str(uuid.uuid4()), str(uuid.uuid4()), _free_port(), _free_port()
    settings = (Path(__file__).parent / "ceph.conf").read_text(encoding="utf-8")
    for name, value in {"fsid": fsid, "folder": folder, "monitor": monitor, "gateway": gateway}.items():
        settings = settings.replace(f"{{{name}}}", str(value))
    (folder / "ceph.conf").write_text(settings, encoding="utf-8")
    environment = os.environ | {"CEPH_CONF": str(folder / "ceph.conf")}

    def run(*command: str) -> None:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        assert done.returncode == 0, (command, done.stderr)

    @contextmanager
    def running(*command: str) -> Iterator[None]:
        with (folder / f"{command[0]}.out").open("wb") as out:
            daemon = subprocess.Popen([*command, "-f"], cwd=folder, env=environment, stdout=out, stderr=out)
        try:
            yield
        finally:
            daemon.kill()  # nothing of it is needed again
            daemon.wait(PATIENCE)

    with ExitStack() as daemons:
        run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{monitor}]", "monmap")
        run("ceph-mon", "-i", "a", "--mkfs", "--monmap", "monmap")
        daemons.enter_context(running("ceph-mon", "-i", "a"))
        run("ceph", "osd", "create", disk)
        (folder / "osd").mkdir()
        run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
        daemons.enter_context(running("ceph-osd", "-i", "0"))
        keys = ("--access-key", CREDENTIALS["AWS_ACCESS_KEY_ID"], "--secret-key", CREDENTIALS["AWS_SECRET_ACCESS_KEY"])
        run("radosgw-admin", "user", "create", "--uid", "test", "--display-name", "test", *keys)
        daemons.enter_context(running("radosgw", "-n", "client.gateway"))
        deadline = time.monotonic() + PATIENCE
        while not _listening(gateway):
            assert time.monotonic() < deadline, (folder / "client.gateway.log").read_text(encoding="utf-8")
            time.sleep(0.1)
        yield daemons.enter_context(proxied(gateway, nullcontext()))


def _listening(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
