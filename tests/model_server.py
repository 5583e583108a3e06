"""A real HTTP server on this machine that serves a real model on both APIs, and fails as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

from model_vectors import settings, sha256

from negpipe import encoders
from negpipe.config.encoder import Encoder

NAME = "tiny"


@dataclass(frozen=True)
class Fault:
    """How one request is answered otherwise.

    Attributes:
        status, headers, said: of the answer, where it is an error.
        change: of the vectors, in the order of the texts.
        name: of the model.
        seconds: that it waits first.
        body: of the answer's bytes.
        drops: the connection ends without an answer.
    """

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    said: str = "no"
    change: Callable[[list[Any]], list[Any]] = lambda vectors: vectors
    name: str | None = None
    seconds: float = 0.0
    body: Callable[[bytes], bytes] = lambda body: body
    drops: bool = False


class Vectors(Protocol):
    """What a server serves.

    Attributes:
        name: as requests and answers call it.
    """

    name: str

    def vectors(self, texts: list[str]) -> tuple[list[list[float]], int]:
        """Of texts, and how many tokens they have."""


class Model:
    """Vectors of a model that runs here, texts one by one: a text's vector then depends on nothing else."""

    name = NAME

    def __init__(self, folder: Path) -> None:
        encoder = settings(folder, normalize=False, batch_size=1, passage_max_length=128)
        self._model = encoders.load(encoder, encoders.resolve_model(encoder, sha256).path, threads=1)
        self._known: dict[str, tuple[list[float], int]] = {}
        self._counted: list[int] = []
        self._lock = threading.Lock()

    def vectors(self, texts: list[str]) -> tuple[list[list[float]], int]:
        """Of texts, and how many tokens they have."""
        with self._lock:
            for text in texts:
                if text not in self._known:
                    (vectors,) = self._model.encode([text], "passage", lambda _, tokens: self._counted.append(tokens))
                    self._known[text] = (vectors[0].tolist(), self._counted.pop())
            found = [self._known[text] for text in texts]
        return [vector for vector, _ in found], sum(count for _, count in found)


class ModelServer:
    """What it serves, and what it was asked.

    Attributes:
        url: its address; `stop` ends it.
        name: of the model.
        faults: of the next requests for vectors, one each.
        refuses: texts that it answers 400 to, wherever they are.
        most: texts a request that it takes.
        order: of the vectors in an answer, as OpenAI's index allows.
        delay: seconds that every request for vectors takes.
        counts: whether it tells tokens.
        always: the fault of every request that has none of its own.
        asked: texts of every request for vectors that it answered with vectors.
        tried: requests for vectors, with when they came; `keys` their header Authorization.
        busiest: most requests for vectors at a time.
    """

    def __init__(self, model: Vectors) -> None:
        self.model, self.url = model, ""
        self.stop: Callable[[], None]
        self._lock, self._busy = threading.Lock(), 0
        self.name, self.delay, self.most, self.counts = model.name, 0.0, 1000, True
        self.faults: deque[Fault] = deque()
        self.always: Fault | None = None
        self.order: Callable[[list[Any]], list[Any]] = list
        self.refuses: Callable[[str], bool] = lambda text: False
        self.asked: list[list[str]] = []
        self.tried: list[float] = []
        self.keys: list[str | None] = []
        self.busiest = 0

    @property
    def texts(self) -> list[str]:
        """All texts whose vectors it gave."""
        return [text for texts in self.asked for text in texts]

    def answer(self, path: str, body: Any, headers: Any) -> tuple[int, dict[str, str], bytes] | None:
        """Status, headers and body; None: none."""
        if path == "/info":
            return 200, {}, json.dumps({"model_id": self.name, "max_client_batch_size": self.most}).encode()
        with self._lock:
            self.tried.append(time.time())
            self.keys.append(headers.get("Authorization"))
            fault = self.faults.popleft() if self.faults else self.always or Fault()
            self._busy += 1
            self.busiest = max(self.busiest, self._busy)
        try:
            time.sleep(self.delay + fault.seconds)
            return self._answer(path, body, fault)
        finally:
            with self._lock:
                self._busy -= 1

    def _answer(self, path: str, body: Any, fault: Fault) -> tuple[int, dict[str, str], bytes] | None:
        openai = path == "/v1/embeddings"
        texts = body["input" if openai else "inputs"]
        refused = len(texts) > self.most or any(map(self.refuses, texts))
        if fault.drops:
            return None
        if fault.status != 200 or refused:
            status, said = (400, "this is too much") if refused else (fault.status, fault.said)
            return status, fault.headers, json.dumps({"error": {"message": said}}).encode()
        vectors, tokens = self.model.vectors(texts)
        vectors = fault.change(vectors)
        told: dict[str, str] = {}
        if openai:
            assert body["model"] == self.model.name
            data = self.order([{"index": at, "embedding": vector} for at, vector in enumerate(vectors)])
            answer: Any = {"model": fault.name or self.name, "data": data}
            answer |= {"usage": {"prompt_tokens": tokens, "total_tokens": tokens}} if self.counts else {}
        else:
            assert body["truncate"] is True
            answer, told = vectors, {"x-compute-tokens": str(tokens)} if self.counts else {}
        with self._lock:
            self.asked.append(texts)
        return 200, told, fault.body(json.dumps(answer).encode())


class _Served(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever asked may have been killed."""


@contextmanager
def serving(model: Vectors) -> Iterator[ModelServer]:
    """A server of its own, so that nobody's last requests reach it."""
    server = ModelServer(model)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer = server.answer(self.path.partition("?")[0], json.loads(body or b"null"), self.headers)
            if answer is None:
                self.close_connection = True
                return
            status, headers, content = answer
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

    http = _Served(("127.0.0.1", 0), Handler)

    def stop() -> None:
        http.shutdown()
        http.server_close()

    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        server.url, server.stop = f"http://127.0.0.1:{http.server_port}", stop
        yield server
    finally:
        stop()


def tree(server: ModelServer | str, api: str = "openai", **more: Any) -> dict[str, Any]:
    """The section `encoder`; `http` in `more` adds to its section."""
    url = server if isinstance(server, str) else server.url
    own = {"url": url, "api": api, "retries": 3, **more.pop("http", {})}
    return {"backend": "http", "model": NAME, "http": own, **more}


def asking(server: ModelServer | str, api: str = "openai", **more: Any) -> Encoder:
    return Encoder.model_validate(tree(server, api, **more))
