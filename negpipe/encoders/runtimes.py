"""Runtimes other than torch: the transformer of a model as a file run by ONNX Runtime or OpenVINO on a CPU.

Sentence Transformers keeps its tokenizer, prompts, pooling and later steps; torch's exporter writes the rest.
Guarantees: a file is found by the digest of the model's files, its precision and the versions of the exporting
libraries, so it never has other weights; it is written atomically, even if processes compete or are killed; a modified
file is exported again; before it appears, its vectors are compared with torch's. A model's folders `onnx` and
`openvino` are not read, as their weights are unknown. No telemetry is sent.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from negpipe.config.encoder import Encoder
from negpipe.config.machine import cache_folder
from negpipe.data.arrays import Floats, Ints
from negpipe.encoders.models import resolve_model
from negpipe.encoders.prompts import TASKS
from negpipe.engine import versions
from negpipe.engine.fingerprint import key
from negpipe.errors import ConfigError, InputError, StorageError
from negpipe.store.files import bytes_in, explained, file_digest, growing, remove, remove_temporaries, write_json
from negpipe.store.lock import held

logger = logging.getLogger(__name__)

VERSION = 1
_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
_SUFFIXES = {"onnx": ".onnx", "openvino": ".xml"}
_RECORD = "export.json"
_LEAST = {"float32": 0.999, "int8": 0.9}
"""Minimum cosine of vectors to those of torch in float32: less is not rounding, but a different function."""
_PROBES = ["word", "A sentence of some words, and 3 numbers: 1, 22, 333.", "Ein Satz in einer anderen Sprache. " * 20]
"""Texts of several lengths; the last is longer than the sliding window of models."""

Run = Callable[[Mapping[str, Ints]], Floats]
"""Inputs by name, each (texts, tokens), to token vectors: (texts, tokens, dimension)."""
_Install = Callable[[Path, str], None]
"""Makes a model run from a folder, in a precision."""


def is_installed(runtime: str) -> bool:
    """Whether the packages of a runtime are installed."""
    return not _missing(runtime)


def check_installed(runtime: str) -> None:
    """Raises ConfigError: they are not; the message has them and the extra."""
    if missing := _missing(runtime):
        raise ConfigError(
            f"encoder.runtime: '{runtime}' requires {' and '.join(missing)}: run `pip install 'negpipe[{runtime}]'`,"
            " or set encoder.runtime to torch"
        )


def _missing(runtime: str) -> list[str]:
    return [name for name in _PACKAGES.get(runtime, ()) if importlib.util.find_spec(name) is None]


def libraries(runtime: str) -> tuple[str, ...]:
    """Distributions, besides those of torch, that may change the bits of a vector."""
    return (*_PACKAGES[runtime], "onnx-ir") if runtime in _PACKAGES else ()


def exchange(model: Any, encoder: Encoder, path: str, threads: int) -> None:
    """Run the transformers of a model with `encoder.runtime`, from files that are exported if missing.

    Args:
        model: of Sentence Transformers, loaded from `path` in float32. It releases the weights of its transformers.
        encoder: the settings.
        path: the model's folder.
        threads: CPU threads.

    Raises:
        ConfigError: the runtime is not installed, or does not support this kind of model.
        InputError: the model cannot be exported, or gives different vectors.
        StorageError: there is no space for the files.
    """
    from sentence_transformers.base.modules import Transformer

    check_installed(encoder.runtime)
    _keep_silent()
    transformers = [module for module in model.modules() if isinstance(module, Transformer)]
    plain = {"method": "forward", "method_output_name": "last_hidden_state"}
    if not transformers or any(one.modality_config.get("text") != plain for one in transformers):
        raise ConfigError(
            f"encoder.runtime: '{encoder.runtime}' requires transformers with token vectors, and {path} has none:"
            " set encoder.runtime to torch"
        )
    positions = [positions_of(one.model) for one in transformers]
    install = partial(_install, transformers, positions, threads, encoder.runtime)
    folder = _folder(encoder, path)
    if not _is_whole(folder):
        with held(folder.parent / "lock", patience=-1):  # one exports, the others wait as long as it takes
            if not _is_whole(folder):
                _export(model, transformers, encoder, path, folder, install)
    install(folder, encoder.precision)


def positions_of(model: Any) -> int | None:
    """The number of tokens with learned positions in a transformers model; None: its positions are not learned."""
    from torch.nn import Embedding

    tables = [
        module
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, Embedding)
    ]
    # RoBERTa and similar models start after the position of padding.
    unused = (0 if one.padding_idx is None else one.padding_idx + 1 for one in tables)
    return min((one.num_embeddings - first for one, first in zip(tables, unused, strict=True)), default=None)


def _keep_silent() -> None:
    """Disable telemetry: ONNX Runtime reports sessions to Microsoft, and OpenVINO its import to Intel, without asking.
    Works only before they are imported."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    # None makes an import fail, which OpenVINO expects; typeshed only allows modules.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def _folder(encoder: Encoder, path: str) -> Path:
    """The folder for the files of a model, shared by all runs of a user."""
    cache = cache_folder() / "exports"
    digest = resolve_model(encoder.model_copy(update={"model": path}), file_digest).digest
    made_by = versions.installed(("torch", "transformers", *libraries(encoder.runtime)))
    return cache / key("export", VERSION, digest, encoder.runtime, _stored(encoder), made_by)


def _stored(encoder: Encoder) -> str:
    """The precision of the files: bfloat16 computation reads float32."""
    return "int8" if encoder.precision == "int8" else "float32"


def _is_whole(folder: Path) -> bool:
    """Whether the files exist, are unmodified, and were written for this folder: its name is the key of the weights."""
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        files = record["files"]
        return record["key"] == folder.name and all(
            file_digest(folder / name) == digest for name, digest in files.items()
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _export(model: Any, transformers: list[Any], encoder: Encoder, path: str, final: Path, install: _Install) -> None:
    """Write the folder of a model, and release its transformers."""
    stored, started = _stored(encoder), time.monotonic()
    logger.info("encoder.runtime: exporting %s for %s, %s", path, encoder.runtime, stored)
    remove_temporaries(final.parent, own=False)
    remove(final)
    expected = _probed(model)
    with growing(final, single=False) as folder:
        for number, transformer in enumerate(transformers):
            try:
                with tempfile.TemporaryDirectory(dir=folder) as exact, explained(folder), _quiet():
                    as_it_is = (encoder.runtime, stored) == ("onnx", "float32")
                    onnx = _write_onnx(transformer, (folder if as_it_is else Path(exact)) / f"{number}.onnx")
                    if encoder.runtime == "openvino":
                        _keep_openvino(onnx, folder, stored)
                    elif not as_it_is:
                        _keep_int8(onnx, folder)
            except StorageError:
                raise
            except Exception as error:  # exporters raise any error caused by a model's code
                raise InputError(
                    f"the model cannot be exported: {type(error).__name__}: {error}",
                    file=path,
                    remedy="Set encoder.runtime to torch",
                ) from error
        install(folder, stored)
        cosine = float((expected * _probed(model)).sum(axis=1).min())
        if not cosine >= _LEAST[stored]:
            raise InputError(
                f"as {stored} in {encoder.runtime}, the model gives different vectors: one has the cosine {cosine:.4f}"
                f" to that of torch, below the minimum of {_LEAST[stored]}",
                file=path,
                remedy="Set encoder.runtime to torch" + ", or encoder.precision to float32" * (stored == "int8"),
            )
        files = {file.name: file_digest(file) for file in sorted(folder.iterdir())}
        write_json(folder / _RECORD, {"key": final.name, "model": path, "least_cosine": cosine, "files": files})
    logger.info(
        "encoder.runtime: exported in %.0f s, %d bytes, to %s; minimum cosine of %d vectors to torch's: %.5f",
        time.monotonic() - started,
        bytes_in(final),
        final,
        len(expected),
        cosine,
    )


def _probed(model: Any) -> Floats:
    """(m, d) vectors of length 1 through every route of the model, two texts per batch, the last one alone."""
    options = {"batch_size": 2, "normalize_embeddings": True, "show_progress_bar": False}
    return np.concatenate([model.encode(_PROBES, task=task, **options) for task in TASKS.values()])


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence exporters and quantizers, which log every node."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _write_onnx(transformer: Any, file: Path) -> Path:
    import torch

    features = transformer.preprocess(["a text", "another text, and a longer one"])
    taken = inspect.signature(transformer.model.forward).parameters
    inputs = {name: value for name, value in features.items() if name in taken and isinstance(value, torch.Tensor)}

    class Model(torch.nn.Module):  # type: ignore[misc]  # torch is not typed here
        def __init__(self) -> None:
            super().__init__()
            self.model = transformer.model

        def forward(self, *values: Any) -> Any:
            return self.model(**dict(zip(inputs, values, strict=True)), return_dict=True)["last_hidden_state"]

    model = Model()
    sizes = {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens")}
    with torch.no_grad():
        torch.onnx.export(
            model.eval(),
            tuple(inputs.values()),
            str(file),
            input_names=[*inputs],
            output_names=["last_hidden_state"],
            dynamic_shapes=(tuple(sizes for _ in inputs),),
            dynamo=True,
            external_data=True,  # one file may hold 2 GiB
            verbose=False,
        )
    return file


def _keep_int8(onnx: Path, folder: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        onnx,
        folder / onnx.name,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        reduce_range=True,  # 8-bit sums overflow on processors without VNNI
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
    )


def _keep_openvino(onnx: Path, folder: Path, stored: str) -> None:
    import openvino

    model = openvino.Core().read_model(onnx)
    if stored == "int8":
        _to_int8(model)
    openvino.save_model(model, folder / f"{onnx.stem}.xml", compress_to_fp16=False)


def _to_int8(model: Any) -> None:
    """Replace weights of matrix products by int8 and a scale per output, so that OpenVINO multiplies in int8."""
    from openvino import opset13

    for product in model.get_ordered_ops():
        weights = product.input_value(1).get_node() if product.get_type_name() == "MatMul" else None
        if weights is None or weights.get_type_name() != "Constant":
            continue
        exact = weights.data
        largest = np.abs(exact).max(axis=1 if product.get_attributes()["transpose_b"] else 0, keepdims=True)
        scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
        rounded = opset13.convert(opset13.constant(np.rint(exact / scale).astype(np.int8)), "f32")
        product.input(1).replace_source_output(opset13.multiply(rounded, opset13.constant(scale)).output(0))


def _install(
    transformers: list[Any], positions: list[int | None], threads: int, runtime: str, folder: Path, precision: str
) -> None:
    """Replace the transformers model in Sentence Transformers by one that runs a file."""
    import torch

    opened = _open_onnx if runtime == "onnx" else _open_openvino
    for number, (transformer, longest) in enumerate(zip(transformers, positions, strict=True)):
        run = opened(folder / f"{number}{_SUFFIXES[runtime]}", precision, threads)
        model = torch.nn.Module()
        model.config = transformer.model.config
        model.forward = _forward(run, longest)
        transformer.model = model


def _forward(run: Run, longest: int | None) -> Callable[..., dict[str, Any]]:
    import torch

    def forward(**features: Any) -> dict[str, Any]:
        arrays = {name: value.numpy() for name, value in features.items() if isinstance(value, torch.Tensor)}
        shape = arrays["attention_mask"].shape
        if longest is not None and shape[1] > longest:  # OpenVINO would read past the table
            raise RuntimeError(f"the model has positions for {longest} tokens only")
        try:
            hidden = run(arrays)
        except Exception as error:  # errors of ONNX Runtime have no common base class
            raise RuntimeError(str(error).partition("\n")[0]) from error
        if hidden.shape[:2] != shape:
            raise RuntimeError(f"the runtime returned vectors of {hidden.shape[0]} texts and {hidden.shape[1]} tokens")
        return {"last_hidden_state": torch.from_numpy(hidden)}

    return forward


def _open_onnx(file: Path, precision: str, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    return lambda inputs: session.run(None, {name: inputs[name] for name in names})[0]


def _open_openvino(file: Path, precision: str, threads: int) -> Run:
    import openvino

    options = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # workers would be pinned to the same cores
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bfloat16" else "f32",  # else it chooses
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 32,  # values of a token that share a scale in int8
        "CPU_RUNTIME_CACHE_CAPACITY": 16,  # kernels, enough for layers to share; with 5,000, every shape keeps its own
    }
    model = openvino.Core().compile_model(file, "CPU", options)
    names = [one.any_name for one in model.inputs]
    request = model.create_infer_request()
    return lambda inputs: request.infer({name: inputs[name] for name in names})[model.output(0)]
