"""Texts cut at the model's length, counted against a tokenizer that cuts nothing."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_source as small
from model_vectors import BACKENDS, TEXTS, ignore, settings
from real_runs import Run, encoding_here

from negpipe import encoders, graph
from negpipe.config.file import load_config
from negpipe.encoders.cuts import expected
from negpipe.stages import ingest


def lengths(folder: Path, texts: list[str]) -> list[int]:
    """Tokens of whole texts, with the two special ones."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [len(ids) for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"]]


@pytest.mark.parametrize("limit", [8, 20, 128])
@pytest.mark.parametrize("call_texts", [None, 7])
@pytest.mark.parametrize("backend", BACKENDS)
def test_counts_are_those_of_an_uncut_tokenisation(
    tiny: Path, backend: str, call_texts: int | None, limit: int
) -> None:
    encoder = settings(tiny, backend, passage_max_length=limit, call_texts=call_texts)
    cuts: list[tuple[int, int]] = []
    kept: list[int] = []
    model = encoders.load(encoder, str(tiny), threads=1)
    list(model.encode(TEXTS, "passage", lambda rows, tokens: kept.append(tokens), lambda *cut: cuts.append(cut)))
    whole = lengths(tiny, TEXTS)
    assert sum(texts for texts, _ in cuts) == sum(length > limit for length in whole)
    assert sum(tokens for _, tokens in cuts) == sum(max(0, length - limit) for length in whole)
    assert sum(kept) == sum(min(length, limit) for length in whole)


def test_counting_changes_no_bit(tiny: Path) -> None:
    from FlagEmbedding import FlagModel

    encoder = settings(tiny, passage_max_length=12, normalize=False)
    ours = np.concatenate(list(encoders.load(encoder, str(tiny), 1).encode(TEXTS, "passage", ignore)))
    plain = FlagModel(
        str(tiny),
        pooling_method="mean",
        use_fp16=False,
        devices="cpu",
        normalize_embeddings=False,
        batch_size=8,
        passage_max_length=12,
    )
    assert ours.tobytes() == np.asarray(plain.encode_corpus(TEXTS)).tobytes()


@pytest.mark.parametrize("limit", [12, 20, 128])
@pytest.mark.parametrize("said", [None, "find the file: "])
def test_expected_cuts_are_those_that_come(tiny: Path, limit: int, said: str | None) -> None:
    encoder = settings(tiny, "sentence-transformers", query_max_length=limit, query_instruction=said)
    counted: list[tuple[int, int]] = []
    model = encoders.load(encoder, str(tiny), threads=1)
    list(model.encode(TEXTS, "query", ignore, lambda *cut: counted.append(cut)))
    seen = expected(encoder, tiny, "query", TEXTS)
    assert seen is not None and (seen.cut, seen.lost) == tuple(map(sum, zip(*counted, strict=True)))
    assert seen.texts == len(TEXTS) and seen.tokens == sum(lengths(tiny, [(said or "") + text for text in TEXTS]))


def test_without_a_tokenizer_of_its_own_kind_nothing_is_expected(tiny: Path, tmp_path: Path) -> None:
    assert expected(settings(tiny), tmp_path, "query", TEXTS) is None


def test_a_static_embedding_cuts_nothing(tiny: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer

    static = StaticEmbedding(Tokenizer.from_file(str(tiny / "tokenizer.json")), embedding_dim=8)
    SentenceTransformer(modules=[static]).save(str(tmp_path))
    encoder = settings(tmp_path, "sentence-transformers", passage_max_length=8)
    assert (tmp_path / "tokenizer.json").is_file() and max(lengths(tiny, TEXTS)) > 8
    assert expected(encoder, tmp_path, "passage", TEXTS) is None
    # FlagEmbedding would cut.
    assert expected(settings(tmp_path, passage_max_length=8), tmp_path, "passage", TEXTS) is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "more"),
    [
        ("tokenizer.json", {}),
        ("config_sentence_transformers.json", {}),
        (None, {"query_prompt_name": "none"}),
        (None, {"model": "pkg://not_installed/model"}),
        (None, {"model": "no--name"}),
    ],
)
def test_ingest_is_done_whatever_is_wrong_with_the_model(
    tiny: Path, tmp_path: Path, wrong: str | None, more: dict[str, str]
) -> None:
    config, model = small.build(tmp_path), Path(shutil.copytree(tiny, tmp_path / "model"))
    if wrong:
        (model / wrong).write_text("{")
    config.write_text(
        json.dumps(small.settings(tmp_path) | {"encoder": {"model": str(model), "pooling": "mean"} | more})
    )
    outcome = small.run("ingest", config)
    assert outcome.code == 0 and "cannot tell how much of the texts the model reads: " in outcome.err
    # Encode refuses it.
    assert small.run("encode", config).code


@pytest.mark.parametrize("at_once", [400, 150])
def test_expected_cuts_are_of_texts_from_all_over(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """The short ones are first; and of documents so long that not even one may be counted, the beginning is."""
    text = "file name " * 20
    short = 0 if at_once < len(text) else small.DOCUMENTS // 2
    corpus = [
        {"_id": f"d{i}", "title": "", "text": f"{i} {text if i >= short else 'f'}"} for i in range(small.DOCUMENTS)
    ]
    monkeypatch.setattr(ingest, "_BYTES", at_once)
    config = small.build(tmp_path, corpus)
    encoder = {"model": str(tiny), "pooling": "mean", "passage_max_length": 4, "query_max_length": 4}
    config.write_text(json.dumps(small.settings(tmp_path) | {"encoder": encoder}))
    outcome = small.run("ingest", config)
    assert outcome.code == 0 and re.search(r"\d+ % of [\d,]+ documents have more than 4 tokens", outcome.err)
    assert re.search(r"\d+ % of [\d,]+ anchors have more than 4 tokens", outcome.err)
    assert "cannot tell" not in outcome.err


def test_expected_cuts_are_said_once_where_a_second_ingest_reads_what_is_held_out(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small.build(tmp_path)
    encoder = {"model": str(tiny), "pooling": "mean", "passage_max_length": 4}
    config = load_config(
        small.settings(tmp_path) | {"encoder": encoder, "train": {"base": str(tiny), "split": {"test": 0.3}}}
    )
    caplog.set_level(logging.INFO, logger="negpipe")
    graph.mine(config, only="ingest")
    graph.train(config, only="held_out")
    assert "held_out: done" in caplog.text
    said = [record.message for record in caplog.records if "passage_max_length" in record.message]
    assert [sentence.partition(":")[0] for sentence in said] == ["ingest"]


def encoded(folder: Path, model: Path, corpus: list[dict[str, Any]], *overrides: str) -> tuple[Run, graph.Result]:
    small.build(folder, corpus)
    encoder = {"backend": "sentence-transformers", "model": str(model), "passage_max_length": 16}
    run = Run(small.settings(folder) | {"encoder": encoder})
    with encoding_here():
        return run, run.mine("mining.relative_margin=0.05", "mining.max_depth=0", "output.min_rows=0", *overrides)


@pytest.fixture
def alike() -> list[dict[str, Any]]:
    """Documents that begin with the same words, and then differ; the first two are short."""
    head = "the list of names of the file is returned as text in the error " * 2
    long = [{"_id": f"d{i}", "title": "", "text": f"{head} and that is name {i}"} for i in range(2, small.DOCUMENTS)]
    return [{"_id": f"d{i}", "title": "", "text": f"name {i}"} for i in range(2)] + long


@pytest.mark.slow
@pytest.mark.cases
def test_no_rows_name_the_cut_as_the_cause(
    tiny: Path, tmp_path: Path, alike: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    run, result = encoded(tmp_path, tiny, alike)
    whole = lengths(tiny, [document["text"] for document in alike])
    cut = result.stats["encode"]["cut"]["documents"]
    assert (cut["texts"], cut["of"], cut["max_length"]) == (38, 40, 16)
    assert cut["lost"] == pytest.approx(sum(max(0, length - 16) for length in whole) / sum(whole))
    equal = result.stats["encode"]["equal"]
    assert (equal["documents"], equal["of"]) == (38, 40)
    assert result.stats["triplets"]["vectors"]["cut"]["documents"] == cut
    warned = {
        record.message.partition(":")[0]: record.message
        for record in caplog.records
        if record.levelno == logging.WARNING and "passage_max_length" in record.message
    }
    assert {*warned} == {"ingest", "encode", "triplets"}
    # Known once the texts are there, before they are encoded: by a sample, here of them all.
    before = warned.pop("ingest")
    assert before.startswith("ingest: 95 % of 40 documents have more than 16 tokens")
    assert f"{cut['lost']:.0%}".replace("%", " %") + " of all their tokens" in before
    assert all("38 of 40 documents" in message for message in warned.values())
    assert not {"tokens_lost", "cut", "equal"} & {*run.manifest("encode")["settings"]}

    path = small.write_config(tmp_path)
    path.write_text(json.dumps(run.config), encoding="utf-8")
    overrides = ["--set", "mining.relative_margin=0.05", "--set", "mining.max_depth=0"]
    outcome = small.run("quality", path, *overrides)
    assert outcome.code == 0 and "38 of 40 documents were cut at 16 tokens" in outcome.out
    document = json.loads(small.run("quality", path, "--json", *overrides).out)
    assert document["vectors"]["equal"] == equal
    status = small.run("status", path, *overrides)
    assert "encode: 38 of 40 documents were cut at 16 tokens" in status.out
    report = small.run("report", path, *overrides, "--out", tmp_path / "report.html")
    assert report.code == 0, report.err
    lost = f"{cut['lost']:.1%} of all tokens lost"
    assert f"38 of 40, {lost}" in (tmp_path / "report.html").read_text("utf-8")
    # Nothing is left to do, and that the rows are too few is said all the same.
    again = small.run("mine", path, *overrides, "--set", "output.min_rows=9")
    assert again.code == 1 and "38 of 40 documents were cut at 16 tokens" in again.err.replace("\n", " ")


def test_whole_texts_are_not_warned_of(
    tiny: Path, tmp_path: Path, alike: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    _, result = encoded(tmp_path, tiny, alike, "encoder.passage_max_length=128")
    assert result.stats["encode"]["cut"]["documents"] == {"texts": 0, "of": 40, "max_length": 128, "lost": 0.0}
    assert result.stats["encode"]["equal"]["documents"] == 0
    assert "max_length" not in caplog.text


def test_equal_vectors_that_the_user_brings_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small.build(tmp_path)
    vectors = np.load(tmp_path / "corpus.npy")
    vectors[[3, 5]] = vectors[1]
    vectors[4] = vectors[7]
    np.save(tmp_path / "corpus.npy", vectors)
    caplog.set_level(logging.INFO, logger="negpipe")
    result = graph.mine(load_config(small.settings(tmp_path)))
    equal = result.stats["encode"]["equal"]
    assert (equal["documents"], equal["of"]) == (5, 40)
    assert equal["example"] in ([["d4", "d7"], ["d1", "d3"]])
    assert "cut" not in result.stats["encode"]
    assert [record.levelno for record in caplog.records if "5 of 40 documents" in record.message] == [logging.WARNING]
