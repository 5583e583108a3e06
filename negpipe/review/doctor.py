"""Describes this machine and installation on one page to paste into an issue. Contains no secrets.

Nothing is written, and the network is only used to check whether the hub answers. What would stop every run is reported
as broken; what only some runs need (a GPU, the hub) is just stated.
"""

from __future__ import annotations

import http.client
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from textwrap import fill
from typing import NamedTuple
from urllib.parse import urlsplit

from negpipe import __version__
from negpipe.config import machine
from negpipe.engine import devices, processor
from negpipe.engine.versions import installed
from negpipe.redaction import HIDDEN, redact
from negpipe.review.wording import size

_WIDTH = 120  # characters of a line, if it has blanks to break at
_SECONDS = 3  # seconds the hub has to answer
_LOADING = 120  # seconds a library has to load, from an uncached disk
_LOADED = ("faiss", "torch")  # partly compiled: they fail if the machine lacks what they need
_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16")
_VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"),
    *("HF_HUB_DISABLE_XET", "SLURM_JOB_ID", "SLURM_CPUS_PER_TASK"),
)
_PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "https_proxy", "http_proxy", "no_proxy")
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_GPUS = "import torch; print(*map(torch.cuda.get_device_name, range(torch.cuda.device_count())), sep='\\n')"


class Fact(NamedTuple):
    """A line of the page. `remedy`: how to fix it if broken, else empty."""

    about: str
    name: str
    value: str
    remedy: str = ""


def examine(folder: Path = Path()) -> list[Fact]:
    """Every fact, in the order of the page; `folder`: its disk is checked. Takes seconds, as libraries are loaded."""
    with ThreadPoolExecutor() as pool:
        loading = [pool.submit(_loaded, name) for name in _LOADED]
        hub = pool.submit(_hub)
        facts = [*_program(), *_libraries(), *_processor(), *_memory(), *_gpus(), *_disks(folder), *_environment()]
        facts += [future.result() for future in loading]
        facts.append(hub.result())
    return [fact._replace(value=_without_secrets(fact.value)) for fact in facts]


def broken(facts: list[Fact]) -> list[str]:
    """Everything that would stop a run, with the remedy, one line each."""
    return [f"{fact.name}: {fact.value}. {fact.remedy}" for fact in facts if fact.remedy]


def page(facts: list[Fact]) -> str:
    """The facts as Markdown."""
    lines = [f"### negpipe {__version__}"]
    for about in dict.fromkeys(fact.about for fact in facts):
        lines += ["", f"**{about}**", ""]
        for fact in (fact for fact in facts if fact.about == about):
            line = f"- {fact.name}: {fact.value}{' (broken)' * bool(fact.remedy)}"
            lines.append(fill(line, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))
    return "\n".join(lines)


def _without_secrets(text: str) -> str:
    text = redact(text)
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) > 3:
            text = text.replace(value, HIDDEN)
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text


def _program() -> Iterator[Fact]:
    remedy = "" if sys.version_info >= (3, 11) else "Install Python 3.11 or newer"
    environment = "virtual environment" if sys.prefix != sys.base_prefix else "no virtual environment"
    version = f"{platform.python_version()} ({platform.python_implementation()}, {environment})"
    yield Fact("Program", "Python", version, remedy)
    yield Fact("Program", "system", f"{platform.platform()}, {' '.join(platform.libc_ver())}")


def _libraries() -> Iterator[Fact]:
    try:
        required = requires("negpipe") or []
    except PackageNotFoundError:
        yield Fact("Libraries", "negpipe", "runs from a folder without being installed: its requirements are unknown")
        return
    wanted = {re.split(r"[^\w.-]", line, maxsplit=1)[0]: "extra ==" not in line for line in reversed(required)}
    found = installed(wanted)
    yield Fact("Libraries", "required", ", ".join(f"{name} {found[name]}" for name in sorted(found) if wanted[name]))
    extras = [name for name in sorted(found) if not wanted[name]]
    if extras:
        yield Fact("Libraries", "from extras", ", ".join(f"{name} {found[name]}" for name in extras))
    if missing := sorted(name for name, always in wanted.items() if always and name not in found):
        yield Fact("Libraries", "missing", ", ".join(missing), f"Run pip install {' '.join(missing)}")


def _loaded(name: str) -> Fact:
    """Whether a library loads, tested in a separate process."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {name}"], capture_output=True, text=True, check=False, timeout=_LOADING
        )
    except subprocess.TimeoutExpired:
        return Fact("Libraries", name, f"does not load within {_LOADING} s", "Check the disk that Python is on")
    if done.returncode == 0:
        return Fact("Libraries", name, "loads")
    why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return Fact("Libraries", name, f"does not load: {why[:300]}", f"Reinstall {name}")


def _processor() -> Iterator[Fact]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    yield Fact("Machine", "processor", next(names, platform.processor() or platform.machine()))
    yield Fact("Machine", "cores", f"{machine.cores()} of {os.cpu_count()}")
    features = [name for name in _FEATURES if name in processor.flags()]
    yield Fact("Machine", "features", ", ".join(features) or "not known")


def _memory() -> Iterator[Fact]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    usable = machine.memory()
    limit = f", a container's limit; the machine has {size(total)}" if usable < total else ""
    yield Fact("Machine", "memory", f"{size(usable)}{limit}; {size(_available())} available")
    for name, kind in (("address space", resource.RLIMIT_AS), ("open files", resource.RLIMIT_NOFILE)):
        most = resource.getrlimit(kind)[0]
        if most != resource.RLIM_INFINITY:
            yield Fact("Machine", f"limit of {name}", f"{most:,}")


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return machine.memory()


def _gpus() -> Iterator[Fact]:
    sizes = devices.gpus()
    if not sizes:
        yield Fact("Machine", "GPUs", "none visible to torch")
        return
    asked = subprocess.run([sys.executable, "-c", _GPUS], capture_output=True, text=True, check=False)
    for number, (bytes_of, name) in enumerate(zip(sizes, asked.stdout.splitlines(), strict=False)):
        yield Fact("Machine", f"cuda:{number}", f"{name}, {size(bytes_of)}")


def _disks(folder: Path) -> Iterator[Fact]:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    for name, path in (
        ("here", folder.absolute()),
        ("temporary files", Path(tempfile.gettempdir())),
        ("hub cache", cache),
        ("negpipe's cache", machine.cache_folder()),
    ):
        there = next((place for place in (path, *path.parents) if place.is_dir()), Path("/"))
        disk = shutil.disk_usage(there)
        state = "" if path.is_dir() else ", does not exist yet"
        writable = os.access(there, os.W_OK | os.X_OK)
        remedy = "" if writable or name != "temporary files" else "Set TMPDIR to a writable folder"
        note = "" if writable else ", not writable"
        yield Fact("Disks", name, f"{path}: {size(disk.free)} free of {size(disk.total)}{state}{note}", remedy)


def _environment() -> Iterator[Fact]:
    for name in _VARIABLES:
        if value := os.environ.get(name):
            yield Fact("Environment", name, value)
    if proxies := [name for name in _PROXIES if os.environ.get(name)]:
        yield Fact("Environment", "proxies", f"{', '.join(proxies)} set")
    from huggingface_hub import get_token

    yield Fact("Environment", "hub token", "set" if get_token() else "none")


def _hub() -> Fact:
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    try:
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        port = ""
    address = f"{parts.scheme}://{parts.hostname}{port}"  # neither user nor password
    if constants.HF_HUB_OFFLINE:
        return Fact("Environment", "hub", "not contacted: HF_HUB_OFFLINE is set")
    started = time.monotonic()
    try:
        asked = urllib.request.Request(address, method="HEAD")
        with urllib.request.urlopen(asked, timeout=_SECONDS):
            answer = f"answers in {time.monotonic() - started:.1f} s"
    except urllib.error.HTTPError as error:
        answer = f"answers with {error.code}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        # Its text may contain a proxy's address.
        reason = getattr(error, "reason", error)
        answer = f"does not answer ({getattr(reason, 'strerror', None) or type(reason).__name__})"
    return Fact("Environment", "hub", f"{address} {answer}")
