"""Prompts that a model names, against Sentence Transformers' own `encode_query` and `encode_document`."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_source as small
from model_vectors import TEXTS, ignore, loaded, settings
from real_runs import Run, encoding_here
from tiny_model import build_tiny_model

from negpipe import encoders
from negpipe.config.file import load_config
from negpipe.encoders import prompts
from negpipe.engine.manifest import Books
from negpipe.errors import ConfigError, InputError
from negpipe.review.report import facts

QUERY, DOCUMENT = "find the file: ", "text of a file: "
NAMED: dict[str, dict[str, Any]] = {
    "both": {"prompts": {"query": QUERY, "document": DOCUMENT, "cluster": "list: "}},
    "a query alone": {"prompts": {"query": QUERY}},
    "an empty document": {"prompts": {"query": QUERY, "document": ""}},
    "other names": {"prompts": {"query": QUERY, "passage": DOCUMENT}},
    "a default": {"prompts": {"cluster": "list: "}, "default_prompt_name": "cluster"},
    "another type of model": {"prompts": {"query": QUERY}, "model_type": "SparseEncoder"},
    "none": {"prompts": {}},
}

Prompted = Callable[[dict[str, Any]], Path]


@pytest.fixture
def prompted(tiny: Path, tmp_path: Path) -> Prompted:
    """A copy of the tiny model with a `config_sentence_transformers.json` of that content."""

    def build(config: dict[str, Any]) -> Path:
        folder = Path(shutil.copytree(tiny, tmp_path / "prompted" / "tiny", dirs_exist_ok=True))
        (folder / "config_sentence_transformers.json").write_text(json.dumps(config), encoding="utf-8")
        return folder

    return build


def theirs(folder: Path, kind: encoders.Kind, **options: Any) -> Any:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    encode = model.encode_query if kind == "query" else model.encode_document
    return encode(TEXTS[:9], normalize_embeddings=True, batch_size=8, **options)


def ours(folder: Path, kind: encoders.Kind, backend: str = "sentence-transformers", **more: Any) -> Any:
    encoder = settings(folder, backend, query_max_length=128, passage_max_length=128, **more)
    return loaded(encoder).encode(TEXTS[:9], kind, ignore)


@pytest.mark.cases
@pytest.mark.parametrize("kind", prompts.KINDS)
@pytest.mark.parametrize("named", NAMED)
def test_the_librarys_own_choice_is_the_default(prompted: Prompted, named: str, kind: encoders.Kind) -> None:
    folder = prompted(NAMED[named])
    np.testing.assert_allclose(ours(folder, kind), theirs(folder, kind), atol=1e-6)


def test_prompts_change_vectors(prompted: Prompted, tiny: Path) -> None:
    """Or the tests here would show nothing."""
    folder = prompted(NAMED["both"])
    for kind in prompts.KINDS:
        assert np.abs(theirs(folder, kind) - theirs(tiny, kind)).max() > 0.01


@pytest.mark.parametrize("backend", ["flagembedding", "sentence-transformers"])
def test_a_prompt_is_chosen_by_name(prompted: Prompted, backend: str) -> None:
    folder = prompted(NAMED["both"])
    for kind in prompts.KINDS:
        vectors = ours(folder, kind, backend, **{f"{kind}_prompt_name": "cluster"})
        np.testing.assert_allclose(vectors, theirs(folder, kind, prompt_name="cluster"), atol=1e-5)


@pytest.mark.parametrize("instruction", ["name the file: ", ""])
def test_an_explicit_instruction_wins(prompted: Prompted, instruction: str) -> None:
    folder = prompted(NAMED["both"])
    for kind in prompts.KINDS:
        more = {f"{kind}_instruction": instruction, f"{kind}_prompt_name": "cluster"}
        np.testing.assert_allclose(ours(folder, kind, **more), theirs(folder, kind, prompt=instruction), atol=1e-6)


@pytest.mark.parametrize("kind", prompts.KINDS)
def test_an_unknown_name_lists_those_there_are(prompted: Prompted, kind: encoders.Kind) -> None:
    with pytest.raises(ConfigError) as caught:
        ours(prompted(NAMED["both"]), kind, **{f"{kind}_prompt_name": "quary"})
    assert f"encoder.{kind}_prompt_name" in str(caught.value)
    assert all(name in str(caught.value) for name in ("quary", "query", "document", "cluster"))


@pytest.mark.parametrize("content", ["{", "[]", '{"prompts": ["query: "]}', '{"prompts": {"query": 3}}'])
def test_prompts_that_cannot_be_read(prompted: Prompted, content: str) -> None:
    file = prompted({}) / "config_sentence_transformers.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        prompts.prompts(str(file.parent))
    assert caught.value.file == str(file) and caught.value.remedy
    assert (caught.value.field or "").startswith("prompts") is ("prompts" in content)


def test_modules_that_cannot_be_read(prompted: Prompted) -> None:
    folder = prompted({})
    (folder / "modules.json").write_text('["Router"]', encoding="utf-8")
    with pytest.raises(InputError, match="Fetch the model again"):
        prompts.routed(settings(folder, "sentence-transformers"), str(folder))


@pytest.mark.parametrize("static", [False, True])
def test_routes_of_queries_and_documents(tmp_path: Path, static: bool) -> None:
    """The query's way through the model is another one than the document's, as in asymmetric models."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Router, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
    from tokenizers import Tokenizer

    models = [build_tiny_model(tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    ways: list[list[Any]] = [[Transformer(str(model)), Pooling(32, "mean")] for model in models]
    if static:
        ways[0] = [StaticEmbedding(Tokenizer.from_file(str(models[0] / "tokenizer.json")), embedding_dim=32)]
    folder = tmp_path / "routed"
    SentenceTransformer(modules=[Router.for_query_document(*ways)], device="cpu").save_pretrained(str(folder))
    vectors = {kind: ours(folder, kind) for kind in prompts.KINDS}
    for kind in prompts.KINDS:
        np.testing.assert_allclose(vectors[kind], theirs(folder, kind), atol=1e-6)
    assert np.abs(vectors["query"] - vectors["passage"]).max() > 0.01
    assert "routes" in prompts.of_the_model(settings(folder, "sentence-transformers"), str(folder))


@pytest.mark.parametrize(
    ("backend", "named", "more", "keys"),
    [
        ("flagembedding", "both", {}, ["query", "passage"]),
        ("flagembedding", "a query alone", {}, ["query", "passage"]),
        ("flagembedding", "an empty document", {}, ["query"]),
        ("flagembedding", "both", {"query_instruction": ""}, ["passage"]),
        ("flagembedding", "both", {"query_prompt_name": "query", "passage_prompt_name": "document"}, []),
        ("flagembedding", "none", {}, []),
        ("sentence-transformers", "both", {}, []),
        ("sentence-transformers", "a query alone", {}, []),
        ("sentence-transformers", "other names", {}, ["passage"]),
        ("sentence-transformers", "a default", {}, ["query", "passage"]),
    ],
)
def test_prompts_that_nothing_uses_are_told_with_the_keys_to_set(
    prompted: Prompted, backend: str, named: str, more: dict[str, str], keys: list[str]
) -> None:
    folder = prompted(NAMED[named])
    told = [*prompts.unused(settings(folder, backend, **more), str(folder))]
    assert len(told) == len(keys)
    for sentence, key in zip(told, keys, strict=True):
        assert f"encoder.{key}_prompt_name" in sentence and f"encoder.{key}_instruction" in sentence


def mined(folder: Path, model: Path, *overrides: str) -> Run:
    if not (folder / "data").exists():
        small.build(folder)
    encoder = {"backend": "sentence-transformers", "model": str(model), "storage": "float32"}
    run = Run(small.settings(folder) | {"encoder": encoder})
    with encoding_here():
        run.mine(*overrides)
    return run


@pytest.mark.cases
def test_a_run_says_which_prompts_it_used(prompted: Prompted, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="negpipe")
    run = mined(tmp_path, prompted(NAMED["both"]))
    manifest = run.manifest("encode")
    assert manifest["stats"]["prompts"] == {"query_prompt": QUERY, "passage_prompt": DOCUMENT}
    said = [record.message for record in caplog.records if record.message.startswith("encode: the model's own")]
    assert [QUERY in line for line in said] == [True, False] and DOCUMENT in said[1]

    book = Books(run.folder, "encode").manifest()
    assert book is not None
    shown = facts.encoder(load_config(run.config), book)
    assert (shown["query_prompt"], shown["passage_prompt"]) == (QUERY, DOCUMENT)
    assert shown["documents cut"].startswith("0 of 40") and shown["documents with another's vector"] == "0 of 40"

    keys = {part["kind"]: part["key"] for part in run.parts("encode")}
    mined(tmp_path, prompted(NAMED["both"]), "encoder.query_prompt_name=query")
    assert run.manifest("encode")["key"] == manifest["key"]  # the same prompt, whoever named it
    mined(tmp_path, prompted(NAMED["both"]), "encoder.query_prompt_name=cluster")
    after = {part["kind"]: part["key"] for part in run.parts("encode")}
    assert run.manifest("encode")["key"] != manifest["key"]
    assert [kind for kind in keys if after[kind] != keys[kind]] == ["anchors"]


def test_a_model_without_prompts_keeps_its_keys(prompted: Prompted, tiny: Path) -> None:
    for named in ("none", "a default"):
        encoder = settings(prompted(NAMED[named]), "sentence-transformers")
        assert prompts.of_the_model(encoder, str(encoder.model)) == {}
    encoder = settings(prompted(NAMED["both"]), "sentence-transformers", query_instruction="", passage_instruction="")
    assert prompts.of_the_model(encoder, str(encoder.model)) == {}
    assert prompts.of_the_model(settings(tiny), str(tiny)) == {}


def test_flagembedding_warns_of_prompts_it_does_not_use(
    prompted: Prompted, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = mined(tmp_path, prompted(NAMED["both"]), "encoder.backend=flagembedding")
    warned = [record for record in caplog.records if record.levelno == logging.WARNING and "prompt" in record.message]
    assert ["anchors" in record.message for record in warned] == [True, False]
    assert "prompts" not in run.manifest("encode")["stats"]
