"""Runs the shards of a stage as Slurm array tasks, submits them with submitit, and waits for them.

An array task does what `negpipe work` does: it is a shard that makes its parts, or those that another shard left over,
and writes no manifest. The store decides what is done: Slurm is only asked whether an array task is pending or running,
submitit why one failed. Submitted arrays are noted in the run directory, so that a run that finds the note of a dead
run waits for the same arrays. An array without a note (the run died between submission and note) only costs places in
the queue: its tasks have claimed their work.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import shutil
import subprocess
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from negpipe import errors
from negpipe.config.file import load_config
from negpipe.config.schema import Config
from negpipe.engine.executors import local
from negpipe.engine.shards import Shard, shard_of, some
from negpipe.engine.stage import Context, Progressed, Stage, Task, TaskExecutor
from negpipe.errors import (
    ConfigError,
    LockedError,
    NegpipeError,
    StorageError,
    TaskFailedError,
    VanishedError,
    count_of,
)
from negpipe.redaction import Redacting
from negpipe.store import unfinished
from negpipe.store.files import BOOKS, json_bytes, remove
from negpipe.store.store import Store

logger = logging.getLogger(__name__)

Work = Callable[..., Any]
"""(config, stage, shard, once=True): runs a shard. A module-level function, as it is pickled by name."""

_PASSING = (TaskFailedError, LockedError, StorageError, VanishedError)
"""Errors that another array task may not hit: missing parts are submitted again."""
_ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}
_ENDED |= {"REVOKED", "TIMEOUT"}
_GONE = "GONE"  # for a job that Slurm has forgotten, or a dead process
_OWN_END = ("COMPLETED", "FAILED", _GONE)  # of an array task that reports how it ended
_LOOKS = {"slurm": (2.0, 30.0), "local": (0.2, 2.0)}  # seconds between two checks, initial and maximum
_HIDDEN = {"slurm": 60.0, "local": 0.0}  # seconds for which NFS may hide another machine's writes
_STRAGGLING = 60.0  # seconds that array tasks with nothing left to do have to end
_LARGEST = 1001  # Slurm's default of MaxArraySize


def arrays(config: Config, work: Work) -> TaskExecutor:
    """Return an executor that runs stages as arrays; a light stage with one missing part runs in a local worker.

    Raises:
        ConfigError: submitit or Slurm's commands are missing, a parameter is invalid, or a run in a bucket names no
            folder that nodes share.
    """
    settings = config.executor.slurm
    if config.url is not None and settings.folder is None:
        raise ConfigError(
            "executor.slurm.folder: a run in a bucket needs a folder shared by the nodes, for what is submitted and its"
            " logs: --set executor.slurm.folder=$HOME/negpipe-slurm; or submit shards (configs/cluster/slurm.sh)"
        )
    if find_spec("submitit") is None:
        raise ConfigError("executor.kind: slurm needs submitit, which is missing: run `pip install 'negpipe[slurm]'`")
    lacking = [name for name in ("sbatch", "squeue", "srun") if shutil.which(name) is None]
    if settings.cluster == "slurm" and lacking:
        raise ConfigError(
            f"executor.kind: slurm needs {', '.join(lacking)}, not found here: run it on a machine of the cluster that"
            " may submit jobs, or try it without Slurm: --set executor.slurm.cluster=local"
        )
    try:
        if settings.folder:
            settings.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
            _submitter(config, Path(folder), "", gpus=0)
    except OSError as error:
        where = settings.folder or tempfile.gettempdir()
        raise ConfigError(f"executor.slurm.folder: no files can be written in {where}: {error}") from None

    def run(stage: Stage, tasks: Iterator[Task], context: Context, progress: Progressed) -> None:
        driver = _Driver(config, work, stage, context, progress, {task.key: task for task in tasks})
        if len(driver.missing) == 1 and stage.place(context.config) == "light" and not driver.noted():
            return local.run(stage, iter(driver.missing.values()), context, progress)
        return driver.run()

    return run


@dataclass
class _Array:
    """Array tasks submitted together: `jobs` maps Slurm job ids (with `cluster: local`, processes) to their shards,
    "3/16". Their logs are in `folder`."""

    cluster: str
    folder: str
    jobs: dict[str, str] = field(default_factory=dict)

    def states(self) -> dict[str, str] | None:
        """State of each job, and why it is pending; None: Slurm does not answer."""
        if self.cluster == "local":
            return {job: "RUNNING" if unfinished.is_here(job) else _GONE for job in self.jobs}
        said = _squeue(self.ids)
        return None if said is None else {job: said.get(job, _GONE) for job in self.jobs}

    @property
    def ids(self) -> list[str]:
        """In the form that scancel accepts."""
        return sorted({job.partition("_")[0].partition(".")[0] for job in self.jobs}, key=int)

    def files(self, job: str) -> Any:
        """submitit's paths of a job."""
        from submitit.core.utils import JobPaths

        return JobPaths(self.folder, job_id=job.partition(".")[0])

    def said(self, job: str) -> str | None:
        """What a job reported at its end: the traceback of an error, "" if it succeeded; None: nothing."""
        from submitit.core.utils import pickle_load

        try:
            outcome, trace = pickle_load(self.files(job).result_pickle)
        except (OSError, EOFError):
            return None
        return str(trace) if outcome == "error" else ""

    def tidy(self, *, failed: bool) -> None:
        """Delete everything except the logs of a failure: the submitted pickles contain the entire config."""
        folder = Path(self.folder)
        for path in [*folder.glob("*.pkl")] if failed else [folder]:
            remove(path)


@dataclass
class _Driver:
    """Submits a stage, or one of its rounds, and waits for it; `note` is the content of its array's note."""

    config: Config
    work: Work
    stage: Stage
    context: Context
    progress: Progressed
    missing: dict[str, Task]
    note: bytes | None = None
    failures: dict[str, NegpipeError] = field(default_factory=dict)

    def run(self) -> None:
        """Make the missing parts.

        Raises:
            NegpipeError: parts are missing, with the reason; of the class of an array task's error.
        """
        array, fruitless = self.noted(), 0
        if array:
            logger.info("%s: waiting for %s, submitted by an earlier run", self.stage.name, _named(array))
        resumed = array is not None
        while array or self.missing:
            before = len(self.missing)
            array = array or self._submitted()
            try:
                self._wait(array)
            except BaseException:
                if array.cluster == "slurm":
                    logger.warning(
                        "%s: %s left running. Run the same command to wait for it, or `scancel %s` to end it",
                        self.stage.name,
                        _named(array),
                        " ".join(array.ids),
                    )
                raise
            self._store.delete(self._name)
            self.note = None
            array.tidy(failed=bool(self.failures or self.missing))
            fruitless = 0 if resumed or len(self.missing) < before else fruitless + 1
            if self.missing and not resumed:
                self._give_up(array, final=fruitless >= self.config.executor.slurm.attempts)
            array, resumed = None, False

    def noted(self) -> _Array | None:
        """The noted array, possibly noted by a dead run."""
        self.note = self._store.read(self._name)
        try:
            return _Array(**json.loads(self.note)) if self.note else None
        except (TypeError, ValueError):
            return None

    @property
    def _store(self) -> Store:
        return self.context.own.run

    @property
    def _name(self) -> str:
        return self.context.own.arrays(self.context.key)

    def _submitted(self) -> _Array:
        """Submit the shards with missing parts as one array, or several if Slurm's maximum array size requires it.

        Raises:
            TaskFailedError: Slurm refused an array.
        """
        settings = self.config.executor.slurm
        numbers = sorted({shard_of(key, settings.shards) for key in self.missing})
        logs = (settings.folder or self.context.run_dir / BOOKS / "logs").absolute()
        array = _Array(settings.cluster, str(logs / f"{self.stage.name}-{uuid.uuid4().hex[:8]}"))
        gpus = settings.gpus if self.stage.place(self.context.config) == "apart" else 0
        executor = _submitter(self.config, Path(array.folder), self.stage.name, gpus)
        largest = _largest_array() if settings.cluster == "slurm" else len(numbers)
        plain = self.config.model_dump(mode="json")
        self.failures = {}
        for first in range(0, len(numbers), largest):
            shards = [f"{number}/{settings.shards}" for number in numbers[first : first + largest]]
            calls = [partial(_make, self.work, plain, self.stage.name, shard) for shard in shards]
            try:
                with _outside_of_jobs(), redirect_stderr(io.StringIO()):
                    jobs = [job.job_id for job in executor.submit_array(calls)]
            except (RuntimeError, OSError) as error:
                raise TaskFailedError(
                    f"{self.stage.name}: Slurm refused an array of {len(shards)}: {error}. Check executor.slurm in the"
                    " config; finished parts are kept"
                ) from error
            if array.cluster == "local":
                jobs = [unfinished.owner(int(job)) for job in jobs]
            array.jobs |= dict(zip(jobs, shards, strict=True))
            content = json_bytes(vars(array))
            self._store.replace(self._name, content, self.note)
            self.note = content
        logger.info(
            "%s: submitted %s for %s in %d of %s",
            self.stage.name,
            _named(array),
            count_of(len(self.missing), "part"),
            len(numbers),
            count_of(settings.shards, "shard"),
        )
        return array

    def _wait(self, array: _Array) -> None:
        """Wait until all parts exist, or no array task is left that could make one."""
        began = time.monotonic()
        ended: dict[str, float] = {}
        complete: float | None = None
        settled: set[str] = set()
        shortest, longest = _LOOKS[array.cluster]
        while True:
            states, now = array.states(), time.monotonic()
            self._look(states)
            if states is not None:
                alive = {job for job, state in states.items() if state.partition(" ")[0] not in (*_ENDED, _GONE)}
                for job in array.jobs.keys() - alive - settled:
                    late = now - ended.setdefault(job, now) >= _HIDDEN[array.cluster]
                    if self._is_settled(array, job, states[job], late=late):
                        settled.add(job)
                if not self.missing:
                    if complete is None:
                        complete = now
                        _cancel_waiting(array)
                    if not alive or now - complete > _STRAGGLING:
                        return
                elif len(settled) == len(array.jobs):
                    return
            time.sleep(min(longest, max(shortest, (now - began) / 10)))

    def _look(self, states: dict[str, str] | None) -> None:
        """Remove finished parts from the missing ones and report progress."""
        for key in self.context.own.found(self.missing):
            self.progress(self.missing.pop(key), 0, "", True)
        if self.missing and states is not None:
            counted = Counter(state.partition(" ")[0] for state in states.values())
            waits = next((state.partition(" ")[2] for state in states.values() if state.startswith("PENDING ")), "")
            note = f"{counted['RUNNING']} of {len(states)} array tasks running"
            if counted["PENDING"]:
                note += f", {counted['PENDING']} waiting: {waits}"
            self.progress(next(iter(self.missing.values())), 0, note, False)

    def _is_settled(self, array: _Array, job: str, state: str, *, late: bool) -> bool:
        """Whether the outcome of an ended array task is known."""
        said, shard = array.said(job), Shard.parse(array.jobs[job])
        lacking = any(shard.has(key) for key in self.missing)
        if said == "":
            return late or not lacking
        if said is None and state in _OWN_END and not late:
            return False
        if not lacking:
            return True
        log = array.files(job).stderr
        failure = TaskFailedError(_obituary(state, log)) if said is None else _error_of(said)
        told = str(failure) in map(str, self.failures.values())
        self.failures[job] = failure
        if not told:
            whose = f"{self.stage.name}: array task {job.partition('.')[0]} (shard {shard})"
            logger.warning("%s: %s. Its log: %s", whose, failure, log)
        return True

    def _give_up(self, array: _Array, *, final: bool) -> None:
        """End the run if another array would fail in the same way.

        Raises:
            NegpipeError: parts are missing, with the reason.
        """
        lasting = (job for job, failure in self.failures.items() if not isinstance(failure, _PASSING))
        job = next(lasting, None) or (next(iter(self.failures), None) if final else None)
        if job is None and not final:
            return
        named = some([f"{task.key} ({task.kind}, {count_of(task.rows, 'row')})" for task in self.missing.values()])
        failure = self.failures[job] if job else TaskFailedError(f"no array task reported why, see {array.folder}")
        whose = f"array task {job.partition('.')[0]} (shard {array.jobs[job]}): " if job else ""
        log = f". Its log: {array.files(job).stderr}" if job else ""
        parts = count_of(len(self.missing), "part is", "parts are")
        text = f"{self.stage.name}: {parts} missing: {named}. {whose}{failure}{log}"
        raise errors.error_of({"error": failure.code, "text": text})


def _make(work: Work, config: dict[str, Any], stage: str, shard: str) -> None:
    """Entry point of an array task: a shard; for a stage in rounds, only the current round."""
    log = logging.StreamHandler()
    log.setFormatter(Redacting("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[log])
    work(load_config(config), stage, Shard.parse(shard), once=True)


def _submitter(config: Config, folder: Path, stage: str, gpus: int) -> Any:
    """submitit's executor, configured from the config.

    Raises:
        ConfigError: a parameter is invalid.
    """
    import submitit

    settings = config.executor.slurm
    executor = submitit.AutoExecutor(folder, cluster=settings.cluster)
    try:
        executor.update_parameters(
            name=f"negpipe-{stage}",
            timeout_min=math.ceil(settings.time / 60),
            mem_gb=None if settings.memory is None else settings.memory / 2**30,
            cpus_per_task=config.resources.cpus,
            gpus_per_node=gpus or None,
            slurm_partition=settings.partition,
            slurm_account=settings.account,
            **{f"slurm_{name}": value for name, value in settings.parameters.items()},
        )
    except (NameError, ValueError, TypeError, AssertionError) as error:
        raise ConfigError(f"executor.slurm.parameters: {error}".partition("\nKnown executors")[0]) from None
    return executor


@contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Hide this process's own Slurm variables, if it is a Slurm job, from the jobs that it submits."""
    own = {name: value for name, value in os.environ.items() if name.startswith(("SLURM_", "SUBMITIT_"))}
    own = {name: value for name, value in own.items() if name != "SLURM_CONF" and "SLURM_JOB_ID" in own}
    for name in own:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(own)


def _squeue(ids: Sequence[str]) -> dict[str, str] | None:
    """State and reason by job, for jobs that Slurm still knows; None: it does not answer."""
    command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(ids)}", "--format=%i|%T|%r"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and "Invalid job id" not in done.stderr:
        logger.warning("squeue does not answer, asking again: %s", done.stderr.strip()[-200:])
        return None
    lines = (line.strip().split("|", 2) for line in done.stdout.splitlines())
    return {job: f"{state} {reason}" if state == "PENDING" else state for job, state, reason in lines}


def _cancel_waiting(array: _Array) -> None:
    """Cancel pending array tasks that would have nothing to do."""
    if array.cluster == "slurm":
        subprocess.run(["scancel", "--state=PENDING", *array.ids], capture_output=True, check=False)


def _largest_array() -> int:
    """The maximum number of tasks in an array."""
    done = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, check=False)
    named = re.search(r"MaxArraySize\s*=\s*(\d+)", done.stdout)
    return max(1, int(named[1])) if named else _LARGEST


def _named(array: _Array) -> str:
    if array.cluster == "local":
        return f"an array of {count_of(len(array.jobs), 'process', 'processes')}"
    return f"array{'s' * (len(array.ids) > 1)} {', '.join(array.ids)} ({count_of(len(array.jobs), 'task')})"


def _error_of(trace: str) -> NegpipeError:
    """The error at the end of a traceback."""
    _, ours, said = trace.rpartition("\nnegpipe.errors.")
    if not ours:
        last = (trace.strip().splitlines() or ["it failed"])[-1]
        return TaskFailedError("it ran out of time (executor.slurm.time)" if "timed-out" in last else last)
    name, _, text = said.strip().partition(": ")
    kind = getattr(errors, name, NegpipeError)
    return errors.error_of({"error": kind.code, "text": text})


def _obituary(state: str, log: Path) -> str:
    """What is known about an array task that reported nothing."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        lines = []
    last = next((line.strip()[-200:] for line in reversed(lines) if line.strip()), "(nothing)")
    how = "it died" if state == _GONE else f"it ended in state {state}"
    return f"{how}, the log ends with: {last}"
