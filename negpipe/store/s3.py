"""Requests to S3: the client, its failures as errors that users can act on, uploads and downloads.

Credentials and endpoint come from where boto3 looks for them (environment, profile, the machine's role) and are passed
on to nothing else. Transient failures are retried: by botocore, and for a download that breaks off, from there on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from negpipe.errors import ConfigError, NegpipeError, StorageError

LONGEST_PUT = 64 * 2**20
"""Maximum bytes uploaded in one request; larger files are uploaded in parts and appear when complete."""
ATTEMPTS = 8
TIMEOUT = 60.0
"""Seconds without a byte until a request counts as lost."""
_PARTS = 10_000  # of one object, S3's limit
_BLOCK = 2**20
_RIGHTS = "s3:GetObject, s3:PutObject, s3:DeleteObject, s3:AbortMultipartUpload and s3:ListBucket"
_AGAIN = "No finished work was lost: run the same command again"
_NOT_MET = ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey", "412", "409", "404")
_REFUSALS: dict[tuple[str, ...], tuple[type[NegpipeError], str]] = {
    ("NoSuchBucket",): (ConfigError, "the bucket does not exist: create it, or name another one in run_dir"),
    ("AccessDenied", "AllAccessDisabled", "AccountProblem", "403"): (
        StorageError,
        f"the credentials lack a permission: {_RIGHTS} are needed. {_AGAIN}",
    ),
    ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired", "InvalidToken"): (
        StorageError,
        f"the credentials have expired: renew them. {_AGAIN}",
    ),
    ("InvalidAccessKeyId", "SignatureDoesNotMatch", "AuthFailure", "InvalidClientTokenId"): (
        StorageError,
        f"the credentials are not valid: check AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. {_AGAIN}",
    ),
    ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"): (
        StorageError,
        f"the bucket is in another region: set AWS_DEFAULT_REGION to that region. {_AGAIN}",
    ),
    ("MissingContentLength",): (
        StorageError,
        "the service does not accept checksums behind the content, which boto3 sends over HTTPS: set"
        f" AWS_REQUEST_CHECKSUM_CALCULATION=when_required. {_AGAIN}",
    ),
    ("RequestTimeTooSkewed",): (
        StorageError,
        f"this machine's clock is off by more than S3 accepts: correct it. {_AGAIN}",
    ),
}


@dataclass(frozen=True)
class Bucket:
    """A bucket and the client of this process. All methods raise StorageError or ConfigError."""

    name: str

    @property
    def client(self) -> Any:
        return _client(os.getpid())

    def size(self, key: str) -> int | None:
        """Bytes of an object, None if it does not exist."""
        with self.asked(key):
            try:
                return int(self.client.head_object(Bucket=self.name, Key=key)["ContentLength"])
            except _client_error() as error:
                if _code(error) in ("404", "NoSuchKey"):
                    return None
                self.client.get_object(Bucket=self.name, Key=key, Range="bytes=0-0")  # its answer says why
                raise

    def get(self, key: str) -> tuple[bytes, str] | None:
        """A small object's content and its tag; None if it does not exist."""
        found: list[bytes] = []
        tag = self.stream(key, found.append)
        return None if tag is None else (b"".join(found), tag)

    def stream(
        self, key: str, sink: Callable[[bytes], Any], begun: Callable[[int], None] = lambda _: None
    ) -> str | None:
        """Pass an object's bytes to `sink` block by block; a broken download is resumed where it broke off.

        Args:
            key: the object.
            sink: receives the bytes.
            begun: receives the object's size first.

        Returns:
            its tag; None if it does not exist.
        """
        from botocore.exceptions import BotoCoreError

        at, tag = 0, ""
        with self.asked(key):
            for attempt in range(ATTEMPTS):
                on = {"Range": f"bytes={at}-", "IfMatch": tag} if at else {}
                try:
                    answer = self.client.get_object(Bucket=self.name, Key=key, **on)
                except _client_error() as error:
                    if _code(error) == "NoSuchKey":
                        return None
                    raise
                try:
                    if not at:
                        tag = answer["ETag"]
                        begun(answer["ContentLength"])
                    for block in answer["Body"].iter_chunks(_BLOCK):
                        sink(block)
                        at += len(block)
                    return tag
                except BotoCoreError:
                    if attempt == ATTEMPTS - 1:
                        raise
        raise AssertionError

    def put(self, key: str, content: bytes, **condition: str) -> bool:
        """Write a small object; returns whether the condition (IfMatch, IfNoneMatch) held."""
        with self.asked(key):
            try:
                self.client.put_object(Bucket=self.name, Key=key, Body=content, **condition)
            except _client_error() as error:
                if _code(error) in _NOT_MET:
                    return False
                raise
        return True

    def upload(self, path: Path, key: str) -> None:
        """Write a file under its final key: in one request, or in parts that become one object at the end."""
        from boto3.s3.transfer import TransferConfig

        size = path.stat().st_size
        with self.asked(key):
            if size <= LONGEST_PUT:
                with path.open("rb") as file:
                    self.client.put_object(Bucket=self.name, Key=key, Body=file)
                return
            parts = TransferConfig(
                multipart_threshold=LONGEST_PUT,
                multipart_chunksize=max(LONGEST_PUT // 4, -(-size // _PARTS)),
                max_concurrency=4,
            )
            try:
                self.client.upload_file(str(path), self.name, key, Config=parts)
            except Exception as error:
                # The answer to the completion may have been lost; a repeated request then reports no such upload.
                if "NoSuchUpload" not in str(error) or self.size(key) != size:
                    raise

    def delete(self, key: str) -> None:
        with self.asked(key):
            self.client.delete_object(Bucket=self.name, Key=key)

    def listed(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Keys and sizes of the objects directly under a prefix that ends in a slash."""
        with self.asked(prefix):
            pages = self.client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.name, Prefix=prefix, Delimiter="/"):
                yield from ((entry["Key"], entry["Size"]) for entry in page.get("Contents", ()))

    @contextmanager
    def asked(self, key: str) -> Iterator[None]:
        """Turn errors of S3 and botocore into errors that a user can act on.

        Raises:
            ConfigError: the bucket does not exist.
            StorageError: anything else.
        """
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

        place = f"s3://{self.name}/{key}"
        try:
            yield
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise ConfigError(
                f"{place}: no credentials found: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY,"
                " in the environment; they do not belong in a config"
            ) from error
        except (ClientError, BotoCoreError, Boto3Error) as error:
            code = next(_said(error), None)
            for codes, (kind, remedy) in _REFUSALS.items():
                if code in codes:
                    raise kind(f"{place}: {remedy} ({code})") from error
            if code:
                raise StorageError(f"{place}: S3 answers {code}. {_AGAIN}") from error
            raise StorageError(
                f"{place} cannot be reached ({type(error).__name__}): check the network and AWS_ENDPOINT_URL. {_AGAIN}"
            ) from error


def _said(error: BaseException) -> Iterator[str]:
    """The code of S3's answer, from an error that is wrapped in another."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, _client_error()):
            yield _code(inner)
        inner = inner.__cause__ or inner.__context__


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", "without a code"))


def _client_error() -> type[Exception]:
    from botocore.exceptions import ClientError

    kind: type[Exception] = ClientError
    return kind


def check_library() -> None:
    """Raises ConfigError: boto3 is not installed."""
    if find_spec("boto3") is None:
        raise ConfigError("run_dir: s3:// needs boto3: run `pip install 'negpipe[s3]'`")


@lru_cache(1)
def _client(_: int) -> Any:
    """The client of the process with this id: connections do not survive a fork. Threads may share it."""
    import boto3
    from botocore.config import Config

    settings = Config(
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        connect_timeout=TIMEOUT / 6,
        read_timeout=TIMEOUT,
        max_pool_connections=32,
        response_checksum_validation="when_required",  # part names contain digests, and manifests are sealed
    )
    return boto3.session.Session().client("s3", config=settings)
