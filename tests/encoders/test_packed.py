"""Packed attention: vectors, counts and cuts are those of padded passes.

FlashAttention runs on GPUs only. Its function is replaced by one for the processor, with the same arguments; all else,
from joining the texts of a pass to pooling each of them, is the libraries' code.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_source as small
from model_vectors import TEXTS, settings
from pydantic import ValidationError

from negpipe import encoders
from negpipe.config.encoder import Encoder
from negpipe.config.file import load_config
from negpipe.encoders import backends
from negpipe.encoders.batched import Batched
from negpipe.encoders.batches import batches_of
from negpipe.errors import ConfigError
from negpipe.plan import variants
from negpipe.stages import encode

PACKED = {"attention": "flash_attention_2", "precision": "bfloat16"}


def _varlen(q: Any, k: Any, v: Any, cu_seqlens_q: Any, softmax_scale: float | None = None, **_: Any) -> Any:
    """flash_attn's function of this name: (tokens, heads, dimension) of texts that lie one after the other."""
    from torch.nn.functional import scaled_dot_product_attention

    joined = q.new_empty(q.shape)
    for first, end in pairwise(cu_seqlens_q.tolist()):
        one = [side[first:end].transpose(0, 1)[None] for side in (q, k, v)]
        joined[first:end] = scaled_dot_product_attention(*one, scale=softmax_scale)[0].transpose(0, 1)
    return joined


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FlashAttention seems to be installed, and a GPU to be there."""
    import transformers.modeling_flash_attention_utils as flash
    from transformers import PreTrainedModel

    functions = (_varlen, _varlen, None, flash._pad_input, flash._unpad_input)
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_process_flash_kwargs_fn"):
        monkeypatch.setattr(flash, name, None)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *_, **__: functions)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True)
    yield


def encoded(encoder: Encoder, path: str) -> tuple[np.ndarray[Any, Any], list[tuple[int, int]], list[tuple[int, int]]]:
    """Vectors, (texts, tokens) of each pass, (texts, tokens) cut."""
    library = backends.sentence_transformers(encoder, path, "cpu")
    batches = batches_of(encoder, path, library.tokenizers) if encoder.batch_tokens else None
    passes: list[tuple[int, int]] = []
    cuts: list[tuple[int, int]] = []
    model = Batched(encoder, library, ahead=False, batches=batches)
    made = model.encode(TEXTS, "passage", lambda *one: passes.append(one), lambda *one: cuts.append(one))
    return np.concatenate(list(made)), passes, cuts


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [None, 96])
def test_vectors_counts_and_cuts_are_those_of_padded_passes(tiny: Path, flash: None, tokens: int | None) -> None:
    plain = settings(tiny, "sentence-transformers", passage_max_length=20, batch_size=32 if tokens else 8)
    plain = plain.model_copy(update={"batch_tokens": tokens})
    # The stand-in computes in float32 too, which shows that only rounding differs.
    packed = plain.model_copy(update={"attention": "flash_attention_2"})
    padded, joined = encoded(plain, str(tiny)), encoded(packed, str(tiny))
    assert np.abs(padded[0] - joined[0]).max() < 1e-5
    # Where nothing is padded, the library does not sort texts by length.
    for each in (1, 2):
        assert np.sum(padded[each], axis=0).tolist() == np.sum(joined[each], axis=0).tolist()
    assert sum(texts for texts, _ in joined[1]) == len(TEXTS) and joined[2]
    half = encoded(packed.model_copy(update={"precision": "bfloat16"}), str(tiny))
    assert (half[0] * padded[0]).sum(axis=1).min() > 0.99


def test_it_is_part_of_the_key_only_where_it_is_set(tmp_path: Path) -> None:
    small.build(tmp_path)
    model = {"backend": "sentence-transformers", "model": "m", "precision": "bfloat16"}
    usual = load_config({**small.settings(tmp_path), "encoder": model})
    packed = load_config({**small.settings(tmp_path), "encoder": model | PACKED})
    assert encode._settings(packed) == encode._settings(usual) | {"encoder.attention": "flash_attention_2"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"precision": "float32"}, "set precision to bfloat16 or float16"),
        ({"backend": "flagembedding"}, "needs backend sentence-transformers"),
        ({"runtime": "openvino"}, "needs backend sentence-transformers and runtime torch"),
    ],
)
def test_what_it_does_not_go_with(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Encoder.model_validate({"backend": "sentence-transformers", "model": "m"} | PACKED | changes)


def test_a_device_or_package_it_lacks_is_named() -> None:
    encoder = Encoder.model_validate({"backend": "sentence-transformers", "model": "m"} | PACKED)
    with pytest.raises(ConfigError, match=r"encoder\.attention: 'flash_attention_2' needs a GPU: remove it on a CPU"):
        encoders.check_attention(encoder, "cpu")
    with pytest.raises(ConfigError, match=r"encoder\.attention: .* run `pip install flash-attn`"):
        encoders.check_attention(encoder, "cuda:0")


def test_plan_times_it_where_it_could_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder.model_validate({"backend": "sentence-transformers", "model": "m"})
    assert not any("attention" in way for way in variants._others(encoder, {}, "cuda:0"))
    (tmp_path / "flash_attn.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    packed = [way["precision"] for way in variants._others(encoder, {}, "cuda:0") if "attention" in way]
    assert packed == ["bfloat16", "float16"]
    assert not any("attention" in way for way in variants._others(encoder, {}, "cpu"))


@pytest.mark.slow
def test_a_model_that_cannot_pack_is_refused(flash: None, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    SentenceTransformer(modules=[StaticEmbedding(words, embedding_dim=8)]).save(str(tmp_path / "static"))
    encoder = Encoder.model_validate({"backend": "sentence-transformers", "model": str(tmp_path / "static")} | PACKED)
    with pytest.raises(ConfigError, match=r"encoder\.attention: .* does not support this model"):
        backends.sentence_transformers(encoder, str(tmp_path / "static"), "cpu")
