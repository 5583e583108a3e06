"""Which devices a config refers to, whether they exist, and how a process is restricted to one of them.

A device has torch's name for it in the process that reads the config: cpu, cuda, cuda:1 … This module does not import
torch: the import takes seconds, and torch must not meet FAISS in the driver. A subprocess is asked instead.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from negpipe.config import machine
from negpipe.config.schema import Config
from negpipe.errors import ConfigError

logger = logging.getLogger(__name__)

CPU = "cpu"
ANY = "any"
"""Ray decides: a GPU if the cluster has any, else the cores. Without Ray, the cores."""
_DEV = Path("/dev")
_DRIVERS = ("nvidia*", "nvhost*", "dxg", "kfd")  # NVIDIA, Jetson, WSL, AMD
_ASK = """
import torch
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
print(*(torch.cuda.get_device_properties(number).total_memory for number in range(count)))
"""


def of_encoder(config: Config) -> tuple[str, ...]:
    """The devices that the model runs on, one per worker.

    Raises:
        ConfigError: a device does not exist.
    """
    encoder = config.encoder
    if encoder.backend == "precomputed":
        return (CPU,)
    if config.executor.kind == "ray":
        return (encoder.device or ANY,)
    if encoder.devices:
        return _there(encoder.devices, "encoder.devices")
    if encoder.device:
        return _there([encoder.device], "encoder.device")
    return tuple(f"cuda:{number}" for number in range(len(gpus()))) or (CPU,)


def of_search(config: Config) -> tuple[str, ...]:
    """The device that computes products during search. Without `search.device`, it need not exist.

    Raises:
        ConfigError: `search.device` does not exist.
    """
    if config.executor.kind == "ray":
        return (config.search.device or config.encoder.device or ANY,)
    if config.search.device:
        return _there([config.search.device], "search.device")
    named = next(iter(config.encoder.devices), config.encoder.device)
    name = named or ("cuda:0" if _driver() else CPU)
    return (name if is_gpu(name) else CPU,)


@functools.cache
def gpus() -> tuple[int, ...]:
    """Bytes of memory of each GPU that torch sees."""
    if not _driver():
        return ()
    asked = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, check=False)
    if asked.returncode:
        logger.warning("torch could not list the GPUs, so none is used: %s", asked.stderr.strip()[-300:])
        return ()
    return tuple(map(int, asked.stdout.split()))


def memory(name: str) -> int:
    """Bytes of memory of an existing device."""
    return gpus()[_number(name)] if is_gpu(name) else machine.memory()


def is_gpu(name: str) -> bool:
    """Whether torch uses it through CUDA, which includes AMD GPUs."""
    return name.startswith("cuda")


def same(name: str) -> str:
    """The canonical name of a device: cpu:1 and any are cpu, cuda is cuda:0."""
    return f"cuda:{_number(name)}" if is_gpu(name) else CPU if name.startswith((CPU, ANY)) else name


def visible(name: str) -> str:
    """CUDA_VISIBLE_DEVICES for a process that may use only this device; empty if it does not exist."""
    if not is_gpu(name):
        return ""
    number, ours = _number(name), os.environ.get("CUDA_VISIBLE_DEVICES")
    return str(number) if ours is None else "".join(ours.split(",")[number : number + 1]).strip()


def own(name: str) -> str:
    """torch's name for a device in this process: a GPU that is the only visible one is cuda:0."""
    alone = "," not in os.environ.get("CUDA_VISIBLE_DEVICES", ",")
    return "cuda:0" if is_gpu(name) and alone else same(name)


def _there(names: Sequence[str], setting: str) -> tuple[str, ...]:
    for name in names:
        if is_gpu(name) and _number(name) >= len(gpus()):
            raise ConfigError(
                f"{setting}: '{name}' does not exist, torch sees {len(gpus())} GPUs: name another, or set it to cpu"
            )
        if not is_gpu(name) and same(name) != CPU and (problem := _problem(name)):
            raise ConfigError(f"{setting}: '{name}' cannot be used here ({problem}): name another, or set it to cpu")
    return tuple(names)


@functools.cache
def _problem(name: str) -> str:
    """Why torch cannot use a device such as mps or xpu; empty if it can."""
    tried = f"import torch; torch.ones(1, device={name!r}).sum().item()"
    asked = subprocess.run([sys.executable, "-c", tried], capture_output=True, text=True, check=False)
    said = asked.stderr.strip().splitlines() or [f"exit code {asked.returncode}"]
    error = next((line for line in said if re.match(r"\w*Error: ", line)), said[-1])
    return (error.partition(": ")[2] or error).partition(". ")[0][:200] if asked.returncode else ""


def _number(name: str) -> int:
    return int(name.partition(":")[2] or 0)


def _driver() -> bool:
    """Whether there is any sign of a GPU; if not, torch need not be asked."""
    return any(next(_DEV.glob(pattern), None) for pattern in _DRIVERS)
