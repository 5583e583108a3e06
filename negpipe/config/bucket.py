"""Run directories in a bucket: what their address may be, and where this machine works for them."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

_ADDRESS = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/+(.*))?")


def bucket_url(address: str) -> str:
    """The address in one form: no slash at the end, none doubled.

    Raises:
        ValueError: no bucket of S3, or one that negpipe does not write to.
    """
    scheme, slashes, rest = address.partition("://")
    if slashes and scheme != "s3":
        raise ValueError(
            f"run_dir: {scheme}:// is no place to write to: of object stores negpipe knows s3:// alone to write only if"
            " nobody else did, without which two drivers spoil each other's manifests. Take s3://BUCKET/PREFIX, or a"
            " folder"
        )
    if "@" in rest.partition("/")[0]:
        raise ValueError(
            "run_dir: credentials have no place in a config: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and"
            " AWS_SECRET_ACCESS_KEY, in the environment"
        )
    named = _ADDRESS.fullmatch(address)
    parts = [part for part in (named[2] or "").split("/") if part] if named else []
    if named is None or any(part in (".", "..") for part in parts) or set("?#\\") & set(address):
        raise ValueError("run_dir: expected s3://BUCKET/PREFIX, the bucket in small letters, digits, dots and dashes")
    return "/".join([f"s3://{named[1]}", *parts])


def working_folder(url: str, cache: Path | None) -> Path:
    """The folder of this machine for a run in a bucket: named to be recognised, and told from all others."""
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "negpipe"
    name = url.rpartition("/")[2]
    return cache.expanduser() / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
