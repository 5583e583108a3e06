"""Shorter vectors, against Sentence Transformers' own `truncate_dim`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_source as small
from model_vectors import BACKENDS, TEXTS, ignore, loaded, settings

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.errors import ConfigError
from negpipe.stages import encode


def theirs(folder: Path, width: int | None, *, normalize: bool = True) -> Any:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), truncate_dim=width, device="cpu")
    return model.encode(TEXTS, normalize_embeddings=normalize, batch_size=8)


@pytest.mark.cases
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("width", [1, 20, 32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_sentence_transformers(tiny: Path, backend: str, width: int, normalize: bool) -> None:
    encoder = settings(tiny, backend, truncate_dim=width, normalize=normalize)
    vectors = loaded(encoder).encode(TEXTS, "passage", ignore)
    assert vectors.shape == (len(TEXTS), width)
    np.testing.assert_allclose(vectors, theirs(tiny, width, normalize=normalize), rtol=1e-4, atol=1e-5)


def test_what_is_asked_for_wins_over_the_models_own(tiny: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(tiny, tmp_path / "own"))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {}, "truncate_dim": 8}))
    for width in (None, 4, 20):
        encoder = settings(folder, "sentence-transformers", truncate_dim=width)
        np.testing.assert_allclose(
            loaded(encoder).encode(TEXTS, "passage", ignore), theirs(folder, width), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_numbers_than_a_vector_has_are_refused_before_a_text_is_encoded(tiny: Path, backend: str) -> None:
    with pytest.raises(ConfigError, match=r"encoder\.truncate_dim.*\b32\b"):
        loaded(settings(tiny, backend, truncate_dim=33))


@pytest.mark.cases
@pytest.mark.parametrize("normalize", [True, False])
def test_vectors_that_the_user_brings(tmp_path: Path, normalize: bool) -> None:
    small.build(tmp_path)
    overrides = [f"encoder.normalize={str(normalize).lower()}", "encoder.storage=float32", "encoder.truncate_dim=5"]
    graph.mine(load_config(small.settings(tmp_path), overrides))
    brought = {"corpus": np.load(tmp_path / "corpus.npy"), "anchors": np.load(tmp_path / "anchors.npy")}
    manifest = json.loads((tmp_path / "run/.negpipe/encode/manifest.json").read_text("utf-8"))
    for kind, vectors in brought.items():
        parts = [part for part in manifest["parts"] if part["kind"] == kind]
        stored = np.concatenate([np.load(tmp_path / "run" / part["files"][0]["path"]) for part in parts])
        expected = vectors[:, :5]
        if normalize:
            expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(stored, expected, rtol=1e-6)


def test_brought_vectors_that_are_narrower_are_refused_before_the_source_is_read_again(tmp_path: Path) -> None:
    small.build(tmp_path)
    config = load_config(small.settings(tmp_path), ["encoder.truncate_dim=9"])
    with pytest.raises(ConfigError, match=r"encoder\.truncate_dim.*\b8\b"):
        graph.mine(config)
    assert not (tmp_path / "run/encode").exists()


@pytest.mark.parametrize("backend", ["precomputed", *BACKENDS])
def test_part_of_the_key_only_where_it_is_set(tmp_path: Path, backend: str) -> None:
    tree = small.settings(tmp_path)
    tree["encoder"] |= {"backend": backend, "model": "some/model"}
    for width in (None, 5):
        tree["encoder"]["truncate_dim"] = width
        asked = encode.STAGE.settings(load_config(tree))
        assert ("encoder.truncate_dim" in asked) is (width is not None)
