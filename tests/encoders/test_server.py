"""A model behind a server gives the vectors that it gives here, whatever the server does on the way."""

from __future__ import annotations

import random
import sys
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_server import Fault, Model, ModelServer, asking, serving
from model_vectors import TEXTS, ignore, loaded, settings

from negpipe import encoders
from negpipe.encoders import server as served
from negpipe.errors import ConfigError, InputError, NegpipeError, TaskFailedError

pytestmark = pytest.mark.slow

APIS = ["openai", "tei"]


def asked(
    encoder: Any, kind: encoders.Kind = "passage", texts: list[str] = TEXTS, on_batch: encoders.OnBatch = ignore
) -> Any:
    """The vectors of texts, by a server opened for them."""
    with served.opened(encoder, 1) as opened:
        return np.concatenate(list(opened.encode(texts, kind, on_batch)))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"normalize": False, "query_instruction": "find the file: "},
        {"truncate_dim": 20, "query_instruction": "find", "query_instruction_format": r"{0}\n{1} (end)"},
    ],
)
def test_equals_the_model_here(server: ModelServer, tiny: Path, more: dict[str, Any]) -> None:
    here = loaded(settings(tiny, batch_size=1, query_max_length=128, passage_max_length=128, **more))
    kinds: tuple[encoders.Kind, ...] = ("query", "passage")
    for kind in kinds:
        expected = here.encode(TEXTS[:20], kind, ignore)
        for api in APIS:
            vectors = asked(asking(server, api, **more), kind, TEXTS[:20])
            assert vectors.dtype == np.float32 and vectors.tobytes() == expected.tobytes()


def test_order_is_the_index_and_not_the_place(server: ModelServer) -> None:
    expected = asked(asking(server))
    for order in (lambda data: data[::-1], lambda data: random.Random(1).sample(data, len(data))):
        server.order = order
        assert asked(asking(server)).tobytes() == expected.tobytes()


@pytest.mark.parametrize("api", APIS)
def test_requests_at_a_time_are_bounded_and_change_nothing(server: ModelServer, api: str) -> None:
    server.delay = 0.05
    found = {}
    for many in (1, 8):
        server.busiest = 0
        found[many] = asked(asking(server, api, http={"concurrency": many, "batch_texts": 3})).tobytes()
        assert server.busiest == 1 if many == 1 else 2 <= server.busiest <= 8
    assert found[1] == found[8]


def test_a_request_has_so_many_texts_and_tokens(server: ModelServer) -> None:
    seen: list[int] = []
    asked(asking(server, http={"batch_texts": 7, "concurrency": 1}), on_batch=lambda rows, _: seen.append(rows))
    assert [len(texts) for texts in server.asked] == seen == [7] * 6 + [3]
    server.asked.clear()
    asked(asking(server, http={"batch_tokens": 100, "concurrency": 1}))
    sizes = [sum(len(text.encode()) // 4 + 1 for text in texts) for texts in server.asked]
    assert server.texts == TEXTS and all(sizes[at] <= 100 or len(server.asked[at]) == 1 for at in range(len(sizes)))
    following = [len(texts[0].encode()) // 4 + 1 for texts in server.asked[1:]]
    assert all(size + more > 100 for size, more in zip(sizes, following, strict=False))


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("counts", [True, False])
def test_tokens_are_the_servers_or_estimated(server: ModelServer, api: str, counts: bool) -> None:
    server.counts = counts
    tokens: list[int] = []
    encoder = asking(server, api)
    with served.opened(encoder, 1) as opened:
        list(opened.encode(TEXTS, "passage", lambda _, count: tokens.append(count)))
    expected = server.model.vectors(TEXTS)[1] if counts else sum(len(text.encode()) // 4 + 1 for text in TEXTS)
    assert sum(tokens) == expected
    assert opened.provenance["tokens"] == ("told by the server" if counts else "estimated")


PASSING = {
    "429": Fault(429),
    "500": Fault(500),
    "503": Fault(503, {"Retry-After": "0"}),
    "no answer": Fault(drops=True),
    "cut": Fault(body=lambda body: body[: len(body) // 2]),
    "connection lost": Fault(headers={"Content-Length": "1000000", "Connection": "close"}, status=502),
    "no JSON": Fault(body=lambda body: b"<html>"),
    "other JSON": Fault(body=lambda body: b'{"model": "tiny", "data": 3}'),
    "a vector missing": Fault(change=lambda vectors: vectors[1:]),
    "a vector more": Fault(change=lambda vectors: [*vectors, vectors[0]]),
    "no vectors": Fault(change=lambda vectors: [None for _ in vectors]),
    "vectors of two lengths": Fault(change=lambda vectors: [vectors[0][:5], *vectors[1:]]),
    "words": Fault(change=lambda vectors: [["a"] * 32 for _ in vectors]),
}


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_asked_again(server: ModelServer, name: str, api: str) -> None:
    encoder = asking(server, api, http={"concurrency": 1, "batch_texts": 15})
    expected = asked(encoder)
    server.tried.clear()
    server.faults.extend([PASSING[name], Fault(), PASSING[name]])
    assert asked(encoder).tobytes() == expected.tobytes()
    assert len(server.tried) == 3 + 2


def test_no_answer_in_time_is_asked_again(server: ModelServer) -> None:
    expected = asked(asking(server), texts=TEXTS[:3])
    server.faults.append(Fault(seconds=60))
    encoder = asking(server, http={"timeout": 1})
    assert asked(encoder, texts=TEXTS[:3]).tobytes() == expected.tobytes()
    assert server.asked == [TEXTS[:3]] * 2 and len(server.tried) >= 3


def test_two_vectors_with_one_index_are_no_answer(server: ModelServer) -> None:
    server.order = lambda data: [*data[:-1], data[0]]
    with pytest.raises(TaskFailedError, match=r"malformed response.*two vectors have the index 0"):
        asked(asking(server))


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_heeded(server: ModelServer, as_date: bool) -> None:
    date = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=3)
    server.faults.append(Fault(429, {"Retry-After": format_datetime(date, usegmt=True) if as_date else "1"}))
    asked(asking(server), texts=TEXTS[:3])
    first, second = server.tried
    assert second >= (max(first, date.timestamp()) if as_date else first + 1)


def test_a_wait_of_hours_is_an_error_at_once(server: ModelServer) -> None:
    server.always = Fault(429, {"Retry-After": "7200"}, said="come tomorrow")
    with pytest.raises(TaskFailedError, match=r"come tomorrow.*in 7,200 s"):
        asked(asking(server), texts=TEXTS[:3])
    assert len(server.tried) == 1


def test_it_gives_up_after_so_many_times(server: ModelServer) -> None:
    server.always = Fault(503, said="the GPU is on holiday")
    with pytest.raises(TaskFailedError, match=r"503.*the GPU is on holiday.*tried 4 times.*Finished parts are kept"):
        asked(asking(server), texts=TEXTS[:3])
    assert len(server.tried) == 4


@pytest.mark.parametrize(
    ("status", "requests", "message"),
    [
        (401, 1, r"returns 401: .*no such key.*encoder\.http\.key_env"),
        (403, 1, r"returns 403: .*no such key.*encoder\.http\.key_env"),
        (404, 1, r"returns 404: .*no such key.*encoder\.http\.url.*encoder\.model"),
        (301, 1, r"returns 301"),
        (400, 2, r"returns 400: .*no such key.*any text.*encoder\.model"),  # the second: with any other text too?
    ],
)
def test_what_does_not_pass_is_an_error_at_once(server: ModelServer, status: int, requests: int, message: str) -> None:
    server.always = Fault(status, said="no such key")
    with pytest.raises(ConfigError, match=message):
        asked(asking(server), texts=TEXTS[:3])
    assert len(server.tried) == requests


@pytest.mark.parametrize("bad", [0, 17, 44])
def test_a_text_that_is_refused_is_named(server: ModelServer, bad: int) -> None:
    server.refuses = TEXTS[bad].__eq__
    with pytest.raises(InputError, match=r"returns 400.*this is too much.*longer than the model accepts") as caught:
        asked(asking(server, http={"batch_texts": 10}))
    assert caught.value.row == bad


def test_too_many_texts_a_request_are_said(server: ModelServer) -> None:
    server.most = 5
    with pytest.raises(ConfigError, match=r"this is too much.*fewer at a time.*encoder\.http\.batch_texts \(32\)"):
        asked(asking(server))


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(("value", "what"), [(0.0, "zero"), (float("nan"), "not finite"), (1e60, "not finite")])
def test_a_vector_that_is_none_is_named_by_its_row(server: ModelServer, api: str, value: float, what: str) -> None:
    server.faults.extend([Fault(), Fault(change=lambda vectors: [*vectors[:3], [value] * 32, *vectors[4:]])])
    with pytest.raises(InputError, match=f"the vector of this text is {what}") as caught:
        asked(asking(server, api, http={"batch_texts": 10, "concurrency": 1}))
    assert caught.value.row == 13


def test_another_model_is_an_error(server: ModelServer) -> None:
    server.faults.extend([Fault(), Fault(name="huge")])
    with pytest.raises(InputError, match=r"serves the model 'huge', not 'tiny'.*encoder\.http\.answers_as"):
        asked(asking(server, http={"batch_texts": 10, "concurrency": 1}))
    server.name = "tiny-v2"
    with pytest.raises(InputError, match="serves the model 'tiny-v2'"):
        asked(asking(server, "tei"))
    for api in APIS:
        assert asked(asking(server, api, http={"answers_as": "tiny-v2"})).shape == (len(TEXTS), 32)


def test_a_model_that_changes_behind_tei_is_an_error_before_a_part_is_whole(server: ModelServer) -> None:
    encoder = asking(server, "tei", http={"batch_texts": 10})
    with served.opened(encoder, 1) as opened, pytest.raises(InputError, match="serves the model 'huge'"):
        for _ in opened.encode(TEXTS, "passage", ignore):
            server.name = "huge"


def test_another_dimension_is_an_error(server: ModelServer) -> None:
    server.faults.extend([Fault(), Fault(change=lambda vectors: [vector[:16] for vector in vectors])])
    with pytest.raises(InputError, match="vectors of 16 dimensions, previously of 32"):
        asked(asking(server, http={"batch_texts": 10, "concurrency": 1}))


def test_truncate_dim_beyond_the_vectors(server: ModelServer) -> None:
    with pytest.raises(ConfigError, match=r"encoder\.truncate_dim.*\b32\b"):
        asked(asking(server, truncate_dim=33))


def test_nobody_at_the_address_is_said_at_once() -> None:
    with pytest.raises(ConfigError, match=r"no server at http://127\.0\.0\.1:1/.*encoder\.http\.url"):
        asked(asking("http://127.0.0.1:1", http={"retries": 100}))


def test_a_server_that_goes_away_is_waited_for(model: Model, server: ModelServer) -> None:
    with serving(model) as gone:
        encoder = asking(gone, http={"batch_texts": 10, "concurrency": 1, "retries": 2})
        with served.opened(encoder, 1) as opened:
            blocks = opened.encode(TEXTS, "passage", ignore)
            next(blocks)
            gone.always = Fault(drops=True)  # on the connections that it still has
            gone.stop()
            with pytest.raises(TaskFailedError, match=r"does not respond.*tried 3 times"):
                list(blocks)


SECRETS = {"THE_KEY": "s3cr3t/Key+42", "user": "mallory", "password": "passw0rd9", "query": "t0k3n-in-query"}


@pytest.mark.parametrize("status", [401, 400, 500])
@pytest.mark.parametrize("user", [True, False])
def test_a_server_that_repeats_secrets_is_not_repeated(
    server: ModelServer, status: int, user: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("THE_KEY", f" {SECRETS['THE_KEY']}\n")
    hidden = ["user", "password", "query"] if user else ["THE_KEY", "query"]
    server.always = Fault(status, said=f"who is {' '.join(SECRETS[name] for name in hidden)}?")
    place = server.url.replace("//", f"//{SECRETS['user']}:{SECRETS['password']}@") if user else server.url
    encoder = asking(f"{place}/v1?token={SECRETS['query']}", http={} if user else {"key_env": "THE_KEY"})
    with pytest.raises(NegpipeError, match=r"who is \*\*\*") as caught:
        asked(encoder, texts=TEXTS[:3])
    assert bool(caplog.text) is (status == 500)
    assert not any(SECRETS[name] in f"{caught.value}{caplog.text}" for name in hidden)
    assert server.keys[0] is not None and server.keys[0].startswith(
        "Basic " if user else f"Bearer {SECRETS['THE_KEY']}"
    )


@pytest.mark.parametrize("value", [None, "", "  ", "clé"])
def test_a_key_that_is_no_key(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("THE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("THE_KEY", value)
    with pytest.raises(ConfigError, match=r"encoder\.http\.key_env") as caught:
        served.check(asking("http://localhost", http={"key_env": "THE_KEY"}), 1)
    assert "clé" not in str(caught.value) and "THE_KEY" not in str(caught.value)


@pytest.mark.parametrize("library", ["httpx", "tenacity"])
def test_libraries_that_are_not_installed(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=rf"{library}.*pip install 'negpipe\[http\]'"):
        served.check(asking("http://localhost"), 1)
