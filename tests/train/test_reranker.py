"""Losses of rerankers against torch by hand; what they start from, and what a crash or a bad row does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from negpipe.config.file import load_config
from negpipe.config.schema import Config
from negpipe.config.training import TAKES
from negpipe.errors import InputError, TaskFailedError
from negpipe.train import reranker
from negpipe.train.trainer import Trained

pytestmark = pytest.mark.slow

ROWS, NEGATIVES, LENGTHS = 4, 2, (12, 20)
FORMS = [(loss, form) for loss, forms in TAKES["reranker"].items() for form in forms]


def config_of(model: Path, form: str, **train: Any) -> Config:
    return load_config(
        {
            "run_dir": "unused",
            "data": {"path": "unused"},
            "encoder": {
                "backend": "sentence-transformers",
                "model": str(model),
                "query_instruction": "list: ",
                "query_max_length": LENGTHS[0],
                "passage_max_length": LENGTHS[1],
                "device": "cpu",
            },
            "mining": {"num_negatives": NEGATIVES},
            "output": {"format": form},
            "train": {"kind": "reranker", "steps": 1, "batch_size": ROWS, "warmup": 0, **train},
        }
    )


def write_rows(folder: Path, form: str, count: int = ROWS) -> Path:
    """Rows of a format, whose texts are longer than the model is let read, and no two alike."""
    folder.mkdir(parents=True, exist_ok=True)
    anchors, positives, *wrong = (
        [f"{side} {number} " + " ".join([side[number % len(side)]] * length) for number in range(count)]
        for side, length in (("anchor", 5), ("positive", 40), ("first", 40), ("second", 9))
    )
    scores = np.random.default_rng(0).normal(size=(count, 1 + NEGATIVES)).astype(np.float32)
    columns: dict[str, Any] = {"anchor": anchors, "positive": positives}
    if form == "triplet":
        columns |= {"negative": wrong[0], "positive_score": scores[:, 0], "negative_score": scores[:, 1]}
    elif form == "n-tuple":
        columns |= {"negative_1": wrong[0], "negative_2": wrong[1], "scores": scores.tolist()}
    elif form == "labeled-list":
        lists = [list(documents) for documents in zip(positives, *wrong, strict=True)]
        lists[1:2] = [documents[:2] for documents in lists[1:2]]  # a shorter one
        columns |= {"positive": lists, "labels": [[1] + [0] * (len(documents) - 1) for documents in lists]}
    else:
        sides = [positives, *wrong]
        documents = [sides[number % 3][number] for number in range(count)]
        columns |= {"positive": documents, "label": [int(number % 3 == 0) for number in range(count)]}
    path = folder / "rows.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return path


def train(config: Config, folder: Path, rows: Path, progress: Any = lambda *_: None) -> Trained:
    folder.mkdir(parents=True, exist_ok=True)
    return reranker.train(config, [rows], str(config.encoder.model), folder, threads=1, progress=progress)


def weights(trained: Trained) -> bytes:
    return (trained.folder / "model.safetensors").read_bytes()


def logits(model: Any, folder: Path, anchors: list[str], documents: list[str]) -> Any:
    """By transformers alone, a pair at a time."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return torch.stack(
            [
                model(**tokenizer(*pair, truncation=True, max_length=sum(LENGTHS), return_tensors="pt")).logits[0, 0]
                for pair in zip(anchors, documents, strict=True)
            ]
        ).double()


def with_head(folder: Path) -> Any:
    """The model with the head that the default seed gives it."""
    from transformers import AutoModelForSequenceClassification, set_seed

    set_seed(42)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()


@pytest.mark.parametrize(("loss", "form"), FORMS)
def test_first_loss_is_the_one_computed_by_hand(loss: str, form: str, still: Path, tmp_path: Path) -> None:
    import torch

    rows = write_rows(tmp_path, form)
    trained = train(config_of(still, form, loss=loss, mini_batch_size=3), tmp_path, rows)
    table, model = pq.read_table(rows).to_pydict(), with_head(still)
    if form == "labeled-pair":
        own = logits(model, still, table["anchor"], table["positive"])
        target = torch.tensor(table["label"], dtype=torch.float64)
        expected = torch.nn.functional.binary_cross_entropy_with_logits(own, target)
    elif form == "labeled-list":
        each = []
        for anchor, documents, labels in zip(table["anchor"], table["positive"], table["labels"], strict=True):
            own = logits(model, still, [anchor] * len(documents), documents)
            if loss == "ListNetLoss":
                each.append(-(torch.tensor(labels).double().softmax(0) * own.log_softmax(0)).sum())
            else:
                # Of one positive and its negatives: NDCGLoss2++ of Wang et al. 2018, with mu = 10.
                rank = own.argsort(descending=True).argsort() + 1
                each += [_weighted(own, rank, other) for other in range(1, len(documents))]
        expected = torch.stack(each).mean()
    else:
        names = ["negative"] if form == "triplet" else ["negative_1", "negative_2"]
        positive, *wrong = (logits(model, still, table["anchor"], table[name]) for name in ("positive", *names))
        scores = table.get("scores") or list(zip(table["positive_score"], table["negative_score"], strict=True))
        teacher = torch.tensor(scores, dtype=torch.float64)
        margins = positive[:, None] - torch.stack(wrong, dim=1)
        expected = ((margins - (teacher[:, :1] - teacher[:, 1:])) ** 2).mean()
    assert trained.log["loss"].to_pylist() == [pytest.approx(float(expected), rel=1e-4)]
    assert trained.width == 1


def _weighted(own: Any, rank: Any, other: int) -> Any:
    import torch

    def discount(place: Any) -> Any:
        return 1 / torch.log2(1 + place.double())

    apart = (rank[0] - rank[other]).abs()
    weight = 10 * (discount(apart) - discount(apart + 1)).abs() + (discount(rank[0]) - discount(rank[other])).abs()
    return -weight * torch.nn.functional.logsigmoid(own[0] - own[other]) / np.log(2)


def test_what_is_saved_scores_as_it_did(still: Path, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder
    from transformers import AutoModelForSequenceClassification

    rows = write_rows(tmp_path, "labeled-list")
    trained = train(config_of(still, "labeled-list", learning_rate=0.01), tmp_path, rows)
    anchors, documents = ["an anchor", "another " * 30], ["a document " * 30, "of few words"]
    config = config_of(still, "labeled-list")
    ours = reranker.score(reranker.load(config.encoder, str(trained.folder), 1), anchors, documents, 1)
    model = AutoModelForSequenceClassification.from_pretrained(trained.folder).eval()
    assert ours == pytest.approx(logits(model, trained.folder, anchors, documents).numpy(), abs=1e-5)
    theirs = CrossEncoder(str(trained.folder), local_files_only=True)
    assert theirs.max_seq_length == sum(LENGTHS)
    assert theirs.predict(list(zip(anchors, documents, strict=True))) == pytest.approx(
        1 / (1 + np.exp(-ours)), abs=1e-5
    )
    assert not np.allclose(ours, logits(with_head(still), still, anchors, documents).numpy())


def test_a_base_that_is_a_cross_encoder_keeps_its_head(still: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base = tmp_path / "base"
    model = with_head(still)
    model.classifier.weight.data.fill_(0.5)
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(still).save_pretrained(base)
    rows = write_rows(tmp_path, "labeled-pair")
    config = config_of(base, "labeled-pair", loss="BinaryCrossEntropyLoss", learning_rate=1e-30)
    trained = train(config, tmp_path, rows)
    scored = reranker.score(reranker.load(config.encoder, str(trained.folder), 1), ["a"], ["b"], 1)
    assert scored == pytest.approx(logits(model, base, ["a"], ["b"]).numpy(), abs=1e-5)


class Crash(BaseException):
    """A process that ends in the middle."""


def test_what_a_crash_left_is_gone_on_from_to_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    """With dropout, over the border of an epoch."""
    config = config_of(tiny, "labeled-list", steps=8, checkpoint_steps=2, batch_size=4)
    rows = write_rows(tmp_path, "labeled-list", 18)
    undisturbed = train(config, tmp_path / "whole", rows)
    seen = 0

    def progress(_: int, note: str) -> None:
        nonlocal seen
        seen += "loss" in note
        if seen == 7:
            raise Crash

    with pytest.raises(Crash):
        train(config, tmp_path / "broken", rows, progress)
    resumed = train(config, tmp_path / "broken", rows)
    assert resumed.resumed == 6
    assert weights(resumed) == weights(undisturbed) and resumed.log == undisturbed.log


def test_a_seed_decides(tiny: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path, "labeled-list", 8)
    made = [
        weights(train(config_of(tiny, "labeled-list", steps=2, seed=seed), tmp_path / str(number), rows))
        for number, seed in enumerate((1, 1, 2))
    ]
    assert made[0] == made[1] != made[2]


def test_a_loss_that_is_not_finite_ends_with_its_step(tiny: Path, tmp_path: Path) -> None:
    config = config_of(tiny, "labeled-list", steps=8, checkpoint_steps=1, learning_rate=1e38)
    with pytest.raises(TaskFailedError, match=r"is nan at step [23] of 8; the last good checkpoint is .*checkpoint-"):
        train(config, tmp_path, write_rows(tmp_path, "labeled-list", 18))


def test_a_row_without_a_score_is_named(still: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path, "n-tuple")
    table = pq.read_table(path)
    scores = table["scores"].to_pylist()
    scores[3][1] = None
    pq.write_table(table.set_column(table.column_names.index("scores"), "scores", [scores]), path)
    with pytest.raises(InputError) as raised:
        train(config_of(still, "n-tuple", loss="MarginMSELoss"), tmp_path, path)
    assert (raised.value.file, raised.value.row, raised.value.field) == (str(path), 3, "scores")


def test_a_folder_that_is_no_model_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="does not load"):
        train(config_of(tmp_path, "labeled-list"), tmp_path / "made", write_rows(tmp_path, "labeled-list"))
