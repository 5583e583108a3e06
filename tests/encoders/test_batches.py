"""Batches by tokens: what shares a forward pass, and that vectors, cuts and errors are those of batches by number."""

from __future__ import annotations

import json
import random
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_source as small
from model_vectors import BACKENDS, TEXTS, ignore, loaded, settings, sha256
from pydantic import ValidationError
from tiny_model import build_tiny_model

from negpipe import encoders
from negpipe.config.encoder import Encoder
from negpipe.encoders.batches import batches_of, by_tokens
from negpipe.errors import ConfigError, InputError, TaskFailedError

LENGTHS = {"query_max_length": 16, "passage_max_length": 24}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def by(folder: Path, backend: str, tokens: int, **more: Any) -> Encoder:
    return Encoder.model_validate({"backend": backend, "model": str(folder), "batch_tokens": tokens, **LENGTHS, **more})


def kept_in(calls: list[tuple[int, int]]) -> encoders.OnBatch:
    return lambda rows, tokens: calls.append((rows, tokens))


def test_every_text_is_in_one_batch_and_no_batch_is_larger_than_asked() -> None:
    draw = random.Random(5)
    for _ in range(300):
        lengths = [draw.choice([0, 1, 7, 30, 30, 512]) for _ in range(draw.randint(1, 60))]
        limit = draw.choice([1, 30, 64, 512, 4096])
        batches = by_tokens(lengths, limit)
        assert sorted(row for rows in batches for row in rows) == list(range(len(lengths)))
        for rows, following in pairwise([*batches, np.array([], dtype=int)]):
            longest = max(1, *(lengths[row] for row in rows))
            assert len(rows) == 1 or len(rows) * longest <= limit
            # The next one had no room.
            assert not len(following) or (len(rows) + 1) * longest > limit
            assert all(lengths[row] >= lengths[after] for row in rows for after in following)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("instruction", [None, "find the file: "])
def test_vectors_are_those_of_batches_by_number_in_passes_within_the_limit(
    tiny: Path, backend: str, instruction: str | None
) -> None:
    draw = random.Random(3)
    texts = draw.sample(TEXTS, len(TEXTS)) + ["file"] * 40
    kinds: list[encoders.Kind] = ["passage", "query"]
    for kind in kinds:
        more = {**LENGTHS, f"{kind}_instruction": instruction}
        expected = loaded(settings(tiny, backend, **more)).encode(texts, kind, ignore)
        passes: list[tuple[int, int]] = []
        whole = loaded(by(tiny, backend, 96, **{f"{kind}_instruction": instruction}))
        vectors = whole.encode(texts, kind, kept_in(passes))
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
        # Tokens without padding are less than those with it: nearly full passes show that the limit is what cuts.
        assert sum(rows for rows, _ in passes) == len(texts)
        assert all(tokens <= 96 for _, tokens in passes) and len({rows for rows, _ in passes}) > 2
        assert sum(tokens for _, tokens in passes) > 0.7 * 96 * (len(passes) - 1)
        again = whole.encode(texts, kind, ignore)
        assert again.tobytes() == vectors.tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
def test_cut_texts_are_counted_once(tiny: Path, backend: str) -> None:
    counted = []
    for encoder in (settings(tiny, backend, **LENGTHS), by(tiny, backend, 96)):
        cuts: list[tuple[int, int]] = []
        model = encoders.load(encoder, encoders.resolve_model(encoder, sha256).path, threads=1)
        list(model.encode(TEXTS, "passage", ignore, kept_in(cuts)))
        counted.append(np.array(cuts).sum(axis=0).tolist())
    assert counted[0] == counted[1] and counted[0][0] > 0


def test_errors_name_the_text_and_the_setting(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = build_tiny_model(tmp_path / "tiny")
    weights = load_file(folder / "model.safetensors")
    words = (folder / "vocab.txt").read_text().splitlines()
    weights["embeddings.word_embeddings.weight"][words.index("error")] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError) as caught:
        loaded(by(folder, "sentence-transformers", 96)).encode([*TEXTS[:30], "error", *TEXTS], "passage", ignore)
    assert caught.value.row == 30
    long = by(folder, "sentence-transformers", 4096, passage_max_length=4096)
    with pytest.raises(TaskFailedError, match="batch_tokens"):
        loaded(long).encode(["file " * 3000], "passage", ignore)


@pytest.mark.slow
def test_a_run_by_tokens_has_parts_of_its_own(tiny: Path, tmp_path: Path) -> None:
    """Through a worker, which is sent the settings as JSON; and a run without the setting keeps the key it had."""
    config, key = small.build(tmp_path), dict[int | None, str]()
    for tokens in (None, 64, None):
        encoder = {"model": str(tiny), "pooling": "mean", **LENGTHS} | ({"batch_tokens": tokens} if tokens else {})
        config.write_text(json.dumps(small.settings(tmp_path) | {"encoder": encoder}))
        for stage in ("ingest", "encode"):
            outcome = small.run(stage, config)
            assert outcome.code == 0, outcome.err
        manifest = json.loads((tmp_path / "run/.negpipe/encode/manifest.json").read_text())
        assert manifest["settings"].get("encoder.batch_tokens") == tokens
        assert key.setdefault(tokens, manifest["key"]) == manifest["key"]
    assert key[None] != key[64]


@pytest.mark.parametrize("family", ["m3", "decoder", "python"])
def test_other_families_of_models(tiny: Path, tmp_path: Path, family: str) -> None:
    """M3's own class, a decoder padded on the left and pooled at its last token, and a tokenizer in Python."""
    from transformers import BertJapaneseTokenizer, BertTokenizerFast, LlamaConfig, LlamaModel

    folder, more = Path(shutil.copytree(tiny, tmp_path / family)), {"model_class": "encoder-only-m3", "pooling": "cls"}
    if family == "python":
        (folder / "tokenizer.json").unlink()
        own = BertJapaneseTokenizer(str(tiny / "vocab.txt"), word_tokenizer_type="basic")
        own.save_pretrained(folder)
        assert not own.is_fast
        more = {"pooling": "mean"}
    if family == "decoder":
        tokenizer = BertTokenizerFast.from_pretrained(tiny, padding_side="left")
        tokenizer.save_pretrained(folder)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        LlamaModel(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
        more = {"model_class": "decoder-only-base", "pooling": "last_token", "query_instruction": "find the file: "}
    kinds: list[encoders.Kind] = ["passage", "query"]
    for kind in kinds:
        passes: list[tuple[int, int]] = []
        vectors = loaded(by(folder, "flagembedding", 96, **more)).encode(TEXTS, kind, kept_in(passes))
        expected = loaded(settings(folder, "flagembedding", **LENGTHS, **more)).encode(TEXTS, kind, ignore)
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
        assert sum(rows for rows, _ in passes) == len(TEXTS) and all(tokens <= 96 for _, tokens in passes)


def test_models_that_do_not_tell_tokens_are_refused(tiny: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Router, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
    from tokenizers import Tokenizer

    static = StaticEmbedding(Tokenizer.from_file(str(tiny / "tokenizer.json")), embedding_dim=32)
    SentenceTransformer(modules=[static]).save(str(tmp_path / "static"))
    ways: list[Any] = [[Transformer(str(tiny)), Pooling(32, "mean")] for _ in range(2)]
    SentenceTransformer(modules=[Router.for_query_document(*ways)]).save(str(tmp_path / "routed"))
    for name in ("static", "routed"):
        encoder = by(tmp_path / name, "sentence-transformers", 96)
        with pytest.raises(ConfigError, match=r"encoder\.batch_tokens: .* remove it"):
            encoders.check_tokens(encoder, str(tmp_path / name))
        with pytest.raises(ConfigError, match=r"encoder\.batch_tokens: .* remove it"):
            loaded(encoder)
        encoders.check_tokens(settings(tmp_path / name, "sentence-transformers"), str(tmp_path / name))
    encoders.check_tokens(by(tiny, "sentence-transformers", 96), str(tiny))


def test_a_model_that_does_not_tell_tokens_is_refused_before_the_source_is_read(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "static"))
    module = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.StaticEmbedding"}
    (folder / "modules.json").write_text(json.dumps([module]))
    config = small.build(tmp_path)
    encoder = {"backend": "sentence-transformers", "model": str(folder), "batch_tokens": 96, **LENGTHS}
    config.write_text(json.dumps(small.settings(tmp_path) | {"encoder": encoder}))
    outcome = small.run("mine", config)
    assert outcome.code == 2 and "encoder.batch_tokens" in outcome.err and not (tmp_path / "run/ingest").exists()


def test_few_texts_are_tokenised_at_a_time(tiny: Path) -> None:
    """A tokenizer in Rust holds what it cuts off: of 2,048 long texts that would be gigabytes."""
    given: list[int] = []

    def tokenizer(texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        given.append(len(texts))
        return {"input_ids": [[0] * len(text.split()) for text in texts]}

    batches = batches_of(by(tiny, "flagembedding", 96), str(tiny), [tokenizer])(TEXTS * 3, "passage")
    assert max(given) <= 32 and sum(given) == len(TEXTS) * 3
    whole = by_tokens([len(text.split()) for text in TEXTS * 3], 96)
    assert [rows.tolist() for rows in batches] == [rows.tolist() for rows in whole]


def test_settings_that_do_not_go_together_are_refused(tiny: Path) -> None:
    with pytest.raises(ValidationError, match="batch_size and batch_tokens"):
        by(tiny, "flagembedding", 96, batch_size=8)
    with pytest.raises(ValidationError, match="set it to 24 or more"):
        by(tiny, "flagembedding", 23)
