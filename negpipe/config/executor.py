"""The sections that say where tasks run, and what the machine gives them: neither changes a result."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from negpipe.config import machine
from negpipe.config.section import Section
from negpipe.config.values import Size, size

DEFAULT_BUDGET = 2 * 2**30
"""Bytes of resources.memory_budget, where nobody sets it."""
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
    """How the arrays of `executor.kind: slurm` are submitted. Changes no result."""

    cluster: Literal["slurm", "local"] = Field(
        "slurm", description="local: each array task is a process of this machine, for trying it without Slurm."
    )
    shards: int = Field(
        16,
        ge=1,
        description="Shards of a stage, each an array task; those whose parts are all there are not submitted.",
    )
    attempts: int = Field(
        2, ge=1, description="So many arrays of a stage after one another of which no part came end the run."
    )
    partition: str | None = Field(None, description="Partition; null: the cluster's default.")
    account: str | None = Field(None, description="Account that is charged; null: the user's default.")
    time: Annotated[float, BeforeValidator(_seconds)] = Field(
        3600,
        ge=300,
        description="Seconds, or such as 30min or 8h, that an array task may take; longer than a part does.",
    )
    memory: Size | None = Field(None, ge=1, description="Memory of an array task, such as 32GiB; null: the default.")
    gpus: int = Field(0, ge=0, description="GPUs of an array task that runs the model (encode).")
    parameters: dict[str, Any] = Field(
        {},
        description="Further parameters of submitit's Slurm executor, such as {qos: low, array_parallelism: 8, setup:"
        " [module load cuda]}; what it does not know goes under additional_parameters.",
    )


def _address(value: str) -> str:
    named = re.fullmatch(r"auto|local|(?:\[[^\]/]+\]|[^:/\[\]]+):(\d{1,5})", value)
    if not named or not 0 < int(named[1] or 1) < 2**16:
        raise ValueError(
            f"'{value}' is not an address: write auto, local or HOST:PORT of a cluster's head; to start a run from"
            " outside of the cluster, submit the command there (ray job submit)"
        )
    return value


class Ray(Section):
    """The cluster that tasks run on, where `executor.kind` is ray."""

    address: Annotated[str, AfterValidator(_address)] = Field(
        "auto",
        description="auto: the cluster that runs on this machine, or that RAY_ADDRESS names. HOST:PORT: the one with"
        " this head. local: a cluster of this machine alone, for the time of the run.",
    )
    wait: Annotated[float, BeforeValidator(_seconds)] = Field(
        30,
        gt=0,
        description="Seconds, or such as 10min: as long a cluster has to answer, and to get a node that is large enough"
        " for a worker (autoscaling takes minutes).",
    )


class Executor(Section):
    """Where tasks run."""

    kind: Literal["inline", "local", "slurm", "ray"] = Field(
        "local",
        description="local: worker processes. inline: in this one. slurm: arrays of shards, each with its workers, see"
        " docs/how-to/slurm.md. ray: on a cluster of Ray, see docs/how-to/ray.md.",
    )
    workers: int | None = Field(
        None,
        ge=1,
        description="Worker processes (local); no more run than resources.cpus. null: one, of a model one for each of"
        " its devices. Actors (ray). null: as many as the cluster has room for.",
    )
    task_timeout: Annotated[float | None, BeforeValidator(_seconds)] = Field(
        None,
        gt=0,
        description="Seconds, or such as 30min or 2h: a worker that says nothing of progress for so long is killed, and"
        " its task tried again. Loading a model and training an index are silent: allow for them. null: never,"
        " silence is only warned about.",
    )
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
        raise ValueError(f"'{value}' is no share of this machine's memory: write for example 25%")
    return int(part * machine.memory())


def _budget(value: int) -> int:
    if value < _LEAST_BUDGET:
        raise ValueError(f"{value:,} bytes are too few: set {_LEAST_BUDGET // 2**20}MiB or more, such as 2GiB")
    return value


class Resources(Section):
    """What the machine gives. Never changes a result."""

    cpus: int | None = Field(
        None,
        ge=1,
        description="Threads over all workers; null: every core. With executor.kind: ray those of each actor; null: the"
        " cores of a node, shared among its GPUs where an actor has one.",
    )
    memory_budget: Annotated[int, BeforeValidator(_share), AfterValidator(_budget)] = Field(
        DEFAULT_BUDGET,
        json_schema_extra={"minimum": _LEAST_BUDGET},
        description="Working memory beyond the libraries, for example 2GiB, or 25% of this machine. With executor.kind:"
        " ray that of each actor.",
    )
    cache: Path | None = Field(
        None,
        description="Folder on a disk of this machine for copies of what a run in a bucket reads, and for what it has"
        " begun; null: negpipe in $XDG_CACHE_HOME or ~/.cache.",
    )
    cache_size: Annotated[int, BeforeValidator(size), Field(ge=0)] = Field(
        50 * 2**30,
        description="Bytes of a run's copies, for example 50GiB; those used longest ago go, but none of the last ten"
        " minutes.",
    )
