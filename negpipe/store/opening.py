"""The stores that a config names: that of its run directory, and that of its stages' parts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path

from negpipe.config.schema import Config
from negpipe.store import lease, s3
from negpipe.store.cache import FileCache
from negpipe.store.lock import run_lock, shared_run_lock
from negpipe.store.objects import ObjectStore
from negpipe.store.store import LocalStore, Store

_RUN = "run"


def run_of(config: Config) -> Store:
    """The store of manifests and of what users look at.

    Raises:
        ConfigError: it is in a bucket, but boto3 is not installed.
    """
    if config.url is None:
        return LocalStore(config.run_dir)
    return _objects(config.url, config.run_dir, config.resources.cache_size, os.getpid())


def store_of(config: Config) -> Store:
    """The store of parts and their records. Raises what `run_of` does."""
    return LocalStore(config.store) if config.store else run_of(config)


@contextmanager
def run_held(config: Config, *, shared: bool = False) -> Iterator[None]:
    """Lock the run directory of a config, or its local working folder and then the run in the bucket.

    Args:
        config: the config of the run.
        shared: together with other processes that share it.

    Raises:
        LockedError: another process holds it.
    """
    with ExitStack() as locks:
        locks.enter_context(shared_run_lock(config.run_dir) if shared else run_lock(config.run_dir))
        store = run_of(config)
        if isinstance(store, ObjectStore):
            locks.enter_context(lease.held(store, _RUN, shared=shared))
        yield


def check_conditions(config: Config) -> None:
    """Raises ConfigError: the run is in a bucket without conditional writes."""
    if isinstance(store := run_of(config), ObjectStore):
        store.check_conditions()


@lru_cache(8)
def _objects(url: str, folder: Path, room: int, _process: int) -> ObjectStore:
    s3.check_library()
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    return ObjectStore(s3.Bucket(bucket), prefix, FileCache(folder, room))
