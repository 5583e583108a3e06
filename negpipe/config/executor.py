"""The sections for where tasks run and the resources they use. Neither changes a result."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from negpipe.config import machine
from negpipe.config.section import Section
from negpipe.config.values import Folder, Size, size

DEFAULT_BUDGET = 2 * 2**30
"""Default of resources.memory_budget in bytes."""
_LEAST_BUDGET = 64 * 2**20
_SECONDS = {"": 1, "s": 1, "min": 60, "h": 3600}


def _seconds(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    number = value.strip().rstrip("minsh")
    try:
        return float(number) * _SECONDS[value.strip()[len(number) :]]
    except (KeyError, ValueError):
        raise ValueError(f"'{value}' is not a duration: write for example 90, 90s, 30min or 2h") from None


class Slurm(Section):
    """Submission of the arrays of `executor.kind: slurm`. Changes no result."""

    cluster: Literal["slurm", "local"] = "slurm"
    """local: each array task is a process on this machine, to try it without Slurm."""
    shards: int = Field(16, ge=1)
    """Shards of a stage, one array task each; complete shards are not submitted."""
    attempts: int = Field(2, ge=1)
    """Stop the run after this many consecutive arrays of a stage that made no part."""
    partition: str | None = None
    """Partition; null: the cluster's default."""
    account: str | None = None
    """Account to charge; null: the user's default."""
    time: Annotated[float, BeforeValidator(_seconds)] = Field(3600, ge=300)
    """Time limit of an array task, in seconds or such as 30min or 8h; longer than one part takes."""
    memory: Size | None = Field(None, ge=1)
    """Memory per array task, such as 32GiB; null: the default."""
    gpus: int = Field(0, ge=0)
    """GPUs per array task that runs the model (encode)."""
    folder: Folder | None = None
    """Folder shared by the nodes, for what is submitted and its logs; null: `.negpipe/logs` of the run directory. A run
    in a bucket needs it."""
    parameters: dict[str, Any] = Field({})
    """Further parameters of submitit's Slurm executor, such as {qos: low, array_parallelism: 8, setup: [module load
    cuda]}; put parameters it does not know under additional_parameters."""


def _address(value: str) -> str:
    named = re.fullmatch(r"auto|local|(?:\[[^\]/]+\]|[^:/\[\]]+):(\d{1,5})", value)
    if not named or not 0 < int(named[1] or 1) < 2**16:
        raise ValueError(
            f"'{value}' is not an address: use auto, local or HOST:PORT of a cluster's head; to start a run from"
            " outside the cluster, submit the command to it (ray job submit)"
        )
    return value


class Ray(Section):
    """The cluster that tasks run on with `executor.kind: ray`."""

    address: Annotated[str, AfterValidator(_address)] = "auto"
    """auto: the cluster on this machine, or that of RAY_ADDRESS. HOST:PORT: the cluster with this head. local: a
    cluster on this machine only, for the duration of the run."""
    wait: Annotated[float, BeforeValidator(_seconds)] = Field(30, gt=0)
    """Time, in seconds or such as 10min, for a cluster to answer and to provide a node large enough for a worker
    (autoscaling takes minutes)."""


class Executor(Section):
    """Where tasks run."""

    kind: Literal["inline", "local", "slurm", "ray"] = "local"
    """local: in worker processes. inline: in this process. slurm: in arrays of shards, each with its workers, see
    docs/how-to/slurm.md. ray: on a Ray cluster, see docs/how-to/ray.md."""
    workers: int | None = Field(None, ge=1)
    """local: worker processes, at most resources.cpus; null: one, or one per device of a model. ray: actors; null: as
    many as fit on the cluster."""
    task_timeout: Annotated[float | None, BeforeValidator(_seconds)] = Field(None, gt=0)
    """Kill a worker that reports no progress for this time, in seconds or such as 30min or 2h, and retry its task.
    Loading a model and training an index report no progress: allow for them. null: only warn."""
    slurm: Slurm = Slurm()
    ray: Ray = Ray()


def _share(value: Any) -> Any:
    if not (isinstance(value, str) and value.strip().endswith("%")):
        return size(value)
    try:
        part = float(value.strip().removesuffix("%")) / 100
    except ValueError:
        part = 0.0
    if not 0 < part <= 1:
        raise ValueError(f"'{value}' is not a share of this machine's memory: use for example 25%")
    return int(part * machine.memory())


def _budget(value: int) -> int:
    if value < _LEAST_BUDGET:
        raise ValueError(f"{value:,} bytes are too few: set {_LEAST_BUDGET // 2**20}MiB or more, such as 2GiB")
    return value


class Resources(Section):
    """Resources of the machine to use. Never changes a result."""

    cpus: int | None = Field(None, ge=1)
    """Threads of all workers; null: all cores. With executor.kind: ray, threads per actor; null: the cores of a node,
    divided by its GPUs if actors have one."""
    memory_budget: Annotated[int, BeforeValidator(_share), AfterValidator(_budget)] = Field(
        DEFAULT_BUDGET, json_schema_extra={"minimum": _LEAST_BUDGET}
    )
    """Working memory beyond the libraries, for example 2GiB, or 25% of this machine. With executor.kind: ray, per
    actor."""
    cache: Folder | None = None
    """Local folder for copies of files that a run in a bucket reads, and for its unfinished output; null: negpipe in
    $XDG_CACHE_HOME or ~/.cache."""
    cache_size: Annotated[int, BeforeValidator(size), Field(ge=0)] = 50 * 2**30
    """Maximum size of a run's copies, for example 50GiB; the least recently used are deleted, except those of the last
    ten minutes."""
