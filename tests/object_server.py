"""A bucket over real HTTP, and a proxy before it that counts requests and spoils some of them."""

from __future__ import annotations

import logging
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

BUCKET = "bucket"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "of-a-test",
    "AWS_SECRET_ACCESS_KEY": "a-secret-of-a-test",
    "AWS_DEFAULT_REGION": "us-east-1",
}

CEPH = pytest.param("ceph", marks=[pytest.mark.slow, pytest.mark.cluster])
on_both = pytest.mark.parametrize("bucket", ["moto", CEPH], indirect=True)
"""Run a test in a bucket of moto, and in one of a real Ceph."""


@dataclass
class Request:
    """What the proxy knows of a request before it is passed on."""

    method: str
    key: str
    query: dict[str, list[str]]
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """As S3's price list tells requests apart."""
        if self.method == "GET" and "list-type" in self.query:
            return "LIST"
        return self.method


@dataclass
class Bucket:
    """A bucket behind a proxy.

    Attributes:
        url: of the proxy, AWS_ENDPOINT_URL.
        spoil: (request) → how to spoil it, or None: "500", "503 SlowDown" or another answer in its place, "reset"
            before it is passed on, "lost" its answer, "timeout" no answer, "cut" half of the answer, "unconditional"
            its conditions.
        listed_at: () → the moment (`time.monotonic`) as of which objects are listed, where lists are late; None: now.
        seen: every request.
        moved: bytes up and down.
        changes: every object that was written or deleted: when, its key, and its bytes or None.
    """

    direct: str
    url: str = ""
    spoil: Callable[[Request], str | None] = lambda _: None
    listed_at: Callable[[], float] | None = None
    seen: list[Request] = field(default_factory=list)
    spoilt: Counter[str] = field(default_factory=Counter)
    moved: Counter[str] = field(default_factory=Counter)
    changes: list[tuple[float, str, int | None]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        return {**CREDENTIALS, "AWS_ENDPOINT_URL": self.url}

    @property
    def client(self) -> Any:
        """One that goes past the proxy."""
        import boto3
        from botocore.config import Config

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.direct,
            aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
            region_name=CREDENTIALS["AWS_DEFAULT_REGION"],
            config=Config(max_pool_connections=4),
        )

    def counts(self) -> Counter[str]:
        return Counter(request.kind for request in self.seen)

    def clear(self) -> None:
        """Spoil nothing any more, list what there is; delete every object, and what was seen."""
        self.spoil, self.listed_at, client = lambda _: None, None, self.client
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
            if there := [{"Key": entry["Key"]} for entry in page.get("Contents", ())]:
                client.delete_objects(Bucket=BUCKET, Delete={"Objects": there})
        self.changes.clear()
        self.forget()

    def forget(self) -> None:
        self.seen.clear()
        self.moved.clear()
        self.spoilt.clear()

    def listing(self, prefix: str, moment: float) -> str:
        """What a list of the objects directly under a prefix was at that moment."""
        under = [change for change in self.changes if change[1].rpartition("/")[0] == prefix.rstrip("/")]
        there = {key: size for when, key, size in under if when <= moment}
        listed = [(key, size) for key, size in sorted(there.items()) if size is not None]
        assert len(listed) <= 1000, "a second page"
        entries = [f"<Contents><Key>{key}</Key><Size>{size}</Size></Contents>" for key, size in listed]
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(entries)}</ListBucketResult>"

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """Every object under a prefix, by what follows it."""
        client, found = self.client, {}
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix):
            for entry in page.get("Contents", ()):
                body = client.get_object(Bucket=BUCKET, Key=entry["Key"])["Body"].read()
                found[entry["Key"][len(prefix) :].lstrip("/")] = body
        return found


@contextmanager
def served() -> Iterator[Bucket]:
    """A new server of moto with an empty bucket, behind a proxy."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        _, port = server.get_host_and_port()
        # moto looks at a condition, and writes then; S3 does both in one step
        with proxied(port, threading.Lock()) as bucket:
            yield bucket
    finally:
        server.stop()


def share(
    seed: int, part: float = 0.05, ways: tuple[str, ...] = ("500", "503", "reset", "lost", "timeout")
) -> Callable[[Request], str | None]:
    """Spoil this part of all requests."""
    draws = random.Random(seed)
    return lambda _: draws.choice(ways) if draws.random() < part else None


@contextmanager
def proxied(port: int, writing: AbstractContextManager[Any]) -> Iterator[Bucket]:
    """A proxy before a server at this port, and an empty bucket there; `writing` is held while a request may write."""
    bucket = Bucket(f"http://127.0.0.1:{port}")
    bucket.client.create_bucket(Bucket=BUCKET)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def handle_one_request(self) -> None:
            with suppress(ConnectionError, socket.timeout):
                super().handle_one_request()
                return
            self.close_connection = True

        def __getattr__(self, name: str) -> Any:
            if name.startswith("do_"):
                return self._pass_on
            raise AttributeError(name)

        def _pass_on(self) -> None:
            split = urlsplit(self.path)
            key = split.path.partition(f"/{BUCKET}/")[2]
            request = Request(self.command, key, parse_qs(split.query, True), {**self.headers})
            bucket.seen.append(request)
            if self.headers.get("Expect") == "100-continue":
                self.send_response_only(100)
                self.end_headers()
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            bucket.moved["up"] += len(body)
            how = bucket.spoil(request)
            if how:
                bucket.spoilt[how] += 1
            match how:
                case "unconditional":
                    for name in ("If-Match", "If-None-Match"):
                        del self.headers[name]
                case str() if how[:3].isdigit():
                    self._refuse(*how.partition(" ")[::2])
                    return
                case "reset":
                    self._break()
                    return
                case "timeout":
                    time.sleep(3)
                    self._break()
                    return
            upstream = HTTPConnection("127.0.0.1", port, timeout=60)
            try:
                headers = {
                    name: value for name, value in self.headers.items() if name.lower() not in ("expect", "connection")
                }
                with nullcontext() if self.command in ("GET", "HEAD") else writing:
                    upstream.request(self.command, self.path, body, headers)
                    answer = upstream.getresponse()
                    content = answer.read()
            finally:
                upstream.close()
            if request.method in ("PUT", "DELETE") and not request.query and answer.status < 300:
                size = int(self.headers.get("X-Amz-Decoded-Content-Length") or len(body))
                bucket.changes.append((time.monotonic(), key, None if request.method == "DELETE" else size))
            if request.kind == "LIST" and bucket.listed_at:
                content = bucket.listing(request.query["prefix"][0], bucket.listed_at()).encode()
            if how == "lost":
                self._break()
                return
            self._answer(answer, content, cut=how == "cut")

        def _refuse(self, status: str, code: str) -> None:
            content = f"<Error><Code>{code}</Code><Message>of a test</Message></Error>".encode() if code else b""
            self.send_response(int(status))
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _answer(self, answer: HTTPResponse, content: bytes, *, cut: bool) -> None:
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length", "server", "date"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                bucket.moved["down"] += len(content)
                self.wfile.write(content[: len(content) // 2] if cut else content)
            if cut:
                self._break()

        def _break(self) -> None:
            self.wfile.flush()
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, *_: Any) -> None: ...

    server = Server(("127.0.0.1", 0), Handler)
    bucket.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield bucket
    finally:
        server.shutdown()
        server.server_close()
