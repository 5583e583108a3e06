"""The transformer run by ONNX Runtime and OpenVINO: its vectors beside torch's, and the files it is run from."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import learnable
import numpy as np
import pytest
import small_source as small
from model_vectors import TEXTS, ignore, loaded, settings
from real_runs import Run, encoding_here
from tiny_model import build_tiny_model

from negpipe import encoders
from negpipe.config.file import load_config
from negpipe.encoders import is_installed, runtimes
from negpipe.errors import ConfigError, InputError, TaskFailedError

pytestmark = pytest.mark.slow

_PATIENCE = 600  # seconds: an export takes two, and a hundred where others take the processor
LOAD = """
import logging, sys
logging.basicConfig(level=logging.INFO)
from model_vectors import loaded, settings
loaded(settings(sys.argv[1], "sentence-transformers", runtime=sys.argv[2]))
"""
needs = {
    name: pytest.mark.skipif(not is_installed(name), reason=f"the extra {name} is not installed")
    for name in ("onnx", "openvino")
}
RUNTIMES = [pytest.param(name, marks=mark) for name, mark in needs.items()]
units = pytest.mark.skipif(not encoders.has_units("bfloat16", "cpu"), reason="this processor has no units for bfloat16")


@pytest.fixture(scope="module", autouse=True)
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Files are exported to a place of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place of one test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "negpipe" / "exports"


def of(folder: Path, runtime: str, precision: str = "float32", **more: Any) -> Any:
    return loaded(settings(folder, "sentence-transformers", runtime=runtime, precision=precision, **more))


def vectors(folder: Path, runtime: str, precision: str = "float32") -> Any:
    return of(folder, runtime, precision).encode(TEXTS, "passage", ignore)


def folders(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("runtime", "precision", "least"),
    [
        pytest.param("onnx", "float32", 0.99999, marks=needs["onnx"]),
        pytest.param("onnx", "int8", 0.95, marks=needs["onnx"]),
        pytest.param("openvino", "float32", 0.99999, marks=needs["openvino"]),
        pytest.param("openvino", "bfloat16", 0.999, marks=[needs["openvino"], units]),
        pytest.param("openvino", "int8", 0.99, marks=needs["openvino"]),
    ],
)
def test_vectors_batches_and_cuts_are_those_of_torch(tiny: Path, runtime: str, precision: str, least: float) -> None:
    def seen(encoder: Any) -> tuple[Any, list[tuple[int, int]], list[tuple[int, int]]]:
        batches: list[tuple[int, int]] = []
        cuts: list[tuple[int, int]] = []
        blocks = encoder.blocks(TEXTS, "passage", lambda *one: batches.append(one), lambda *one: cuts.append(one))
        return np.concatenate(list(blocks)), batches, cuts

    expected, *told = seen(of(tiny, "torch", passage_max_length=40))
    found, *told_here = seen(of(tiny, runtime, precision, passage_max_length=40))
    assert told_here == told and sum(lost for _, lost in told[1]) > 0
    assert found.dtype == np.float32 and (expected * found).sum(axis=1).min() > least
    assert not np.array_equal(expected, found)


@pytest.mark.guarantee(
    "an exported file is of other weights, whether beside the model or in the cache",
    "the first is not read, the second is made again",
    section="input",
)
@needs["onnx"]
@pytest.mark.parametrize(("precision", "least"), [("float32", 0.99999), ("int8", 0.95)])
def test_a_model_is_exported_once_other_weights_again_and_never_mixed(
    tiny: Path, tmp_path: Path, cache: Path, precision: str, least: float
) -> None:
    first = vectors(tiny, "onnx", precision)
    (folder,) = folders(cache)
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    moved = Path(shutil.copytree(tiny, tmp_path / "elsewhere" / "moved"))
    # What lies beside a model may be of any weights, and is not looked at.
    (moved / "onnx").mkdir()
    (moved / "onnx" / "model.onnx").write_bytes(b"of other weights")
    assert vectors(moved, "onnx", precision).tobytes() == first.tobytes()
    assert folders(cache) == [folder]
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before

    other = build_tiny_model(tmp_path / "other", seed=9)
    expected, found = vectors(other, "torch"), vectors(other, "onnx", precision)
    assert (expected * found).sum(axis=1).min() > least and (first * found).sum(axis=1).max() < 0.99
    (foreign,) = (one for one in folders(cache) if one != folder)

    # Files of two models of a kind are of the same size, and either loads.
    for names in (before.keys() - {"export.json"}, before.keys()):
        for name in names:
            assert name == "export.json" or (foreign / name).stat().st_size == (folder / name).stat().st_size
            shutil.copy(foreign / name, folder / name)
        assert vectors(tiny, "onnx", precision).tobytes() == first.tobytes()


@pytest.mark.guarantee(
    "a model is exported for another runtime by two processes, or by one that is killed",
    "one complete file, exported once; nothing else is left, and no telemetry is sent",
)
@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_kills_and_rivals_leave_one_whole_file_and_nothing_is_told_to_anybody(
    tiny: Path, tmp_path: Path, cache: Path, runtime: str
) -> None:
    """Both libraries would note an id of this machine in the user's folders, and send it."""
    home = tmp_path / "home"
    environment = os.environ | {"HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    for name in ("CI", "ORT_DISABLE_TELEMETRY"):  # would keep them from it
        environment.pop(name, None)

    def started() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", LOAD, str(tiny), runtime]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    killed = started()
    while not (cache.is_dir() and any(path.name.endswith(".tmp") for path in cache.iterdir())):
        assert killed.poll() is None
        time.sleep(0.0005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=_PATIENCE)
    assert [path.name.endswith(".tmp") for path in folders(cache)] == [True]

    both = [started() for _ in range(2)]
    logs = [process.communicate(timeout=_PATIENCE)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], logs
    assert sum(log.count("encoder.runtime: exporting") for log in logs) == 1
    assert [path.name.endswith(".tmp") for path in folders(cache)] == [False]
    assert (vectors(tiny, runtime) * vectors(tiny, "torch")).sum(axis=1).min() > 0.99999
    assert {path.name for path in cache.parent.parent.iterdir()} == {"negpipe"} and not home.exists()


@needs["onnx"]
def test_onnx_runtime_has_the_threads_asked_for(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of(tiny, "onnx")  # imports it, silenced
    import onnxruntime

    sessions: list[Any] = []
    real = onnxruntime.InferenceSession

    def opened(*args: Any, **more: Any) -> Any:
        sessions.append(real(*args, **more))
        return sessions[-1]

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    for threads in (1, 3):
        encoders.load(settings(tiny, "sentence-transformers", runtime="onnx"), str(tiny), threads)
    options = [one.get_session_options() for one in sessions[-2:]]
    assert [one.intra_op_num_threads for one in options] == [1, 3]


@needs["openvino"]
def test_openvino_has_the_threads_asked_for_on_no_core_of_their_own(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of(tiny, "openvino")  # imports it, silenced
    import openvino

    models: list[Any] = []
    real = openvino.Core.compile_model

    def compiled(*args: Any) -> Any:
        models.append(real(*args))
        return models[-1]

    monkeypatch.setattr(openvino.Core, "compile_model", compiled)
    for threads in (1, 2):
        encoder = encoders.load(settings(tiny, "sentence-transformers", runtime="openvino"), str(tiny), threads)
        list(encoder.encode(TEXTS, "passage", ignore))
    assert [one.get_property("INFERENCE_NUM_THREADS") for one in models[-2:]] == [1, 2]
    assert not models[-1].get_property("ENABLE_CPU_PINNING")
    tasks = [int(one.name) for one in Path("/proc/self/task").iterdir()]
    assert {frozenset(os.sched_getaffinity(one)) for one in tasks} == {frozenset(os.sched_getaffinity(0))}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_bits_are_the_same_with_any_number_of_threads(tiny: Path, runtime: str) -> None:
    found = [
        np.concatenate([*encoders.load(one, str(tiny), threads).encode(TEXTS, "passage", ignore)]).tobytes()
        for one in [settings(tiny, "sentence-transformers", runtime=runtime, precision="int8")]
        for threads in (1, 3)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_memory_does_not_grow_with_the_shapes_of_batches(tiny: Path, runtime: str) -> None:
    """OpenVINO would keep kernels of each, 2 MB even for so small a model."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    encoder = of(tiny, runtime, batch_size=2)
    encoder.encode(["a " * 120] * 2, "passage", ignore)
    before = resident()
    encoder.encode([text for length in range(1, 110) for text in ["a " * length] * 2], "passage", ignore)
    assert resident() - before < 60 * 2**20


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_what_fails_in_the_runtime_names_batch_and_text(tmp_path: Path, runtime: str) -> None:
    from safetensors.torch import load_file, save_file

    short = build_tiny_model(tmp_path / "short", max_length=16)
    weights = load_file(short / "model.safetensors")
    words = (short / "vocab.txt").read_text().splitlines()
    weights["embeddings.word_embeddings.weight"][words.index("error")] = float("nan")
    save_file(weights, short / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TaskFailedError, match=r"8 texts of 6\d tokens.*encoder\.passage_max_length"):
        of(short, runtime, passage_max_length=64).encode(TEXTS, "passage", ignore)
    with pytest.raises(InputError, match="row 1: the vector of this text is not finite"):
        of(short, runtime, passage_max_length=16).encode(["a text", "an error"], "passage", ignore)


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "MPNet", "DistilBert", "Llama"])
def test_no_more_tokens_are_taken_than_torch_would(kind: str) -> None:
    """OpenVINO reads beyond a table of positions and tells nobody."""
    import torch
    import transformers

    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}
    named = {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8, "vocab_size": 9} if kind == "DistilBert" else size
    config = getattr(transformers, f"{kind}Config")(**named, max_position_embeddings=16, pad_token_id=1)
    model = getattr(transformers, f"{kind}Model")(config).eval()

    def takes(tokens: int) -> bool:
        ids = torch.full((1, tokens), 5)
        try:
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
        except (IndexError, RuntimeError):
            return False
        return True

    longest = runtimes.positions_of(model)
    assert takes(longest or 32) and (longest is None or not takes(longest + 1))
    assert (longest is None) == (kind == "Llama")


@needs["onnx"]
def test_weights_that_int8_does_not_hold_are_refused(tiny: Path, tmp_path: Path, cache: Path) -> None:
    """A weight a million times the others of its column leaves them nothing but zero."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny, tmp_path / "outlier"))
    weights = load_file(folder / "model.safetensors")
    for name, value in weights.items():
        if name.endswith("dense.weight"):
            value[:, 0] *= 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"the model gives different vectors.*encoder\.runtime to torch, or encoder\.precision"
    ):
        of(folder, "onnx", "int8")
    assert folders(cache) == []


@pytest.mark.parametrize(("runtime", "package"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_a_missing_package_is_named_before_the_source_is_read(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str, package: str
) -> None:
    config = small.build(tmp_path)
    encoder = {"backend": "sentence-transformers", "model": str(tiny), "runtime": runtime}
    config.write_text(json.dumps({**small.settings(tmp_path), "encoder": encoder}))
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not there
    outcome = small.run("mine", config)
    assert outcome.code == 2 and package in outcome.err and f"pip install 'negpipe[{runtime}]'" in outcome.err
    assert not (tmp_path / "run" / "ingest").exists()


@needs["onnx"]
def test_a_model_without_a_transformer_is_refused(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "text": 1}, unk_token="a"))
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=4)]).save(str(tmp_path / "static"))
    with pytest.raises(
        ConfigError, match=r"encoder\.runtime: 'onnx' requires transformers .* set encoder\.runtime to torch"
    ):
        of(tmp_path / "static", "onnx")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"runtime": "onnx", "backend": "flagembedding"},
            "'onnx' does not support backend 'flagembedding': set backend to",
        ),
        ({"runtime": "openvino", "device": "cuda:1"}, "'openvino' runs on a CPU, not on 'cuda:1'"),
        ({"precision": "int8"}, "'torch' does not compute in int8: set .* or runtime to onnx or openvino"),
        ({"runtime": "onnx", "precision": "bfloat16"}, "'onnx' does not compute in bfloat16.*torch or openvino"),
        ({"runtime": "openvino", "precision": "float16"}, "'openvino' does not compute in float16.*runtime to torch"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(more: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config({"encoder": {"backend": "sentence-transformers", "model": "some/model", **more}})


@needs["onnx"]
def test_a_run_keeps_its_vectors_apart_and_says_what_made_them(tiny: Path, tmp_path: Path) -> None:
    data = learnable.build(tmp_path / "beir")
    run = Run(learnable.settings(tmp_path / "run", data, tiny))
    with encoding_here():
        run.mine()
        torch = {part["key"]: run.folder / part["files"][0]["path"] for part in run.parts("encode")}
        run.mine("encoder.runtime=onnx")
    onnx = run.parts("encode")
    assert not {part["key"] for part in onnx} & {*torch}
    for part, path in zip(onnx, torch.values(), strict=True):
        assert part["provenance"]["libraries"]["onnxruntime"] and part["provenance"]["precision"] == "float32"
        np.testing.assert_allclose(np.load(run.folder / part["files"][0]["path"]), np.load(path), atol=2e-3)
    states = run.states("encoder.runtime=onnx")
    assert (states["encode"].state, states["triplets"].state) == ("current", "current")
    assert run.states()["encode"].state == "stale"
