"""The tutorials, followed literally: their commands end as they say, and print lines of the shape that they show."""

from __future__ import annotations

import subprocess
import sys

import pytest
from doc_pages import ROOT

pytestmark = pytest.mark.slow


def test_the_tutorials_can_be_followed_and_show_what_comes() -> None:
    command = [sys.executable, str(ROOT / "scripts/docs_outputs.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
