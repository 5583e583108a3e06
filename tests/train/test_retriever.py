"""Losses, prompts and lengths against torch by hand; what a crash, a NaN or a bad row does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_model import build_tiny_model

from negpipe.config.file import load_config
from negpipe.config.schema import Config
from negpipe.encoders import has_units, resolve_model
from negpipe.encoders.backends import class_and_pooling
from negpipe.engine import processor
from negpipe.engine.fingerprint import DigestCache
from negpipe.errors import ConfigError, InputError, TaskFailedError
from negpipe.train import retriever
from negpipe.train.trainer import Trained

pytestmark = pytest.mark.slow

ROWS, NEGATIVES = 4, 2
LOSSES = (
    "MultipleNegativesRankingLoss",
    "CachedMultipleNegativesRankingLoss",
    "CachedGISTEmbedLoss",
    "MarginMSELoss",
    "DistillKLDivLoss",
)


def config_of(model: Path, form: str, **train: Any) -> Config:
    return load_config(
        {
            "run_dir": "unused",
            "data": {"path": "unused"},
            "encoder": {
                "backend": "sentence-transformers",
                "model": str(model),
                "query_instruction": "list: ",
                "query_max_length": 12,
                "passage_max_length": 20,
                "device": "cpu",
            },
            "mining": {"num_negatives": NEGATIVES},
            "output": {"format": form},
            "train": {"steps": 1, "batch_size": ROWS, "warmup": 0, **train},
        }
    )


def texts(side: str, count: int = ROWS) -> list[str]:
    """Longer than the model is let read, and no two alike."""
    return [f"{side} {number} " + " ".join([side[number % len(side)]] * 30) for number in range(count)]


def write_rows(folder: Path, form: str, count: int = ROWS) -> tuple[Path, np.ndarray[Any, Any]]:
    """Rows of a format, and their scores (n, 1 + negatives)."""
    draw = np.random.default_rng(0)
    width = NEGATIVES if form == "n-tuple" else 1
    scores = draw.normal(size=(count, 1 + width)).astype(np.float32)
    columns: dict[str, Any] = {"anchor": texts("anchor", count), "positive": texts("positive", count)}
    if form == "n-tuple":
        columns |= {f"negative_{k}": texts(f"wrong{k}", count) for k in range(1, width + 1)}
        columns["scores"] = scores.tolist()
    else:
        columns |= {"negative": texts("wrong", count)}
        columns |= {"positive_score": scores[:, 0], "negative_score": scores[:, 1]}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return path, scores


def train(config: Config, folder: Path, rows: Path, progress: Any = lambda *_: None) -> Trained:
    path = resolve_model(config.encoder, DigestCache(folder / "digests.json")).path
    return retriever.train(config, [rows], path, path, folder, threads=1, progress=progress)


def weights(trained: Trained) -> bytes:
    return (trained.folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("form", ["triplet", "n-tuple"])
@pytest.mark.parametrize("loss", LOSSES)
def test_first_loss_is_the_one_computed_by_hand(loss: str, form: str, still: Path, tmp_path: Path) -> None:
    """Of the whole batch, so of the very texts as the encoder's settings cut and prompt them."""
    import torch
    from sentence_transformers import SentenceTransformer

    config = config_of(still, form, loss=loss, mini_batch_size=3)
    rows, scores = write_rows(tmp_path, form)
    trained = train(config, tmp_path, rows)
    model = SentenceTransformer(str(still))

    def vectors(side: list[str], length: int, prompt: str) -> torch.Tensor:
        model.max_seq_length = length
        return torch.tensor(model.encode(side, prompt=prompt, normalize_embeddings=True), dtype=torch.float64)

    table = pq.read_table(rows)
    names = [name for name in table.column_names if name in ("positive", "negative") or name.startswith("negative_")]
    documents = [vectors(table[n].to_pylist(), 20, "") for n in names if not n.endswith("score")]
    anchors = vectors(table["anchor"].to_pylist(), 12, "list: ")
    own = torch.stack([(anchors * side).sum(dim=1) for side in documents], dim=1)
    teacher = torch.tensor(scores, dtype=torch.float64)
    if loss == "MarginMSELoss":
        expected = (((own[:, :1] - own[:, 1:]) - (teacher[:, :1] - teacher[:, 1:])) ** 2).mean()
    elif loss == "DistillKLDivLoss":
        target = teacher.softmax(dim=1)
        expected = (target * (target.log() - own.log_softmax(dim=1))).sum(dim=1).mean()
    else:
        logits = anchors @ torch.cat(documents).T
        scaled = 20 * logits
        if loss == "CachedGISTEmbedLoss":
            # The guide is the model itself: what it holds for closer than the positive does not count.
            scaled = torch.cat([scaled / 20, anchors @ anchors.T, documents[0] @ documents[0].T], dim=1)
            closer = scaled > own[:, :1]
            closer[:, :ROWS] &= ~torch.eye(ROWS, dtype=torch.bool)
            blocks = scaled.masked_fill(closer, -torch.inf) / 0.01
            expected = torch.nn.functional.cross_entropy(blocks, torch.arange(ROWS))
        else:
            expected = torch.nn.functional.cross_entropy(scaled, torch.arange(ROWS))
    assert trained.log["loss"].to_pylist() == [pytest.approx(float(expected), rel=1e-4)]
    again = SentenceTransformer(str(trained.folder))
    assert again.get_embedding_dimension() == trained.width == 32
    assert again.prompts["query"] == "list: "
    assert weights(trained) != (still / "model.safetensors").read_bytes()


def test_matryoshka_adds_the_loss_of_every_width(still: Path, tmp_path: Path) -> None:
    import torch
    from sentence_transformers import SentenceTransformer

    config = config_of(still, "triplet", matryoshka=[8])
    rows, _ = write_rows(tmp_path, "triplet")
    trained, model, table = train(config, tmp_path, rows), SentenceTransformer(str(still)), pq.read_table(rows)
    total = 0.0
    for width in (32, 8):
        sides = []
        for name in ("anchor", "positive", "negative"):
            model.max_seq_length = 12 if name == "anchor" else 20
            prompt = "list: " if name == "anchor" else ""
            raw = torch.tensor(model.encode(table[name].to_pylist(), prompt=prompt))[:, :width]
            sides.append(torch.nn.functional.normalize(raw))
        logits = 20 * sides[0] @ torch.cat(sides[1:]).T
        total += float(torch.nn.functional.cross_entropy(logits, torch.arange(ROWS)))
    assert trained.log["loss"][0].as_py() == pytest.approx(total, rel=1e-4)
    with pytest.raises(ConfigError, match=r"train\.matryoshka"):
        train(config_of(still, "triplet", matryoshka=[64]), tmp_path / "wide", rows)


@pytest.mark.skipif(not has_units("bfloat16", "cpu"), reason="this processor has no units for bfloat16")
def test_bfloat16_is_close(still: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    rows, _ = write_rows(tmp_path, "triplet")
    losses = []
    for precision in ("float32", "bfloat16"):
        (tmp_path / precision).mkdir()
        trained = train(config_of(still, "triplet", precision=precision), tmp_path / precision, rows)
        losses.append(trained.log["loss"][0].as_py())
        assert {str(values.dtype) for values in load_file(trained.folder / "model.safetensors").values()} == {"float32"}
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.02)


def test_bfloat16_without_units_for_it_is_refused(still: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "flags", frozenset)
    rows, _ = write_rows(tmp_path, "triplet")
    with pytest.raises(ConfigError, match=r"train\.precision: 'bfloat16' needs a CPU that supports it"):
        train(config_of(still, "triplet", precision="bfloat16"), tmp_path, rows)


def test_a_card_that_the_library_could_not_write_is_an_error(
    still: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It logs what it met, and saves a model without one."""

    def fail(model: Any) -> str:
        raise OSError

    monkeypatch.setattr("sentence_transformers.base.model.generate_model_card", fail)
    rows, _ = write_rows(tmp_path, "triplet")
    with pytest.raises(TaskFailedError, match="the model card was not written"):
        train(config_of(still, "triplet"), tmp_path, rows)


class Crash(BaseException):
    """A process that ends in the middle."""


@pytest.mark.guarantee("training on a CPU is repeatable")
@pytest.mark.parametrize("cut", ["between", "while a checkpoint is written"])
def test_what_a_crash_left_is_gone_on_from_to_the_same_bytes(cut: str, tiny: Path, tmp_path: Path) -> None:
    """With dropout, over the border of an epoch, and with a checkpoint that is not whole."""
    config = config_of(tiny, "triplet", steps=8, checkpoint_steps=2, batch_size=4)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    rows, _ = write_rows(tmp_path, "triplet", 18)
    for folder in (whole, broken):
        folder.mkdir()
    undisturbed = train(config, whole, rows)
    seen = 0

    def progress(_: int, note: str) -> None:
        nonlocal seen
        seen += "loss" in note
        if seen == 7:
            raise Crash

    with pytest.raises(Crash):
        train(config, broken, rows, progress)
    checkpoints = sorted(path.name for path in broken.glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-4", "checkpoint-6"]
    if cut != "between":
        (broken / "checkpoint-6" / "whole").unlink()
        (broken / "checkpoint-6" / "optimizer.pt").write_bytes(b"cut")
    resumed = train(config, broken, rows)
    assert resumed.resumed == (6 if cut == "between" else 4)
    assert weights(resumed) == weights(undisturbed)
    assert resumed.log == undisturbed.log
    assert resumed.log["step"].to_pylist() == list(range(1, 9))


def test_a_seed_decides(tiny: Path, tmp_path: Path) -> None:
    rows, _ = write_rows(tmp_path, "triplet", 18)
    made = []
    for number, seed in enumerate((1, 1, 2)):
        (tmp_path / str(number)).mkdir()
        made.append(weights(train(config_of(tiny, "triplet", steps=2, seed=seed), tmp_path / str(number), rows)))
    assert made[0] == made[1] != made[2]


def test_a_loss_that_is_not_finite_ends_with_its_step_and_the_last_good_checkpoint(tiny: Path, tmp_path: Path) -> None:
    config = config_of(tiny, "triplet", steps=8, checkpoint_steps=1, learning_rate=1e38)
    rows, _ = write_rows(tmp_path, "triplet", 16)
    with pytest.raises(TaskFailedError, match=r"at step \d+ of 8.*train\.learning_rate") as raised:
        train(config, tmp_path, rows)
    left = [path for path in tmp_path.glob("checkpoint-*") if (path / "whole").exists()]
    named = [path for path in left if str(path) in str(raised.value)]
    assert named == [max(left, key=lambda path: int(path.name.rpartition("-")[2]))]


def test_a_row_without_a_score_is_named(still: Path, tmp_path: Path) -> None:
    rows, _ = write_rows(tmp_path, "n-tuple")
    table = pq.read_table(rows)
    scores = table["scores"].to_pylist()
    scores[3][1] = None
    pq.write_table(table.set_column(table.column_names.index("scores"), "scores", [scores]), rows)
    with pytest.raises(InputError) as raised:
        train(config_of(still, "n-tuple", loss="MarginMSELoss"), tmp_path, rows)
    assert (raised.value.file, raised.value.row, raised.value.field) == (str(rows), 3, "scores")
    shutil.rmtree(tmp_path / "again", ignore_errors=True)
    assert train(config_of(still, "n-tuple"), tmp_path, rows).width == 32  # a loss that needs none


def test_flagembedding_s_pooling_is_the_one_that_is_trained(tiny: Path, tmp_path: Path) -> None:
    """A folder without modules, as FlagEmbedding takes it, pooled as the config says: so it is saved, and run after."""
    from sentence_transformers import SentenceTransformer

    bare = tmp_path / "bare"
    shutil.copytree(tiny, bare)
    (bare / "modules.json").unlink()
    shutil.rmtree(bare / "1_Pooling")
    config = config_of(bare, "triplet")
    encoder = config.encoder.model_copy(update={"backend": "flagembedding", "pooling": "cls"})
    rows, _ = write_rows(tmp_path, "triplet")
    trained = train(config.model_copy(update={"encoder": encoder}), tmp_path, rows)
    assert SentenceTransformer(str(trained.folder))[1].get_config_dict()["pooling_mode"] == "cls"
    after = retriever.as_trained(encoder, trained.folder)
    assert class_and_pooling(after, str(trained.folder)) == ("encoder-only-base", "cls")


def test_both_ways_of_a_router_are_trained(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Router, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    models = [build_tiny_model(tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    ways = [[Transformer(str(model)), Pooling(32, "mean")] for model in models]
    base = tmp_path / "routed"
    SentenceTransformer(modules=[Router.for_query_document(*ways)], device="cpu").save_pretrained(str(base))
    rows, _ = write_rows(tmp_path, "triplet")
    trained = train(config_of(base, "triplet"), tmp_path, rows).folder
    weights = [path.relative_to(base) for path in sorted(base.rglob("*.safetensors"))]
    assert len(weights) == 2
    for path in weights:
        assert (trained / path).read_bytes() != (base / path).read_bytes()
