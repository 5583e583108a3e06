"""A model that is judged on anchors that `train.split` holds out; and what its card states."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import learnable
import pyarrow.parquet as pq
import pytest
from huggingface_hub import ModelCard
from real_runs import Run

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.engine.manifest import Manifest
from negpipe.errors import InputError
from negpipe.train import card
from negpipe.train.comparison import METRICS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def halved(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trained for two steps on a part of the split train, judged on the rest; the base has a card of its own."""
    folder = tmp_path_factory.mktemp("halved")
    base = shutil.copytree(tiny, folder / "base")
    (base / "README.md").write_text("---\nlicense: mit\n---\n# Base\n", encoding="utf-8")
    settings = learnable.settings(folder / "run", learnable.build(folder / "beir"), base)
    settings["train"] |= {"split": {"test": 0.3}}
    run = Run(settings)
    with learnable.training_here():
        graph.train(load_config(run.config))
    return run


@pytest.fixture
def changed(halved: Run, tmp_path: Path) -> Iterator[Run]:
    with learnable.training_here():
        yield halved.copied(tmp_path / "run")


def queries(run: Run, side: str) -> list[str]:
    ids: list[str] = pq.read_table(run.folder / f"split/{side}.parquet")["query-id"].to_pylist()
    return ids


def card_of(run: Run) -> Any:
    return ModelCard.load(run.folder / "model/README.md")


def test_mined_from_one_side_and_judged_on_the_other(halved: Run) -> None:
    train, test = queries(halved, "train"), queries(halved, "test")
    assert sorted(train + test) == sorted(f"q{i}" for i in range(learnable.TRAINED)) and 5 < len(test) < 20
    (evaluation,) = halved.parts("train", "evaluation")
    (scores,) = (file["path"] for file in evaluation["files"] if file["role"] == "scores")
    assert pq.read_table(halved.folder / scores)["anchor_id"].to_pylist() == test
    ledgers = [pq.read_table(halved.folder / path) for path in halved.paths("triplets", "ledger")]
    assert [anchor for table in ledgers for anchor in table["anchor_id"].to_pylist()] == train
    texts = {row["id"]: row["text"] for row in halved.tables("anchors").to_pylist()}
    mined = {text for path in halved.files("triplets") for text in pq.read_table(path)["anchor"].to_pylist()}
    assert mined <= {texts[name] for name in train}
    shared = halved.manifest("train")["stats"]["overlap"]
    assert shared == {
        "anchors": len(test),
        "anchors_trained_on": 0,
        "positives": len(test),
        "positives_trained_on": 0,
    }
    assert {state.state for state in halved.states().values()} == {"current"}


def test_the_card_says_what_it_was_judged_on_and_whose_licence_it_has(halved: Run) -> None:
    found = card_of(halved)
    assert found.data.license == "mit"
    assert {one.dataset_name for one in found.data.eval_results} == {"held-out: the test side of train.split"}
    assert f"On {len(queries(halved, 'test'))} queries of the test side of train.split" in str(found)


def test_another_licence_trains_no_other_model(changed: Run) -> None:
    before = changed.parts("train", "model")
    assert graph.train(load_config(changed.config, ["train.license=apache-2.0"])).ran == ("train",)
    assert changed.parts("train", "model") == before
    assert card_of(changed).data.license == "apache-2.0"


def test_another_division_mines_and_trains_again(changed: Run) -> None:
    before = {part["key"] for part in changed.parts("encode") if part["kind"] == "corpus"}
    made = graph.train(load_config(changed.config, ["train.split.seed=1"]))
    assert made.ran[:3] == ("ingest", "held_out", "encode") and made.ran[-1] == "train"
    assert {part["key"] for part in changed.parts("encode") if part["kind"] == "corpus"} == before


def test_one_anchor_is_nothing_to_compare(halved: Run, tmp_path: Path) -> None:
    for seed in range(40):
        config = load_config(halved.at(tmp_path / "run").config, ["train.split.test=0.04", f"train.split.seed={seed}"])
        try:
            stats = graph.mine(config, only="ingest").stats["ingest"]
        except InputError:
            continue  # not even one
        if stats["test_anchors"] == 1:
            break
    with pytest.raises(InputError, match="a comparison needs two") as raised:
        graph.train(config)
    assert raised.value.field == "train.split" and raised.value.remedy == "Raise train.split.test"
    assert not (tmp_path / "run/encode").exists()


def test_licences_and_datasets_are_stated_where_they_are_known(halved: Run, tmp_path: Path) -> None:
    library, base = tmp_path / "library.md", tmp_path / "base.md"
    library.write_text("---\ntags: [dense]\n---\n# A model\n", encoding="utf-8")
    stats = halved.manifest("train")["stats"]
    rows = Manifest(stage="triplets", version=1, key="", settings={}, inputs={}, parts=(), stats={"rows": 5})
    config = load_config(halved.config)

    def written(path: str | None = None, qrels: str | None = None) -> Any:
        data = config.data.model_copy(update={"path": path or config.data.path})
        if qrels:
            tables = {
                name: {"path": one}
                for name, one in {"corpus": "a/corpus", "queries": str(base), "qrels": qrels}.items()
            }
            data = load_config({**halved.config, "data": {"format": "columns", **tables}}).data
        told = card.written(
            library, base, config.model_copy(update={"data": data}), rows, stats["compared"], stats["overlap"]
        )
        found: Any = ModelCard(told)
        assert {one.metric_name for one in found.data.eval_results} == {*METRICS} and found.data.tags == ["dense"]
        return found.data

    assert (written().license, written().datasets) == (None, None)
    for stated, expected in [
        ("---\nlicense: cc-by-4.0\n---\n", "cc-by-4.0"),
        ("no front matter", None),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\n{broken: [\n---\n", None),
    ]:
        base.write_text(stated, encoding="utf-8")
        assert written().license == expected
    assert written("BeIR/scifact").datasets == ["BeIR/scifact"]
    assert written(qrels="a/qrels").datasets == ["a/corpus", "a/qrels"]
