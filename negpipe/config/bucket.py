"""Run directories in a bucket: their address, and their working folder on this machine."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from negpipe.config.machine import cache_folder

_ADDRESS = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/+(.*))?")


def bucket_url(address: str) -> str:
    """The normalized address, without trailing or doubled slashes.

    Raises:
        ValueError: the address is not that of an S3 bucket, or negpipe does not write there.
    """
    scheme, slashes, rest = address.partition("://")
    if slashes and scheme != "s3":
        raise ValueError(
            f"run_dir: {scheme}:// is not supported: negpipe needs conditional writes, which it uses on s3:// only;"
            " without them, two drivers overwrite each other's manifests. Use s3://BUCKET/PREFIX or a folder"
        )
    if "@" in rest.partition("/")[0]:
        raise ValueError(
            "run_dir: a config must not contain credentials: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and"
            " AWS_SECRET_ACCESS_KEY, in the environment"
        )
    named = _ADDRESS.fullmatch(address)
    parts = [part for part in (named[2] or "").split("/") if part] if named else []
    if named is None or any(part in (".", "..") for part in parts) or set("?#\\") & set(address):
        raise ValueError("run_dir: expected s3://BUCKET/PREFIX, the bucket in lowercase letters, digits, dots, dashes")
    return "/".join([f"s3://{named[1]}", *parts])


def working_folder(url: str, cache: Path | None) -> Path:
    """The folder on this machine for a run in a bucket, with a recognizable and unique name."""
    name = url.rpartition("/")[2]
    return (cache or cache_folder()) / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
