"""The Ray cluster that a run is connected to, and how much room it has.

The connection is made when the first stage that needs it is about to run, shared by all stages and closed when the run
ends. A connection that the caller already has is used as it is.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from negpipe.config.executor import Ray
from negpipe.config.schema import Config
from negpipe.engine import devices
from negpipe.engine.budget import Budget
from negpipe.engine.stage import Context
from negpipe.errors import ConfigError, count_of

logger = logging.getLogger(__name__)

_LIBRARIES = 2**30  # bytes that a worker holds in addition to its budget: Python, torch or FAISS
_OBJECTS = 100 * 2**20  # bytes of Ray's object store, which carries only paths here; the minimum is 75 MiB
_LOOK = 1.0  # seconds between two checks of the nodes
_TOKEN = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")  # whether Ray's requests carry a token, and which


@dataclass(frozen=True)
class Demand:
    """What one actor needs from a node: cores, GPUs and bytes of memory."""

    cpus: int
    gpus: int
    memory: int

    def fits(self, node: dict[str, float]) -> int:
        """How many actors fit on a node on which nothing else runs."""
        ways = [node.get("CPU", 0) / self.cpus, node.get("memory", 0) / self.memory]
        return int(min(ways + ([node.get("GPU", 0) / self.gpus] if self.gpus else [])))

    def __str__(self) -> str:
        return f"{count_of(self.cpus, 'core')}, {count_of(self.gpus, 'GPU')} and {self.memory / 2**30:.1f} GiB"


@contextmanager
def session() -> Iterator[None]:
    """On exit, close connections opened within it and stop a cluster started within it."""
    before, environment = _connected(), {name: os.environ.get(name) for name in _TOKEN}
    try:
        yield
    finally:
        if not before and _connected():
            import ray

            ray.shutdown()
            _authenticate(environment)


def connect(config: Config) -> None:
    """Connect to the cluster that the config names, unless already connected.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers at the address in time.
    """
    settings, started = config.executor.ray, time.monotonic()
    if _connected():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # for a cluster started here
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            f"executor.kind: ray needs Ray ({error}): run `pip install 'negpipe[ray]'` on every node"
        ) from error
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with _quiet():
        if settings.address == "local":
            with _handlers_kept():
                _start(options)
        else:
            _within(settings, lambda: ray.init(address=settings.address, **options))
    nodes, seconds = alive(), time.monotonic() - started
    logger.info(
        "ray: %s in %.1f s: %s with %s and %s",
        "started" if settings.address == "local" else f"connected to {ray.get_runtime_context().gcs_address}",
        seconds,
        count_of(len(nodes), "node"),
        *(
            count_of(int(sum(node.get(kind, 0) for node in nodes)), name)
            for kind, name in (("CPU", "core"), ("GPU", "GPU"))
        ),
    )


def hint(death: str) -> str:
    """What to do about a death of an actor that Ray does not explain."""
    if "actor never ran" in death and os.environ.get("RAY_AUTH_MODE") == "token":
        return (
            " Was the cluster started without token authentication? This process uses it, as RAY_AUTH_MODE is token or"
            " ~/.ray/auth_token exists: set RAY_AUTH_MODE=disabled here, or start the cluster again."
        )
    return ""


def alive() -> list[dict[str, float]]:
    """The resources of each live node."""
    import ray

    nodes: Any = ray.nodes
    return [node["Resources"] for node in nodes() if node["Alive"]]


def granted(context: Context) -> Budget:
    """What an actor may use: threads and memory from the config; by default a GPU with its share of a node's cores, or
    all cores."""
    (device,) = context.devices()
    nodes = alive()
    if device == devices.ANY:
        device = "cuda" if any(node.get("GPU") for node in nodes) else devices.CPU
    gpu = devices.is_gpu(device)
    shares = [int(node["CPU"] // (node["GPU"] if gpu else 1)) for node in nodes if node.get("GPU" if gpu else "CPU")]
    return Budget(
        context.budget.memory, context.config.resources.cpus or max(1, min(shares, default=1)), devices.same(device)
    )


def demand(budget: Budget) -> Demand:
    """The resources requested from Ray for an actor."""
    return Demand(budget.threads, int(devices.is_gpu(budget.device)), budget.memory + _LIBRARIES)


def room(config: Config, needed: Demand, stage: str) -> int:
    """How many actors fit on the cluster if nothing else runs on it. Waits if none fits.

    Raises:
        ConfigError: no node is large enough after `executor.ray.wait`.
    """
    if count := _fitting(needed):
        return count
    logger.warning("%s: no node has %s for a worker: waiting %g s for one", stage, needed, config.executor.ray.wait)
    from ray.util import placement_group, remove_placement_group

    # This tells an autoscaling cluster what is missing.
    bundle = {"CPU": needed.cpus, "GPU": needed.gpus, "memory": needed.memory}
    wanted = placement_group([{kind: amount for kind, amount in bundle.items() if amount}])
    try:
        deadline = time.monotonic() + config.executor.ray.wait
        while time.monotonic() < deadline:
            time.sleep(min(_LOOK, config.executor.ray.wait))
            if count := _fitting(needed):
                return count
    finally:
        remove_placement_group(wanted)
    there = sorted(str(Demand(*(int(node.get(kind, 0)) for kind in ("CPU", "GPU", "memory")))) for node in alive())
    remedy = "set encoder.device and search.device to cpu, or" if needed.gpus else "lower resources, or"
    raise ConfigError(
        f"{stage}: a worker needs {needed}, but no node of the cluster has that (nodes: {'; '.join(there)}): {remedy}"
        " add such a node; if the cluster scales up, raise executor.ray.wait"
    )


def _fitting(needed: Demand) -> int:
    return sum(needed.fits(node) for node in alive())


def _start(options: dict[str, Any]) -> None:
    """Start a cluster on this machine. Not in a thread: its processes would end with the thread.

    Its token is for this session only. Ray would write one to the home folder, and `auto` would use it from then on,
    even on a cluster that was started without one: Ray then cancels every actor.
    """
    import ray

    if "RAY_AUTH_MODE" not in os.environ:
        _authenticate(dict(zip(_TOKEN, ("token", secrets.token_hex(32)), strict=True)))
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=_OBJECTS,
            _system_config={"prestart_worker_first_driver": False},  # they would not have the actors' environment
            **options,
        )
    except Exception as error:  # Ray has no specific class
        ray.shutdown()
        raise ConfigError(
            f"executor.ray.address: local: Ray does not start here: {error} Its logs are in the newest session under"
            " /tmp/ray, or RAY_TMPDIR"
        ) from error


def _connected() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _authenticate(environment: Mapping[str, str | None]) -> None:
    """Set or remove the variables about tokens, and let Ray read them again: it reads them once in a process."""
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    raylet: Any = import_module("ray._raylet")
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def _within(settings: Ray, connect: Callable[[], Any]) -> None:
    """Connect in a thread: without an answer, Ray returns only after minutes and handles no signals until then."""
    failed: list[Exception] = []

    def attempt() -> None:
        try:
            connect()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(settings.wait)
    if not thread.is_alive() and not failed:
        return
    named = os.environ.get("RAY_ADDRESS") if settings.address == "auto" else None
    why = str(failed[0]).partition("\n")[0] if failed else f"no answer within {settings.wait:g} s (executor.ray.wait)"
    raise ConfigError(
        f"executor.ray.address: no Ray cluster answers at {f'{named} (RAY_ADDRESS)' if named else settings.address}:"
        f" {why}. Start one (ray start --head) with this machine as one of its nodes, correct the address, or set it to"
        " local; if it uses token authentication, set RAY_AUTH_MODE=token"
    )


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Ray installs its own SIGTERM handler in the main thread."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray prints worker failures to standard output and has no setting for that; negpipe reports them itself."""
    from ray._private import worker

    own = vars(worker)
    before = own.get("listen_error_messages")
    own["listen_error_messages"] = lambda *_: None
    try:
        yield
    finally:
        own["listen_error_messages"] = before
