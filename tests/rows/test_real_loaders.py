"""Exports through the code of the trainers themselves, where it is installed: docs/decisions.md says how."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import small_source as small
from datasets import load_dataset
from real_runs import Run

from negpipe.config.file import load_config
from negpipe.review import finished
from negpipe.rows import exports

pytestmark = pytest.mark.slow

NEGATIVES = 3


@pytest.fixture(scope="module")
def mined(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("loaders")
    small.build(folder)
    tree = small.settings(folder)
    tree["mining"]["num_negatives"] = NEGATIVES
    run = Run(tree)
    run.mine()
    return run


@pytest.fixture(scope="module")
def expected(mined: Run) -> dict[str, tuple[str, set[str]]]:
    """Query → its positive and its negatives, in the rows."""
    found: dict[str, tuple[str, set[str]]] = {}
    for row in pq.read_table(mined.folder / "triplets").to_pylist():
        found.setdefault(row["anchor"], (row["positive"], set()))[1].add(row["negative"])
    assert len(found) == small.QUERIES
    return found


def exported(run: Run, to: str, out: Path) -> Path:
    finished.export(load_config(run.config), exports.ExportOptions(to=to, out=out))
    return out


def in_lower_case(rows: dict[str, tuple[str, set[str]]]) -> list[list[Any]]:
    return sorted([query, positive, sorted(negatives)] for query, (positive, negatives) in lowered(rows))


def lowered(rows: dict[str, tuple[str, set[str]]]) -> Any:
    return ((query.lower(), (one.lower(), {text.lower() for text in some})) for query, (one, some) in rows.items())


# --- PyLate ---------------------------------------------------------------------------------------------


def test_pylate_makes_batches(
    mined: Run, expected: dict[str, tuple[str, set[str]]], tiny: Path, tmp_path: Path
) -> None:
    utils = pytest.importorskip("pylate.utils")
    from transformers import AutoTokenizer

    out = str(exported(mined, "pylate", tmp_path / "out"))
    train, queries, documents = (
        load_dataset(out, name, split="train", cache_dir=str(tmp_path)) for name in ("train", "queries", "documents")
    )
    train.set_transform(utils.KDProcessing(queries=queries, documents=documents).transform)
    rows = train[:]
    read = {query: (own[0], {*own[1:]}) for query, own in zip(rows["query"], rows["documents"], strict=True)}
    assert read == expected
    tokenizer = AutoTokenizer.from_pretrained(tiny)

    def tokenize(texts: list[str], **_: Any) -> Any:
        return tokenizer(texts, padding=True, return_tensors="pt")

    batch = utils.ColBERTCollator(tokenize)([train[at] for at in range(4)])
    assert batch["label"].shape == (4, 1 + NEGATIVES)
    assert batch["query_input_ids"].shape[0] == 4
    assert batch["documents_input_ids"].shape[0] == 4 * (1 + NEGATIVES)


# --- Tevatron -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["tevatron", "tevatron-passages"])
def test_tevatron_3_makes_groups(
    to: str, mined: Run, expected: dict[str, tuple[str, set[str]]], tmp_path: Path
) -> None:
    dataset = pytest.importorskip("tevatron.retriever.dataset")
    from tevatron.retriever.arguments import DataArguments  # type: ignore[import-not-found] # rarely installed

    out = str(exported(mined, to, tmp_path / "out"))
    named = {"dataset_config": "train", "corpus_name": out, "corpus_config": "corpus"} if to == "tevatron" else {}
    arguments = DataArguments(
        dataset_name=out, dataset_cache_dir=str(tmp_path), train_group_size=1 + NEGATIVES, **named
    )
    trainer = SimpleNamespace(state=SimpleNamespace(epoch=0), args=SimpleNamespace(seed=1))
    read = {}
    for (query, *_), passages in map(dataset.TrainDataset(arguments, trainer).__getitem__, range(len(expected))):
        # The empty title of a passage leaves a blank before its text.
        positive, *negatives = (text.strip() for text, *_ in passages)
        read[query] = positive, {*negatives}
    assert read == expected


def test_tevatron_of_the_package_index_tokenizes(
    mined: Run, expected: dict[str, tuple[str, set[str]]], tiny: Path, tmp_path: Path
) -> None:
    preprocessor = pytest.importorskip("tevatron.datasets.preprocessor")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    process = preprocessor.TrainPreProcessor(tokenizer)
    lines = (exported(mined, "tevatron-passages", tmp_path / "out") / "train.jsonl").read_text("utf-8").splitlines()
    read = {}
    for row in map(process, map(json.loads, lines)):
        (positive,) = map(tokenizer.decode, row["positives"])
        read[tokenizer.decode(row["query"])] = positive, {tokenizer.decode(one) for one in row["negatives"]}
    assert in_lower_case(read) == in_lower_case(expected)


# --- NeMo Automodel -------------------------------------------------------------------------------------


def test_nemo_makes_batches(mined: Run, expected: dict[str, tuple[str, set[str]]], tiny: Path, tmp_path: Path) -> None:
    module = "nemo_automodel.components.datasets.llm.retrieval"
    loader, collators = (pytest.importorskip(f"{module}_{name}") for name in ("dataset", "collator"))
    from transformers import AutoTokenizer

    file = str(exported(mined, "nemo", tmp_path / "out") / "train.json")
    dataset = loader.make_retrieval_dataset([file], n_passages=1 + NEGATIVES)
    rows = dataset[:]
    read = {
        question: (positive, {*negatives})
        for question, (positive, *negatives) in zip(rows["question"], rows["doc_text"], strict=True)
    }
    assert read == expected
    batch = collators.BiEncoderCollator(AutoTokenizer.from_pretrained(tiny))([dataset[at] for at in range(4)])
    assert (len(batch["q_input_ids"]), len(batch["d_input_ids"])) == (4, 4 * (1 + NEGATIVES))


# --- ms-swift -------------------------------------------------------------------------------------------

SWIFT = """
import json, sys
from swift.dataset import load_dataset
from swift.model import get_processor
from swift.template import get_template

file, model, task = sys.argv[1:]
data, _ = load_dataset([file])
processor = get_processor(model, model_type="modern_bert", task_type=task)
template = get_template(processor, template_type="bert")
template.set_mode("train")
encoded = [template.encode(row) for row in data]
rows = []
for one in encoded:
    embedded = task == "embedding"
    texts = one["input_ids"] if not embedded else [
        one["anchor_input_ids"], one["positive_input_ids"], *one["negative_input_ids"]
    ]
    cut = [[part.strip() for part in processor.decode(text).split("[CLS]")[1].split("[SEP]")] for text in texts]
    queries = [cut[0][0]] if embedded else [both[0] for both in cut]
    documents = [text[0] for text in cut[1:]] if embedded else [both[1] for both in cut]
    assert len(set(queries)) == 1
    rows.append([queries[0], documents[0], sorted(documents[1:])])
batch = template.data_collator(encoded)
print(json.dumps({"rows": sorted(rows), "labels": batch["labels"].tolist(), "texts": len(batch["input_ids"])}))
"""


@pytest.mark.parametrize(("to", "task"), [("ms-swift", "embedding"), ("ms-swift-reranker", "reranker")])
def test_swift_encodes_and_collates(
    to: str, task: str, mined: Run, expected: dict[str, tuple[str, set[str]]], tiny: Path, tmp_path: Path
) -> None:
    """In a process of its own: it changes much in the one it is imported into, and forks."""
    pytest.importorskip("swift", reason="ms-swift is not installed")
    file = exported(mined, to, tmp_path / "out") / "train.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", SWIFT, str(file), str(tiny), task],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["rows"] == in_lower_case(expected)
    group = [1, *[0] * NEGATIVES]
    assert found["labels"] == group * len(expected)
    assert found["texts"] == len(expected) * (1 + NEGATIVES + (task == "embedding"))
