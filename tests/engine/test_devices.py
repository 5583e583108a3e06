"""Several devices: which a config means, that they are there, and that each worker has its own. GPUs are stand-ins."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_source as small
from real_runs import Run

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.config.schema import Config
from negpipe.engine import devices
from negpipe.engine.fingerprint import DigestCache
from negpipe.engine.stage import Context
from negpipe.errors import BudgetError, ConfigError
from negpipe.stages import STAGES
from negpipe.train import stage as train
from negpipe.train import trainer

GPUS = Path(__file__).parents[1] / "injected_gpus"
MEMORY = 2**34


no_xpu = pytest.mark.skipif("__import__('torch').xpu.is_available()", reason="torch has an XPU here")


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs of 16 GiB, as torch counts them."""
    monkeypatch.setattr(devices, "gpus", lambda: (MEMORY,) * 3)
    monkeypatch.setattr(devices, "_driver", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def with_model(folder: Path, model: Path | str, *overrides: str) -> Config:
    small.build(folder)
    settings = small.settings(folder) | {
        "encoder": {"model": str(model), "pooling": "mean"},
        "executor": {"kind": "local"},
        "resources": {"cpus": 4},
    }
    return load_config(settings, [*overrides])


def context_of(config: Config, folder: Path) -> Context:
    return Context(config, config.run_dir, DigestCache(folder / "digests.json"))


# --- which ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "encoding", "searching"),
    [
        ((), ["cuda:0", "cuda:1", "cuda:2"], "cuda:0"),
        (("encoder.device=cpu",), ["cpu"], "cpu"),
        (("encoder.device=cuda",), ["cuda"], "cuda"),
        (("encoder.device=cuda:1",), ["cuda:1"], "cuda:1"),
        (("encoder.devices=[cuda:2, cuda:0]",), ["cuda:2", "cuda:0"], "cuda:2"),
        (("encoder.devices=[cpu, cpu]",), ["cpu", "cpu"], "cpu"),
        (("encoder.device=cpu", "search.device=cuda:1"), ["cpu"], "cuda:1"),
        (("search.device=cpu",), ["cuda:0", "cuda:1", "cuda:2"], "cpu"),
    ],
)
@pytest.mark.usefixtures("three")
def test_devices_that_a_config_means(
    settings: tuple[str, ...], encoding: list[str], searching: str, tmp_path: Path
) -> None:
    context = context_of(with_model(tmp_path, "model", *settings), tmp_path)
    of = {name: [*stage.within(context).devices()] for name, stage in STAGES.items()}
    assert (of.pop("ingest"), of.pop("encode")) == (["cpu"], encoding)
    assert of.keys() == {"index", "search", "triplets"} and all(found == [searching] for found in of.values())
    assert STAGES["encode"].within(context).workers == len(encoding)
    assert STAGES["search"].within(context).workers == 1


def test_without_a_gpu_there_is_one_worker_on_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_driver", lambda: False)
    context = context_of(with_model(tmp_path, "model"), tmp_path)
    devices.gpus.cache_clear()
    for stage in STAGES.values():
        assert stage.within(context).devices() == ("cpu",)
        assert stage.within(context).workers == 1


@pytest.mark.usefixtures("three")
def test_training_takes_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ["encoder.devices=[cuda:2, cuda:0]", "train.precision=bfloat16"]
    config = with_model(tmp_path, "model", *more)
    assert train.STAGE.within(context_of(config, tmp_path)).devices() == ("cuda:2",)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices.visible("cuda:2"))  # in its worker
    assert trainer.begin(config, 1, "cuda:2") == "cuda:0"


@pytest.mark.usefixtures("three")
def test_vectors_that_are_brought_need_no_device(tmp_path: Path) -> None:
    small.build(tmp_path)
    context = context_of(load_config(small.settings(tmp_path)), tmp_path)
    assert STAGES["encode"].within(context).devices() == ("cpu",)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["encoder.device=gpu"], r"encoder\.device: 'gpu' is not a device: write cpu, cuda or cuda:1"),
        (["encoder.devices=[cuda:0, cuda0]"], r"encoder\.devices\.1: 'cuda0' is not a device"),
        (["search.device=mps"], r"search\.device: 'mps' is not supported for search"),
        (["encoder.device=cpu", "encoder.devices=[cuda:0]"], r"device and devices are alternatives: remove one"),
    ],
)
def test_devices_that_are_none_are_refused_by_the_config(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        with_model(tmp_path, "model", *overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("encoder.device=cuda:3", r"encoder\.device: 'cuda:3' does not exist, torch sees 3 GPUs"),
        ("encoder.devices=[cuda:0, cuda:7]", r"encoder\.devices: 'cuda:7' does not exist"),
        ("search.device=cuda:4", r"search\.device: 'cuda:4' does not exist"),
        pytest.param("encoder.device=xpu", r"encoder\.device: 'xpu' cannot be used here \(.+\): name", marks=no_xpu),
        ("encoder.devices=[cuda:2, cpu]", None),
    ],
)
@pytest.mark.usefixtures("three")
def test_what_is_not_there_is_named_before_anything_runs(
    override: str, message: str | None, tmp_path: Path, tiny: Path
) -> None:
    config = with_model(tmp_path, tiny, override)
    if message is None:
        assert graph.mine(config, only="ingest").ran == ("ingest",)
        return
    with pytest.raises(ConfigError, match=message):
        graph.mine(config)
    assert not (tmp_path / "run/ingest").exists()
    if override.startswith("encoder."):  # a shard of another machine than ingest's
        graph.mine(with_model(tmp_path, tiny), only="ingest")
        with pytest.raises(ConfigError, match=message):
            graph.work(config, "encode", graph.Shard(0, 1))


@pytest.mark.usefixtures("three")
def test_a_precision_that_one_device_has_not_is_named_too(tmp_path: Path, tiny: Path) -> None:
    config = with_model(tmp_path, tiny, "encoder.precision=float16", "encoder.devices=[cuda:0, cpu]")
    with pytest.raises(ConfigError, match=r"encoder\.precision: 'float16' needs a GPU"):
        graph.mine(config)


def test_status_asks_no_torch(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> Any:
        raise AssertionError("this takes seconds")

    monkeypatch.setattr(devices, "gpus", asked)
    monkeypatch.setattr(devices, "_driver", lambda: True)
    config = with_model(tmp_path, tiny)
    assert graph.status(config)[0].state == "missing"


# --- memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "most"),
    [
        (["executor.workers=3"], 3),
        (["executor.workers=4"], 4),  # two on the first
        (["executor.workers=3", "encoder.device=cuda:1"], 2),
        (["executor.workers=4", "encoder.devices=[cuda:0, cuda]"], 2),  # one GPU by two names
        (["executor.workers=4", "encoder.device=cuda", "encoder.precision=float16"], 4),
    ],
)
def test_more_models_than_a_device_has_memory_for_are_refused_before_anything_runs(
    overrides: list[str], most: int, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.numpy

    weights = sum(array.size for array in safetensors.numpy.load_file(tiny / "model.safetensors").values())
    monkeypatch.setattr(devices, "gpus", lambda: (4 * weights * 2 + 1,) * 3)  # two in float32
    config = with_model(tmp_path, tiny, *overrides)
    if most >= (config.executor.workers or 0):
        STAGES["encode"].examine(context_of(config, tmp_path))
        return
    with pytest.raises(BudgetError, match=rf"{config.executor.workers} workers take .* {most} of them fit") as no:
        graph.mine(config)
    assert no.value.needed == config.executor.workers * 4 * weights > no.value.there  # type: ignore[operator]
    assert "executor.workers" in no.value.remedy
    assert not (tmp_path / "run/ingest").exists()


def test_models_on_the_cores_share_the_memory_of_the_machine(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_model(tmp_path, tiny, "encoder.devices=[cpu, cpu:1]")
    STAGES["encode"].examine(context_of(config, tmp_path))
    monkeypatch.setattr("negpipe.config.machine.memory", lambda: 2**16)
    with pytest.raises(BudgetError, match=r"2 workers take .* MiB of cpu"):
        STAGES["encode"].examine(context_of(config, tmp_path))


@pytest.mark.slow
def test_what_a_worker_imports_is_counted_beside_its_model(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured in a process that has loaded the model and encoded a text, as a worker does."""
    program = (
        "from sentence_transformers import SentenceTransformer;"
        f" SentenceTransformer({str(tiny)!r}, device='cpu').encode(['a text']);"
        " print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('RssAnon')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    one = 1024 * int(done.stdout.split()[-1])
    config = with_model(tmp_path, tiny, "executor.workers=4")
    monkeypatch.setattr("negpipe.config.machine.memory", lambda: 3 * one)
    with pytest.raises(BudgetError, match=r"MiB per worker, libraries included, 4 workers take .* MiB of cpu") as no:
        STAGES["encode"].examine(context_of(config, tmp_path))
    assert no.value.needed == pytest.approx(4 * one, rel=0.3)


# --- there ------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder in which the torch lies that the other process imports; there is a driver."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    monkeypatch.setattr(devices, "_DEV", tmp_path / "dev")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stand-in"))
    (tmp_path / "stand-in").mkdir()
    devices.gpus.cache_clear()
    yield tmp_path / "stand-in"
    devices.gpus.cache_clear()


TORCH = """
class cuda:
    is_available = staticmethod(lambda: AVAILABLE)
    device_count = staticmethod(lambda: 2)

    @staticmethod
    def get_device_properties(number):
        class properties:
            total_memory = 1000 + number

        return properties
"""


@pytest.mark.parametrize(("available", "found"), [(True, (1000, 1001)), (False, ())])
def test_gpus_are_those_that_torch_sees_in_another_process(
    asked: Path, available: bool, found: tuple[int, ...]
) -> None:
    (asked / "torch.py").write_text(TORCH.replace("AVAILABLE", str(available)))
    assert devices.gpus() == found


def test_a_torch_that_fails_has_no_gpus(asked: Path, caplog: pytest.LogCaptureFixture) -> None:
    (asked / "torch.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    assert devices.gpus() == ()
    assert "none is used" in caplog.text and "libcudart.so.12" in caplog.text


def test_without_a_driver_nobody_is_asked(asked: Path) -> None:
    (asked / "torch.py").write_text(TORCH.replace("AVAILABLE", "True"))
    (asked.parent / "dev/nvidiactl").unlink()
    assert devices.gpus() == ()


@pytest.mark.parametrize(
    ("ours", "device", "theirs", "name"),
    [
        (None, "cuda:2", "2", "cuda:2"),
        (None, "cuda", "0", "cuda:0"),
        ("4, 5,7", "cuda:2", "7", "cuda:2"),
        ("GPU-8f2e,MIG-1c", "cuda:1", "MIG-1c", "cuda:1"),
        ("6", "cuda:0", "6", "cuda:0"),
        ("6", "cuda:1", "", "cuda:0"),
        ("", "cuda:0", "", "cuda:0"),
        ("6", "cpu:1", "", "cpu"),
        (None, "mps", "", "mps"),
    ],
)
def test_a_process_is_shown_one_gpu_which_is_its_first(
    ours: str | None, device: str, theirs: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ours is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ours)
    assert (devices.visible(device), devices.own(device)) == (theirs, name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices.visible(device))
    assert devices.own(device) == ("cuda:0" if device.startswith("cuda") else name)


# --- runs -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("three")
def test_parts_go_to_whoever_is_free_each_on_a_device_of_its_own(
    golden: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two of three GPUs: one is busy with its first part until the other has made the rest, and the other's worker is
    killed. Bytes and names of parts stay."""
    run, notes = golden.copied(tmp_path / "run"), tmp_path / "notes"
    run.forget("encode")
    others = len(golden.parts("encode")) - 1
    told = {"notes": str(notes), "dies": "7", "waits": "4", "for": [str(run.folder / ".negpipe/encode"), others]}
    monkeypatch.setenv("GPUS", json.dumps(told))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(GPUS), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    more = ("encoder.devices=[cuda:0, cuda:2]", "executor.kind=local")
    with caplog.at_level(logging.WARNING):
        run.mine(*more, only="encode")

    assert "process" in caplog.text and "(cuda:2), died: signal SIGKILL" in caplog.text
    # What each worker is shown, what it calls that, and the two that the second GPU had.
    assert sorted(notes.read_text().splitlines()) == ["4 cuda:0 float32", *["7 cuda:0 float32"] * 2]
    made = [part["provenance"] for part in run.parts("encode")]
    assert Counter(provenance["device"] for provenance in made) == {"cuda:0": 1, "cuda:2": others}
    assert {provenance["device_kind"] for provenance in made} == {"a stand-in, cuda:0"}
    assert len({provenance["pid"] for provenance in made}) == 2
    assert run.content("encode") == golden.content("encode")
    assert run.mine().ran == ()


@pytest.mark.usefixtures("three")
def test_devices_without_a_worker_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from negpipe.engine.executors import local

    config = with_model(tmp_path, "model", "resources.cpus=2")
    context = STAGES["encode"].within(context_of(config, tmp_path))
    local.run(STAGES["encode"], iter(()), context, lambda *about: None)
    assert "encode: using 2 of 3 devices, one worker each" in caplog.text
