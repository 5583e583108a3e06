"""Working memory: a budget that does not suffice is refused with its number, one that does is kept."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import small_source as small
import yaml

from negpipe import pipeline
from negpipe.config_file import load_config
from negpipe.errors import ConfigError

BUDGET = 256  # MiB


def test_parts_too_large_to_encode_are_refused(tmp_path: Path) -> None:
    small.build(tmp_path)
    for name, rows in (("corpus", small.DOCUMENTS), ("anchors", small.QUERIES)):
        np.lib.format.open_memmap(tmp_path / f"{name}.npy", "w+", np.float16, (rows, 900_000))
    tight = ["data.part_rows=1000", "resources.memory_budget=64MiB"]
    message = r"part of 40 rows takes 344 MiB.*there are 64 a worker: lower data\.part_rows"
    with pytest.raises(ConfigError, match=message):
        pipeline.mine(load_config(small.settings(tmp_path), tight))
    assert not list((tmp_path / "run/encode").glob("*.npy"))


def test_parts_of_long_texts_are_refused_while_they_are_read(tmp_path: Path) -> None:
    small.build(tmp_path)
    rows = [{"_id": f"d{i}", "text": f"{i} " + "a long text " * 5_000} for i in range(200)]
    small.write_rows(tmp_path / "data/corpus.jsonl", rows)
    little = "resources.memory_budget=64MiB"
    message = r"1\d\d rows of corpus, not yet a part, take \d\d MiB, there are 32 .*: lower data.part_rows"
    with pytest.raises(ConfigError, match=message):
        pipeline.mine(load_config(small.settings(tmp_path), [little, "data.part_rows=1000"]), only="ingest")
    pipeline.mine(load_config(small.settings(tmp_path), [little, "data.part_rows=20"]), only="ingest")
    pipeline.mine(load_config(small.settings(tmp_path), ["data.part_rows=1000"]), only="ingest")


def test_candidates_too_many_to_choose_from_are_refused_before_anything_is_encoded(tmp_path: Path) -> None:
    corpus = [{"_id": f"d{i}", "text": f"text {i}"} for i in range(9_000)]
    small.write_rows(tmp_path / "data/corpus.jsonl", corpus)
    small.write_rows(tmp_path / "data/queries.jsonl", small.queries(90))
    small.write_qrels(tmp_path / "data/qrels/train.tsv", [(f"q{i}", f"d{i + k}", 1) for i in range(90) for k in (0, 1)])
    for name, rows in (("corpus", 9_000), ("anchors", 90)):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(rows).normal(size=(rows, 8)).astype(np.float32))
    settings = small.settings(tmp_path)
    deep, little = (
        ["search.depth=50000", "mining.range_max=9", "data.part_rows=16384"],
        "resources.memory_budget=130MiB",
    )
    message = r"choosing from 9000 candidates an anchor takes {} MiB, writing rows \d, there are {} a worker: raise"
    for more, needed, there in (
        ([little], None, None),
        ([little, "mining.margin_reference=each"], 248, 130),
        ([little, "executor.kind=local", "executor.workers=2"], 124, 65),
    ):
        config = load_config(settings, [*deep, *more, f"run_dir={tmp_path}/run-{len(more)}-{needed}"])
        if needed:
            with pytest.raises(ConfigError, match=message.format(needed, there)):
                pipeline.mine(config)
            assert not (config.run_dir / "encode").exists()
        else:
            pipeline.mine(config)


@pytest.mark.torture
def test_every_stage_keeps_its_budget(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """270 MB of texts and 180 MB of vectors: no stage could hold either."""
    if not request.config.getoption("--torture"):
        pytest.skip("takes long: make torture")
    least, most = (peaks(tmp_path / name, rows) for name, rows in (("small", 500), ("large", 180_000)))
    over = {stage: most[stage] - least[stage] for stage in most}
    assert all(megabytes <= BUDGET for megabytes in over.values()), over


def peaks(folder: Path, documents: int) -> dict[str, float]:
    """Greatest anonymous memory of each command in MiB: mapped files are the kernel's to take back."""
    text = "a text as long as a passage of an encyclopaedia or a manual is " * 24
    small.write_rows(folder / "data/corpus.jsonl", ({"_id": f"d{i}", "text": f"{i} {text}"} for i in range(documents)))
    small.write_rows(folder / "data/queries.jsonl", small.queries(documents // 20))
    small.write_qrels(folder / "data/qrels/train.tsv", [(f"q{i}", f"d{i}", 1) for i in range(documents // 20)])
    for name, rows in (("corpus", documents), ("anchors", documents // 20)):
        np.save(folder / f"{name}.npy", np.random.default_rng(rows).normal(size=(rows, 256)).astype(np.float32))
    settings = small.settings(folder)
    settings["data"] |= {"part_rows": 4096, "text": "{text}"}
    settings["encoder"]["storage"] = "float32"
    settings["resources"] = {"memory_budget": f"{BUDGET}MiB", "cpus": 2}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    found = {}
    exported = ["export", "--to", "flagembedding", "--out", str(folder / "out.jsonl")]
    for command in (["ingest"], ["encode"], ["index"], ["search"], ["triplets"], exported):
        process = subprocess.Popen(
            [sys.executable, "-m", "negpipe", command[0], str(folder / "config.yaml"), *command[1:]]
        )
        most = 0
        while process.poll() is None:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            most = max([most, *(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))])
            time.sleep(0.002)
        assert process.returncode == 0
        found[command[0]] = most / 1024
    return found
