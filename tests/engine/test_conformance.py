"""Every executor and every storage, in one table: the same candidates, rows and ledger, byte for byte.

The index is approximate, so that index plans in rounds, and the corpus is searched in slices; the run that all others
are compared with is inline, on a disk, and searches all of the corpus at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from beir_data import numbered_folder, precomputed_config
from object_server import BUCKET, Bucket
from real_runs import Run

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.config.schema import Config
from negpipe.graph import Shard

pytestmark = pytest.mark.slow

SETTINGS = ("index.kind=IVF2,Flat", "index.shard_size=3000", "index.recall_anchors=20")
COMPARED = ("encode", "index", "search", "triplets")
Content = dict[str, bytes]


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Content]:
    """The run that all are compared with, and its content by name."""
    folder = tmp_path_factory.mktemp("inline")
    run = Run(precomputed_config(folder / "run", numbered_folder(folder / "beir", 160, 80)))
    run.mine(*SETTINGS)
    return run, run.content()


def mine(config: Config) -> None:
    graph.mine(config)


def shards(config: Config) -> None:
    """Two shards of each stage, the second first, as `negpipe work` and `commit` run them."""
    graph.mine(config, only="ingest")
    for stage in list(graph.stages(config))[1:]:
        for number in (1, 0):
            graph.work(config, stage, Shard(number, 2))
        graph.commit(config, stage, shards=2)


EXECUTORS: dict[str, tuple[Callable[[Config], None], dict[str, Any]]] = {
    "inline": (mine, {"kind": "inline"}),
    "local": (mine, {"kind": "local", "workers": 2}),
    "shards": (shards, {"kind": "inline"}),
    "slurm": (mine, {"kind": "slurm", "slurm": {"cluster": "local", "shards": 2}}),
    "ray": (mine, {"kind": "ray", "workers": 2, "ray": {"address": "local", "wait": "5min"}}),
}


def made(folder: Path, name: str, bucket: Bucket) -> Content:
    """What a run has in its manifests' files, on a disk or in the bucket."""
    objects = bucket.objects(name) if not folder.exists() else {}
    read = objects.__getitem__ if objects else lambda path: (folder / path).read_bytes()
    manifests = [json.loads(read(f".negpipe/{stage}/manifest.json")) for stage in ("ingest", *COMPARED)]
    files = [file["path"] for manifest in manifests for part in manifest["parts"] for file in part["files"]]
    return {path: read(path) for path in files}


@pytest.mark.guarantee(
    "tasks run inline, in workers, in shards, on Slurm or on Ray, and parts are on a disk or in a bucket",
    "the same candidates, rows and ledger, byte for byte",
    section="rows",
)
@pytest.mark.parametrize("storage", ["disk", "bucket"])
@pytest.mark.parametrize(
    "executor",
    [
        "inline",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("local", "shards")),
        *(pytest.param(name, marks=[pytest.mark.slow, pytest.mark.cluster]) for name in ("slurm", "ray")),
    ],
)
def test_the_same_bytes_wherever_tasks_run_and_parts_lie(
    inline: tuple[Run, Content], tmp_path: Path, bucket: Bucket, executor: str, storage: str
) -> None:
    if executor == "ray":
        pytest.importorskip("ray")
    run, wanted = inline
    act, settings = EXECUTORS[executor]
    folder = tmp_path / "run"
    config = load_config(
        {
            **run.config,
            "run_dir": f"s3://{BUCKET}/conformance" if storage == "bucket" else str(folder),
            "executor": settings,
            "resources": {"cpus": 2, "memory_budget": "256MiB", "cache": str(tmp_path / "cache")},
        },
        [*SETTINGS, "search.slice_documents=64", f"executor.slurm.folder={tmp_path / 'logs'}"],
    )
    act(config)
    assert made(folder, "conformance", bucket) == wanted
    assert graph.mine(config).ran == ()
