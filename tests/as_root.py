"""Tests that need root: as it where it is there, else in a namespace of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

PRIVILEGED = os.geteuid() == 0
needs_root = pytest.mark.skipif(not PRIVILEGED, reason="runs in a namespace of its own: test_as_root_of_a_namespace")
needs_a_namespace = pytest.mark.skipif(PRIVILEGED or not shutil.which("unshare"), reason="the tests run as they are")


def run_in_a_namespace(file: str) -> None:
    """A file's tests that need root."""
    command = ["unshare", "--map-root-user", "--mount", sys.executable, "-m", "pytest", "-q", "-n", "0", file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unshare failed" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stdout
