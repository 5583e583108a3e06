"""A model behind a server: OpenAI's `/v1/embeddings`, or `/embed` of text-embeddings-inference.

Guarantees: rows keep the order of the texts, whatever the order of responses, and neither the number of concurrent
requests nor their failures change a byte; there are never more of them than allowed; a response that is not one vector
per text, from the configured model, is requested again or is an error, never a row. The API key is in one header and
nowhere else: neither it nor other secrets of the address are raised, logged or written, even if the server repeats
them.

There is no digest of a server's weights: its vectors are taken to be those of the model that it names, as long as the
first text of the process has the same vector after each part.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import islice
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import numpy as np

from negpipe.config.encoder import Encoder
from negpipe.config.server import Server
from negpipe.data.arrays import Ints
from negpipe.encoders.batched import OnBatch, Vectors
from negpipe.encoders.cuts import OnCut
from negpipe.encoders.prompts import Kind, instructed, instruction
from negpipe.encoders.vectors import finished
from negpipe.errors import ConfigError, InputError, NegpipeError, TaskFailedError
from negpipe.redaction import HIDDEN, redact

logger = logging.getLogger(__name__)

Read = TypeVar("Read")

TOLD, ESTIMATED = "told by the server", "estimated"
"""How tokens were counted."""

_LIBRARIES = ("httpx", "tenacity")
_BYTES_A_TOKEN = 4  # English: 4 to 5 letters; Chinese, Japanese, Korean: 3 bytes per character, about one token
_FIRST_WAIT, _MOST_WAIT, _PATIENCE = 0.5, 60.0, 600.0  # seconds; the last is the longest Retry-After that is accepted
_PASSING = {408, 429}  # in addition to 5xx
_OF_CONTENT = {400, 413, 422}  # may be caused by a single text
_LONG = 8  # characters of a parameter that may be a secret: versions are shorter, and their digits are everywhere
_SAID = 300  # characters shown of a server's message
_PROBE = "text"
_NEAR = 0.05  # relative change allowed in a vector: a server's kernels depend on the rest of a batch

# A server's response: vectors in order, and tokens, if reported.
_Answer = tuple[Vectors, int]


class _Passing(Exception):
    """A temporary failure, and the seconds to wait requested by the server."""

    def __init__(self, problem: str, wait: float = 0.0) -> None:
        super().__init__(problem)
        self.wait = wait


class _Refused(Exception):
    """The server rejects a request."""


def check(encoder: Encoder, workers: int) -> None:
    """Check that the libraries and the key are available, and that each worker may send requests. Sends nothing.

    Raises:
        ConfigError: the libraries are not installed, the environment lacks the key, or there are too many workers.
    """
    if missing := [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"encoder.backend: http requires {' and '.join(missing)}: run `pip install 'negpipe[http]'`")
    server = _server(encoder)
    _key(server)
    if workers > server.concurrency:
        raise ConfigError(
            f"encoder.http.concurrency: {server.concurrency} requests at a time are too few for {workers} workers:"
            f" raise it to {workers}, or lower executor.workers: one worker sends all of them"
        )


def differs(vector: Vectors, before: Vectors) -> bool:
    """Whether two (d,) vectors of a text are of different models."""
    return vector.shape != before.shape or not np.linalg.norm(vector - before) <= _NEAR * np.linalg.norm(before)


def estimated_tokens(lengths: Ints) -> Ints:
    """(n,) The estimated tokens of texts of (n,) bytes in UTF-8."""
    return lengths // _BYTES_A_TOKEN + 1


def overhead(encoder: Encoder, kind: Kind) -> int:
    """Bytes of the prefix of a text."""
    return len(_sent(encoder, kind, [""])[0].encode())


@contextmanager
def opened(encoder: Encoder, workers: int) -> Iterator[Served]:
    """The server, with one worker's share of the concurrent requests.

    Raises:
        ConfigError: see `check`.
    """
    check(encoder, workers)
    import httpx

    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every request
    server = _server(encoder)
    requests, key = server.concurrency // workers, _key(server)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    client = httpx.Client(
        headers=headers,
        timeout=server.timeout,
        limits=httpx.Limits(max_connections=requests, max_keepalive_connections=requests),
    )
    served = Served(encoder, client, requests, key)
    try:
        yield served
        client.close()  # after an error a request may be in progress
    finally:
        served.end()


class Served:
    """See `negpipe.encoders.TextEncoder`; only the server truncates texts, so `on_cut` is never called.

    Attributes:
        provenance: the origin of the vectors, and whether the server reported how many tokens it read.
    """

    def __init__(self, encoder: Encoder, client: Any, requests: int, key: str | None) -> None:
        import tenacity

        self._encoder, self._server, self._client, self._requests = encoder, _server(encoder), client, requests
        self._name = self._server.answers_as or encoder.model or ""
        self._place = redact(self._server.endpoint)
        self._secrets = _secrets(self._server.url, key)
        self._width: int | None = None
        self._known: tuple[str, Vectors] | None = None
        self._reached = False
        self._ended = threading.Event()
        self._pool = ThreadPoolExecutor(requests)
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Passing),
            stop=tenacity.stop_after_attempt(1 + self._server.retries) | tenacity.stop_when_event_set(self._ended),
            wait=_waiting(tenacity.wait_exponential(_FIRST_WAIT, _MOST_WAIT) + tenacity.wait_random(0, _FIRST_WAIT)),
            sleep=tenacity.sleep_using_event(self._ended),
            before_sleep=self._tell,
            reraise=True,
        )
        self.provenance = {"server": self._place, "tokens": TOLD}

    def encode(
        self, texts: Sequence[str], kind: Kind, on_batch: OnBatch, on_cut: OnCut | None = None
    ) -> Iterator[Vectors]:
        """See `negpipe.encoders.TextEncoder.encode`.

        Raises:
            InputError: also if the server rejects a text (`row`), has another model, or changes its dimension.
            TaskFailedError: it did not respond after all retries.
        """
        if not texts:
            raise ValueError("encode needs at least one text")
        self._check_model()
        first, asked = 0, deque[tuple[list[str], Future[_Answer]]]()
        sent = _sent(self._encoder, kind, texts)
        batches = self._batches(sent)
        try:
            while True:
                for batch in islice(batches, 2 * self._requests - len(asked)):
                    asked.append((batch, self._pool.submit(self._embed, batch)))
                if not asked:
                    break
                batch, future = asked.popleft()
                vectors = self._taken(first, batch, future, on_batch)
                self._known = self._known or (sent[0], vectors[0].copy())
                yield vectors
                first += len(batch)
        finally:
            for _, future in asked:
                future.cancel()
        self._check_model()

    def check_unchanged(self) -> None:
        """Request the first vector of this process again: many servers repeat whatever name a request has.

        Raises:
            InputError: it differs.
        """
        if self._known is None:
            return
        text, before = self._known
        vectors, _ = self._embed([text])
        if differs(finished(vectors, self._encoder, 0, "Check the server")[0], before):
            raise InputError(
                f"{self._place} returns another vector for the first text than before: it serves another model under"
                " the same name, or runs it differently",
                field="encoder.model",
                remedy="Serve the model that was served before, or give the new one another name. This part is"
                " discarded, finished ones are kept; an encoder.cache may contain vectors of both: use another folder",
            )

    def end(self) -> None:
        """Stop all requests."""
        self._ended.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _batches(self, texts: list[str]) -> Iterator[list[str]]:
        """Texts in order, as many per request as the config allows."""
        tokens = estimated_tokens(np.array([len(text.encode()) for text in texts], dtype=np.int64))
        first, total = 0, 0
        for at, count in enumerate(tokens.tolist()):
            if at - first == self._server.batch_texts or (at > first and total + count > self._server.batch_tokens):
                yield texts[first:at]
                first, total = at, 0
            total += count
        yield texts[first:]

    def _taken(self, first: int, batch: list[str], future: Future[_Answer], on_batch: OnBatch) -> Vectors:
        try:
            vectors, tokens = future.result()
        except InputError as error:
            if error.row is None:
                raise
            raise InputError(error.problem, row=first + error.row, remedy=error.remedy) from None
        if self._width not in (None, vectors.shape[1]):
            raise InputError(
                f"{self._place} returns vectors of {vectors.shape[1]} dimensions, previously of {self._width}",
                remedy="Check which model it serves; finished parts are kept, and the same command resumes",
            )
        self._width = vectors.shape[1]
        if not tokens:
            self.provenance["tokens"] = ESTIMATED
            tokens = int(estimated_tokens(np.array([len(text.encode()) for text in batch])).sum())
        vectors = finished(vectors, self._encoder, first, "Check the text; if others fail too, check the server")
        on_batch(len(batch), tokens)
        return vectors

    def _embed(self, batch: list[str]) -> _Answer:
        """Vectors of one request's texts; runs in a thread of the pool.

        Raises:
            InputError: a text is rejected; `row` is its offset in the batch.
        """
        try:
            return self._asked(batch)
        except _Refused as refusal:
            raise self._blamed(batch, str(refusal)) from None

    def _blamed(self, batch: list[str], said: str) -> NegpipeError:
        """The error of the text that caused a rejection, found by bisection."""
        if self._refuses([_PROBE]):
            return ConfigError(f"{said} It rejects any text: check encoder.model, encoder.http.url and .api")
        low, high = 0, len(batch)
        while high - low > 1:
            middle = (low + high) // 2
            if self._refuses(batch[low:middle]):
                high = middle
            elif self._refuses(batch[middle:high]):
                low = middle
            else:
                return ConfigError(
                    f"{said} It accepts fewer at a time: lower encoder.http.batch_texts ({self._server.batch_texts}) or"
                    f" encoder.http.batch_tokens ({self._server.batch_tokens})"
                )
        return InputError(
            f"the server rejects this text: {said}",
            row=low,
            remedy="If it is longer than the model accepts, shorten it in the source, or let the server truncate it",
        )

    def _refuses(self, batch: list[str]) -> bool:
        try:
            self._asked(batch)
        except _Refused:
            return True
        return False

    def _asked(self, batch: list[str]) -> _Answer:
        if self._server.api == "tei":
            body = {"inputs": batch, "truncate": True, "normalize": False}
            read = _read_tei
        else:
            body = {"model": self._encoder.model, "input": batch}
            read = self._read_openai
        return self._retried("POST", self._server.endpoint, lambda response: read(response, len(batch)), body)

    def _read_openai(self, response: Any, count: int) -> _Answer:
        answer = response.json()
        self._check_name(answer.get("model"))
        vectors: list[Any] = [None] * count
        for item in answer["data"]:
            if vectors[item["index"]] is not None or item["index"] < 0:
                raise ValueError(f"two vectors have the index {item['index']}")
            vectors[item["index"]] = item["embedding"]
        return _matrix(vectors, count), _count((answer.get("usage") or {}).get("total_tokens"))

    def _check_model(self) -> None:
        """If responses do not name the model, request its name.

        Raises:
            InputError: it is another model.
        """
        if self._server.api == "tei":
            name = self._retried("GET", self._server.info, lambda response: response.json()["model_id"])
            self._check_name(name)

    def _check_name(self, name: Any) -> None:
        if name != self._name:
            raise InputError(
                f"{self._place} serves the model {name!r}, not {self._name!r}",
                field="encoder.model",
                remedy="Serve that model; finished parts are kept. If it is the same model under another name,"
                " set encoder.http.answers_as",
            )

    def _retried(self, method: str, url: str, read: Callable[[Any], Read], body: Any = None) -> Read:
        """The result of a request, retried as long as that may help.

        Raises:
            _Refused: the content is rejected.
            NegpipeError: another error, or all retries failed.
        """
        try:
            found: Read = self._retrying(self._once, method, url, read, body)
            return found
        except _Passing as failure:
            times = self._retrying.statistics["attempt_number"]
            raise TaskFailedError(
                f"{str(failure).rstrip('.')} (tried {times} times). Finished parts are kept: run the same command"
                " again once the server responds, or raise encoder.http.retries or encoder.http.timeout"
            ) from None

    def _once(self, method: str, url: str, read: Callable[[Any], Read], body: Any) -> Read:
        import httpx

        try:
            response = self._client.request(method, url, json=body)
        except httpx.ConnectError as error:
            if not self._reached:  # more likely absent than temporarily unavailable
                raise ConfigError(
                    f"no server at {self._place} ({self._safe(error)}): start the server, or fix encoder.http.url"
                ) from None
            raise _Passing(f"{self._place} does not respond: {self._safe(error)}") from None
        except httpx.InvalidURL as error:
            raise ConfigError(f"encoder.http.url is not an address: {self._safe(error)}") from None
        except httpx.RequestError as error:
            said = self._safe(error) or type(error).__name__
            raise _Passing(f"{self._place} does not respond: {said}") from None
        self._reached = True
        if not response.is_success:
            raise self._failure(response)
        try:
            return read(response)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise _Passing(f"{self._place} sends a malformed response: {self._safe(error)}") from None

    def _failure(self, response: Any) -> Exception:
        status = response.status_code
        said = f"{self._place} returns {status}: {self._safe(response.text)}."
        if status in _PASSING or status >= 500:
            wait = _seconds(response.headers.get("Retry-After", ""))
            if wait <= _PATIENCE:
                return _Passing(said, wait)
            return TaskFailedError(f"{said} It asks to retry in {wait:,.0f} s: run the same command then")
        if status in _OF_CONTENT:
            return _Refused(said)
        if status in (401, 403):
            variable = self._server.key_env
            remedy = f"Check the key in {variable}" if variable else "Set the variable with the key"
            return ConfigError(f"{said} {remedy} (encoder.http.key_env), and its permissions")
        return ConfigError(f"{said} Check encoder.http.url, encoder.http.api and encoder.model")

    def _safe(self, said: object) -> str:
        """A message of the server or a library, in one line and without secrets."""
        text = " ".join(str(said).split())
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        return redact(text)[:_SAID].rstrip(".")

    def _tell(self, state: Any) -> None:
        logger.warning(
            "encode: %s Retrying in %.1f s (%d of %d)",
            state.outcome.exception(),
            state.next_action.sleep,
            state.attempt_number,
            self._server.retries,
        )


def _server(encoder: Encoder) -> Server:
    assert encoder.http is not None
    return encoder.http


def _secrets(url: str, key: str | None) -> list[str]:
    """The secrets of an address and a key, the longest first."""
    parts = urlsplit(url)
    own = [key, parts.username, parts.password, *map(unquote, filter(None, (parts.username, parts.password)))]
    asked = (value for _, value in parse_qsl(parts.query) if len(value) >= _LONG)
    return sorted({*filter(None, own), *asked}, key=len, reverse=True)


def _key(server: Server) -> str | None:
    """The key, from the environment. No error names the variable, as it may be the key itself by mistake."""
    if server.key_env is None:
        return None
    key = os.environ.get(server.key_env, "").strip()
    if not key:
        raise ConfigError("encoder.http.key_env: the environment variable is not set, or empty: export it with the key")
    if not (key.isascii() and key.isprintable()):
        raise ConfigError("encoder.http.key_env: the key has characters not allowed in a header: export it again")
    return key


def _sent(encoder: Encoder, kind: Kind, texts: Sequence[str]) -> list[str]:
    """Texts with their prefix from the config."""
    prompt, joined = instructed(instruction(encoder, "", kind), list(texts))
    return [prompt + text for text in joined]


def _read_tei(response: Any, count: int) -> _Answer:
    return _matrix(response.json(), count), _count(response.headers.get("x-compute-tokens"))


def _matrix(vectors: list[Any], count: int) -> Vectors:
    """(n, d) float32.

    Raises:
        ValueError: the number of vectors is wrong, or their lengths differ.
    """
    if len(vectors) != count or any(vector is None for vector in vectors):
        raise ValueError(f"{sum(vector is not None for vector in vectors)} vectors for {count} texts")
    with np.errstate(over="ignore"):
        matrix = np.asarray(vectors, dtype=np.float32)
    if matrix.ndim != 2 or not matrix.shape[1]:
        raise ValueError("its vectors are not lists of numbers")
    return matrix


def _count(told: Any) -> int:
    """Tokens reported by a server; 0 if it does not."""
    try:
        return max(0, int(told))
    except (TypeError, ValueError):
        return 0


def _seconds(retry_after: str) -> float:
    """The seconds of a Retry-After header, which has seconds or a date; 0 if it has neither."""
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return 0.0


def _waiting(backoff: Any) -> Callable[[Any], float]:
    return lambda state: float(max(backoff(state), state.outcome.exception().wait))
