"""The stage: what it keys on, what it judges by and how, what it shows, and what it refuses before it begins."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import learnable
import numpy as np
import pyarrow.parquet as pq
import pytest
import small_source as small
from real_runs import Run

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.config.schema import Config
from negpipe.engine.fingerprint import DigestCache
from negpipe.engine.stage import Context
from negpipe.engine.state import digests_of, identity_of
from negpipe.errors import ConfigError, InputError, StorageError
from negpipe.plan import estimate
from negpipe.stages import STAGES
from negpipe.train.comparison import METRICS

pytestmark = pytest.mark.slow


@pytest.fixture
def copy(mined: Run, tmp_path: Path) -> Iterator[Run]:
    """A mined run to change, with training in this process."""
    with learnable.training_here():
        yield mined.copied(tmp_path / "run")


def config_of(run: Run, *overrides: str) -> Config:
    return load_config(run.config, list(overrides))


def without_training(run: Run) -> Config:
    return load_config({name: value for name, value in run.config.items() if name != "train"})


def part(run: Run, kind: str) -> Any:
    (found,) = run.parts("train", kind)
    return found


def scores(run: Run) -> Any:
    (path,) = (run.folder / file["path"] for file in part(run, "evaluation")["files"] if file["role"] == "scores")
    return pq.read_table(path)


# --- identity -----------------------------------------------------------------------------------------


def test_without_the_section_nothing_is_there_and_nothing_changes(mined: Run) -> None:
    plain = without_training(mined)
    assert graph.stages(plain) == STAGES
    assert [(state.stage, state.state) for state in graph.status(plain)] == [(name, "current") for name in STAGES]
    assert all(mined.states()[name].state == "current" for name in STAGES)  # with the section, of the same parts
    with digests_of(plain) as digests:
        contexts = [Context(config, plain.run_dir, digests) for config in (plain, config_of(mined))]
        for stage in STAGES.values():
            assert len({identity_of(stage, context).key for context in contexts}) == 1
            state = next(state for state in graph.status(plain) if state.stage == stage.name)
            assert state.manifest
            contexts = [context.after(stage, state.manifest) for context in contexts]
    with pytest.raises(ConfigError, match="section"):
        graph.train(plain)


@pytest.mark.parametrize(
    "override", ["train.checkpoint_steps=7", "encoder.device=cpu", "resources.cpus=2", "executor.kind=local"]
)
def test_circumstance_changes_no_key(override: str, trained: Run) -> None:
    assert trained.states(override)["train"].state == "current"


@pytest.mark.parametrize(
    "override", ["train.learning_rate=1e-3", "train.steps=3", "train.seed=1", "seed=7", "train.matryoshka=[8]"]
)
def test_what_changes_weights_makes_it_stale(override: str, trained: Run) -> None:
    state = trained.states(override)["train"]
    assert state.state == "stale" and override.partition("=")[0].rpartition(".")[2] in state.reason


def test_another_split_judges_the_same_model(trained: Run, tmp_path: Path) -> None:
    run = trained.copied(tmp_path / "run")
    data = shutil.copytree(run.config["data"]["path"], tmp_path / "beir")
    small.write_qrels(data / "qrels/dev.tsv", [(f"q{i}", f"d{i}", 1) for i in range(70, 90)])
    run.config["data"] = {**run.config["data"], "path": str(data)}
    before = part(run, "model")
    with learnable.training_here():
        graph.train(config_of(run, "train.eval_split=dev"))
    assert part(run, "model") == before
    assert scores(run)["anchor_id"].to_pylist() == [f"q{i}" for i in range(70, 90)]


def test_rows_of_other_settings_train_another_model(copy: Run) -> None:
    run = copy
    graph.train(config_of(run))
    (run.folder / "model" / "NOTES.md").write_text("a user's own\n", encoding="utf-8")
    model, before = part(run, "model")["key"], {path.name for path in (run.folder / "model").rglob("*")}
    made = graph.train(config_of(run, "mining.range_min=3"))
    assert made.ran == ("triplets", "train") and part(run, "model")["key"] != model
    after = {path.name for path in (run.folder / "model").rglob("*")}
    assert after == before and (run.folder / "model/NOTES.md").read_text(encoding="utf-8") == "a user's own\n"
    config = config_of(run, "mining.range_min=3")
    assert {state.state for state in graph.status(config)} == {"current"}
    assert graph.clean(config) > 0
    assert [path.name for path in (run.folder / ".model").iterdir()] == [(run.folder / "model").readlink().name]
    assert {state.state for state in graph.status(config)} == {"current"}


def test_damage_is_made_good(copy: Run) -> None:
    graph.train(config_of(copy))
    (weights,) = (copy.folder / file["path"] for file in part(copy, "model")["files"] if "safetensors" in file["path"])
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert graph.train(config_of(copy), repair=True).ran == ("train",)
    assert weights.read_bytes() == content == (copy.folder / "model/model.safetensors").read_bytes()


# --- judging ------------------------------------------------------------------------------------------


def test_the_library_s_evaluator_agrees(trained: Run) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    data = Path(trained.config["data"]["path"])
    rows = {name: [json.loads(line) for line in (data / f"{name}.jsonl").open()] for name in ("corpus", "queries")}
    judged: dict[str, set[str]] = {}
    for line in (data / "qrels/test.tsv").read_text().splitlines()[1:]:
        query, document, _ = line.split("\t")
        judged.setdefault(query, set()).add(document)
    evaluator = InformationRetrievalEvaluator(
        {row["_id"]: row["text"] for row in rows["queries"] if row["_id"] in judged},
        {row["_id"]: row["text"] for row in rows["corpus"]},
        judged,
        mrr_at_k=[10],
        ndcg_at_k=[10],
        precision_recall_at_k=[10, 100],
    )
    names = dict(zip(METRICS, ("ndcg@10", "mrr@10", "recall@10", "recall@100"), strict=True))
    table = scores(trained)
    seen = []
    for side, folder in (("before", trained.config["encoder"]["model"]), ("after", trained.folder / "model")):
        found = evaluator(SentenceTransformer(str(folder)))
        for metric, theirs in names.items():
            ours = float(np.mean(table[f"{metric}_{side}"].to_numpy()))
            assert ours == pytest.approx(found[f"cosine_{theirs}"], abs=1e-9)
            seen.append(ours)
    assert min(seen) > 0.05 and len({*seen}) > 4  # figures that could differ


def test_best_scores_are_those_of_the_library_s_vectors(trained: Run) -> None:
    from sentence_transformers import SentenceTransformer

    rows = {
        table: [
            json.loads(line) for line in Path(trained.config["data"]["path"], f"{table}.jsonl").read_text().splitlines()
        ]
        for table in ("queries", "corpus")
    }
    queries = {row["_id"]: row["text"] for row in rows["queries"]}
    table = scores(trained)
    for side, folder in (("before", trained.config["encoder"]["model"]), ("after", trained.folder / "model")):
        model = SentenceTransformer(str(folder))
        corpus = model.encode([row["text"] for row in rows["corpus"]], normalize_embeddings=True)
        for anchor, positive, negative in zip(
            *(table[name].to_pylist() for name in ("anchor_id", f"best_positive_{side}", f"best_negative_{side}")),
            strict=True,
        ):
            found = corpus @ model.encode([queries[anchor]], normalize_embeddings=True)[0]
            own = [row["_id"] == f"d{anchor[1:]}" for row in rows["corpus"]]  # each anchor has one positive
            assert [positive, negative] == pytest.approx([found[own].max(), found[~np.array(own)].max()], abs=1e-5)


@pytest.mark.parametrize("anchor_id", ["contained", "never"])
def test_an_anchor_that_is_a_document_is_not_in_its_own_ranking(anchor_id: str, mined: Run, tmp_path: Path) -> None:
    """As in duplicate-question sets; its vector is the anchor's own, so that it would come first."""
    data = shutil.copytree(mined.config["data"]["path"], tmp_path / "data")
    queries = [json.loads(line) for line in (data / "queries.jsonl").read_text().splitlines()]
    with (data / "corpus.jsonl").open("a", encoding="utf-8") as corpus:
        corpus.writelines(json.dumps({**query, "title": ""}) + "\n" for query in queries)
    changed = {"data": {"path": str(data)}, "mining": {"num_negatives": 1, "anchor_id": anchor_id}}
    run = Run({**mined.config, **changed, "run_dir": str(tmp_path / "run")})
    with learnable.training_here():
        graph.train(load_config(run.config))
    for side in ("before", "after"):
        best = np.array(scores(run)[f"best_negative_{side}"].to_pylist())
        own = np.isclose(best, 1, atol=1e-5)
        # c0 to c2 have the texts of q0 to q2 in capitals: that document is another one, and as near.
        assert int(own.sum()) == (learnable.BOTH_ANCHORS if anchor_id == "contained" else learnable.HELD_OUT)


def test_what_is_told_is_what_the_scores_of_the_anchors_give(trained: Run) -> None:
    from scipy import stats

    table, told = scores(trained), trained.manifest("train")["stats"]
    assert table.num_rows == told["held_out_anchors"] == learnable.HELD_OUT
    for one in told["compared"]:
        before, after = (table[f"{one['metric']}_{side}"].to_numpy() for side in ("before", "after"))
        interval = stats.ttest_rel(after, before).confidence_interval(0.95)
        expected = (before.mean(), after.mean(), interval.low, interval.high)
        assert (one["before"], one["after"], one["low"], one["high"]) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_what_both_splits_share_is_counted(trained: Run) -> None:
    assert trained.manifest("train")["stats"]["overlap"] == {
        "anchors": learnable.HELD_OUT,
        "anchors_trained_on": learnable.BOTH_ANCHORS,
        "positives": learnable.HELD_OUT,
        "positives_trained_on": learnable.BOTH_POSITIVES,
    }
    remarks = [text for _, text in graph.of_kind("train").remarks(trained.manifest("train")["stats"])]
    assert [text.split()[0] for text in remarks] == [str(learnable.BOTH_ANCHORS), str(learnable.BOTH_POSITIVES)]


# --- what is left -------------------------------------------------------------------------------------


def test_the_model_is_shown_with_its_card(trained: Run) -> None:
    from huggingface_hub import ModelCard
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(trained.folder / "model"))
    assert model.encode(["a text"]).shape == (1, 32)
    card = ModelCard.load(trained.folder / "model/README.md")
    told = trained.manifest("train")["stats"]["compared"]
    values = {one.metric_name: one.metric_value for one in card.data.eval_results}
    assert values == {one["metric"]: pytest.approx(one["after"]) for one in told}
    assert {one["metric"] for one in told} == {*METRICS}
    text = str(card)
    assert f"{told[0]['before']:.4f}" in text and "num_negatives: 2" in text
    (manifest,) = (state.manifest for state in graph.status(config_of(trained)) if state.stage == "triplets")
    assert manifest and manifest.digest in text


def test_steps_are_kept(trained: Run) -> None:
    (path,) = (trained.folder / file["path"] for file in part(trained, "model")["files"] if file["role"] == "log")
    log = pq.read_table(path)
    assert log.column_names == ["step", "loss", "learning_rate", "gradient_norm"]
    assert log["step"].to_pylist() == [1, 2]
    assert np.isfinite([log[name].to_numpy() for name in log.column_names]).all()


def test_nothing_begun_is_left(trained: Run) -> None:
    assert not [*(trained.folder / ".negpipe/train").glob("begun-*")]
    with learnable.training_here():
        assert graph.train(config_of(trained)).ran == ()


def test_runs_that_share_a_store_judge_their_base_once(mined: Run, tmp_path: Path) -> None:
    made = {}
    with learnable.training_here():
        for name, changed in {"one": {}, "other": {"seed": 7, "learning_rate": 1e-4}}.items():
            train = {**mined.config["train"], **changed}
            config = {**mined.config, "run_dir": str(tmp_path / name), "store": str(tmp_path / "store"), "train": train}
            graph.train(load_config(config))
            made[name] = {part["kind"]: part["key"] for part in Run(config).manifest("train")["parts"]}
    assert {kind for kind in made["one"] if made["one"][kind] == made["other"][kind]} == {"base"}


@pytest.mark.guarantee(
    "training on a CPU is repeatable",
    "the same model, byte for byte",
    section="rows",
)
def test_same_everything_same_bytes(copy: Run, trained: Run) -> None:
    graph.train(config_of(copy))
    made = [
        {file["role"]: file["digest"] for file in part(run, kind)["files"] if not file["aside"]}
        for run in (copy, trained)
        for kind in ("model", "evaluation")
    ]
    assert made[:2] == made[2:]


# --- the command --------------------------------------------------------------------------------------


def test_command(trained: Run, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(trained.config), encoding="utf-8")
    shown = small.run("train", path, "--fail-on", "loss")
    told = trained.manifest("train")["stats"]["compared"][0]
    assert shown.code == (told["verdict"] == "LOSS")
    last = shown.out.rstrip().splitlines()[-1].split()
    assert last[:2] == ["RESULT:", told["verdict"]]
    assert [float(last[3]), float(last[5])] == pytest.approx([told["after"], told["before"]], abs=5e-5)
    assert [float(last[10]), float(last[12].strip(","))] == pytest.approx([told["low"], told["high"]], abs=5e-4)
    document = json.loads(small.run("train", path, "--json").out)
    assert document["compared"][0] == told and document["verdict"] == told["verdict"]
    (row, *_) = csv.DictReader(io.StringIO(small.run("train", path, "--format", "csv").out))
    assert (row["metric"], row["after"]) == (told["metric"], str(told["after"]))
    assert Path(document["model"]) == trained.folder / "model"


def test_a_worse_model_fails_a_nightly_job_and_is_there_all_the_same(copy: Run, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    worse = {"steps": 40, "batch_size": 8, "learning_rate": 1.0}
    path.write_text(json.dumps({**copy.config, "train": worse}), encoding="utf-8")
    shown = small.run("train", path, "--fail-on", "loss")
    assert shown.code == 1, shown.out
    assert shown.out.rstrip().splitlines()[-1].startswith("RESULT: LOSS nDCG@10")
    assert (copy.folder / "model/config.json").is_file()
    assert small.run("train", path).code == 0
    assert small.run("train", path, "--fail-on", "win").code == 2


def test_the_plan_knows_the_stages_that_train(mined: Run, trained: Run, tmp_path: Path) -> None:
    def planned(run: Run) -> dict[str, estimate.Step]:
        found = estimate.plan(config_of(run), probe_encoder=False)
        return {step.stage: step for step in found.steps}

    assert [*planned(mined.at(tmp_path / "run"))] == ["ingest", "held_out", *[*STAGES][1:], "train"]
    before, after = planned(mined), planned(trained)
    assert (before["held_out"].state, before["train"].state) == ("missing", "blocked")
    assert (after["held_out"].state, after["train"].state) == ("current", "current")
    plain = estimate.plan(without_training(mined), probe_encoder=False)
    assert [step.stage for step in plain.steps] == [*STAGES]


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "setting"),
    [
        (["train.eval_split=train"], "train.eval_split"),
        (["output.format=labeled-pair"], "output.format"),
        (["output.format=labeled-list"], "output.format"),
        (["train.loss=MarginMSELoss", "output.scores=false"], "output.scores"),
        (["train.guide=some/model"], "train.guide"),
        (["train.loss=Triplet"], "train.loss"),
        (["train.matryoshka=[0]"], "matryoshka"),
        (["output.format=n-tuple", "output.include_positives=true"], "output.include_positives"),
        (["encoder.backend=precomputed", "encoder.corpus_vectors=a", "encoder.anchor_vectors=b"], "train.base"),
    ],
)
def test_what_does_not_go_together(overrides: list[str], setting: str, mined: Run) -> None:
    with pytest.raises(ConfigError, match=setting):
        config_of(mined, *overrides)


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["train.eval_split=dev"], "train.eval_split"),
        (["train.eval_split=single"], "train.eval_split"),
        (["train.base=no/such/folder/here"], "train.base"),
        (["train.loss=CachedGISTEmbedLoss", "train.guide=no/such/folder/here"], "train.guide"),
    ],
)
def test_refused_before_anything_is_encoded(overrides: list[str], field: str, mined: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        graph.train(config_of(mined.at(tmp_path / "run"), *overrides))
    assert raised.value.field == field and raised.value.remedy
    assert not (tmp_path / "run/encode").exists()


def test_splits_that_there_are_are_named(mined: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        graph.train(config_of(mined.at(tmp_path / "run"), "train.eval_split=dev"))
    assert raised.value.there == ["single", "test", "train"]


def test_a_split_that_is_all_trained_on(mined: Run, tmp_path: Path) -> None:
    data = shutil.copytree(mined.config["data"]["path"], tmp_path / "beir")
    small.write_qrels(data / "qrels/same.tsv", [(f"q{i}", f"d{i + 40}", 1) for i in range(20)])
    run = Run({**mined.config, "run_dir": str(tmp_path / "run"), "data": {"path": str(data)}})
    with pytest.raises(InputError) as raised:
        graph.train(config_of(run, "train.eval_split=same"))
    assert raised.value.field == "train.eval_split"
    assert "train: {split: {test: 0.1}} in place of train.eval_split" in str(raised.value)
    assert not (tmp_path / "run/encode").exists()


def test_a_source_without_splits_is_known_before_it_is_read(mined: Run, tmp_path: Path) -> None:
    beir = Path(mined.config["data"]["path"])
    names = {"corpus": "corpus.jsonl", "queries": "queries.jsonl", "qrels": "qrels/train.tsv"}
    data = {name: str(beir / file) for name, file in names.items()}
    run = Run({**mined.config, "run_dir": str(tmp_path / "run"), "data": data})
    with pytest.raises(InputError) as raised:
        graph.train(config_of(run))
    assert raised.value.field == "train.eval_split" and "train: {split: {test: 0.1}}" in str(raised.value.remedy)
    assert not (tmp_path / "run/ingest").exists()


def test_rows_that_fill_no_batch(copy: Run) -> None:
    with pytest.raises(InputError) as raised:
        graph.train(config_of(copy, "train.batch_size=500"))
    assert raised.value.field == "train.batch_size"
    assert not (copy.folder / "train").exists()


def test_a_disk_too_small_for_checkpoints(mined: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    weights = 4 * sum(value.size for value in _arrays(Path(mined.config["encoder"]["model"])))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=11 * weights - 1))
    with pytest.raises(StorageError, match="checkpoints"):
        graph.train(config_of(mined.at(tmp_path / "run")))
    assert not (tmp_path / "run/ingest").exists()


def _arrays(model: Path) -> list[Any]:
    from safetensors.numpy import load_file

    return [*load_file(model / "model.safetensors").values()]


def test_the_extra_is_named_where_it_is_missing(mined: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else real(name))
    with pytest.raises(ConfigError, match=r"accelerate.*negpipe\[train\]"):
        graph.train(config_of(mined.at(tmp_path / "run")))


def test_a_base_of_another_width_is_trained(copy: Run, tmp_path: Path) -> None:
    from tiny_model import build_tiny_model

    base = build_tiny_model(tmp_path / "wide", dim=48)
    graph.train(config_of(copy, f"train.base={base}"))
    assert copy.manifest("train")["stats"]["dimension"] == 48
    with digests_of(config_of(copy)) as digests:
        assert isinstance(digests, DigestCache)
    assert copy.states()["encode"].state == "current"  # rows are mined with the encoder
