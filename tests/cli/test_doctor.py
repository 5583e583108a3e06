"""negpipe doctor: one page for an issue, offline too, and nothing secret in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from negpipe import __version__
from negpipe.review import doctor

pytestmark = pytest.mark.slow  # it loads torch

TOKEN = "hf_abcdefghijklmnopqrst"
ADDRESS = "http://ann:pa55word@127.0.0.1:9/?sig=pa55word"  # nobody listens there


def examine(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "negpipe", "doctor", *options]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=200, env=env)


def test_a_page_without_secrets(tmp_path: Path) -> None:
    secrets = {
        "HF_TOKEN": TOKEN,
        "OPENAI_API_KEY": "pa55word",
        "HF_ENDPOINT": ADDRESS,
        "HTTPS_PROXY": ADDRESS,
        "CUDA_VISIBLE_DEVICES": ADDRESS,
        "SLURM_JOB_ID": "pa55word",
        "HF_HOME": str(tmp_path / TOKEN),
    }
    started = time.monotonic()
    done = examine(**secrets)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 180
    for text in (done.stdout, done.stderr):
        assert TOKEN not in text
        assert "pa55word" not in text
    assert done.stdout.startswith(f"### negpipe {__version__}\n")
    for name in (
        "Python: 3.",
        "faiss: loads",
        "torch: loads",
        "memory: ",
        "cores: ",
        "features: ",
        "GPUs: none visible to torch",
        "here: ",
        "hub cache: ",
        "negpipe's cache: ",
        "hub token: set",
    ):
        assert f"- {name}" in done.stdout
    assert "- hub: http://127.0.0.1:9 does not answer" in done.stdout


def test_offline_and_as_json() -> None:
    done = examine("--format", "json", HF_HUB_OFFLINE="1")
    facts = {fact["name"]: fact["value"] for fact in json.loads(done.stdout)}
    assert facts["hub"] == "not contacted: HF_HUB_OFFLINE is set"
    assert facts["HF_HUB_OFFLINE"] == "1"


def test_what_every_run_needs_is_broken(tmp_path: Path) -> None:
    (tmp_path / "faiss.py").write_text("raise ImportError('libgomp.so.1 is not there')", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = examine(HF_HUB_OFFLINE="1", PYTHONPATH=path)
    assert done.returncode == 1
    assert "faiss: does not load: ImportError: libgomp.so.1 is not there (broken)" in done.stdout
    assert "Reinstall faiss" in done.stderr


def test_a_line_that_is_broken_says_what_to_do() -> None:
    facts = [
        doctor.Fact("Machine", "cores", "2"),
        doctor.Fact("Libraries", "missing", "numpy", "Run pip install numpy"),
    ]
    assert doctor.broken(facts) == ["missing: numpy. Run pip install numpy"]
    assert "- missing: numpy (broken)" in doctor.page(facts)


def test_long_lists_are_broken_into_lines() -> None:
    versions = [f"library-{number} 1.{number}.0" for number in range(20)]
    lines = doctor.page([doctor.Fact("Libraries", "required", ", ".join(versions))]).splitlines()
    listed = lines[lines.index("**Libraries**") + 2 :]
    assert len(listed) > 1 and max(map(len, listed)) <= 120
    assert " ".join(line.strip() for line in listed) == f"- required: {', '.join(versions)}"
