"""A model behind a server: what its section takes, what it refuses, and where texts are sent."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from negpipe.config.file import load_config
from negpipe.config.schema import Config
from negpipe.errors import ConfigError
from negpipe.train import stage

LEAST: dict[str, Any] = {
    "run_dir": "run",
    "data": {"path": "set"},
    "encoder": {"backend": "http", "model": "some/model", "http": {"url": "http://host"}},
}


def loaded(*overrides: str) -> Config:
    return load_config(copy.deepcopy(LEAST), list(overrides))


@pytest.mark.parametrize(
    ("url", "api", "endpoint"),
    [
        ("https://api.openai.com/v1", "openai", "https://api.openai.com/v1/embeddings"),
        ("https://api.openai.com/v1/embeddings", "openai", "https://api.openai.com/v1/embeddings"),
        ("http://localhost:8000", "openai", "http://localhost:8000/v1/embeddings"),
        ("http://localhost:8000/", "openai", "http://localhost:8000/v1/embeddings"),
        (
            "https://h/openai/deployments/d?api-version=1",
            "openai",
            "https://h/openai/deployments/d/embeddings?api-version=1",
        ),
        ("http://localhost:8080", "tei", "http://localhost:8080/embed"),
        ("http://localhost:8080/embed", "tei", "http://localhost:8080/embed"),
        ("http://[::1]:8080/some/where/", "tei", "http://[::1]:8080/some/where/embed"),
    ],
)
def test_where_texts_are_sent(url: str, api: str, endpoint: str) -> None:
    server = loaded(f"encoder.http.url={url}", f"encoder.http.api={api}").encoder.http
    assert server is not None and server.endpoint == endpoint
    if api == "tei":
        assert server.info == endpoint.removesuffix("embed") + "info"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["encoder.http=null"], "backend 'http' needs encoder.http.url"),
        (["encoder.model=null"], "backend 'http' needs encoder.model"),
        (["encoder.http.url=localhost:8080"], "url is not an address: use http://"),
        (["encoder.http.url=ftp://host"], "url is not an address: use http://"),
        (["encoder.http.url=http://host:99999"], "Port out of range"),
        (["encoder.http.key_env=sk-123"], "key_env is not the name of an environment variable: never put the key"),
        (["encoder.http.key_env=K", "encoder.http.url=http://u:p@host"], "url has a user, and key_env names a key"),
        (["encoder.http.batch_texts=0"], "encoder.http.batch_texts: "),
        (["encoder.http.timeout=0"], "encoder.http.timeout: "),
        (["encoder.http.price=-1"], "encoder.http.price: "),
        (["encoder.http.key=abc"], "encoder.http.key: unknown key. Did you mean 'key_env'?"),
        (["encoder.pooling=cls"], "encoder.pooling is for a model on this machine"),
        (["encoder.model_class=encoder-only-m3"], "encoder.model_class is for a model on this machine"),
        (["encoder.query_prompt_name=query"], "encoder.query_prompt_name is for a model on this machine"),
        (["encoder.passage_max_length=256"], "encoder.passage_max_length is for a model on this machine"),
        (["encoder.revision=main"], "encoder.revision is for a model on this machine"),
        (["encoder.precision=float16"], "encoder.precision is for a model on this machine"),
        (["train={}"], "train.base: a server has no model to train: set train.base"),
        (["train={base: x, kind: reranker}", "output.format=labeled-list"], "a server has no encoder on this machine"),
    ],
)
def test_what_does_not_go_with_it(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(*overrides)
    assert message in str(caught.value)
    assert "sk-123" not in str(caught.value) and "u:p" not in str(caught.value)


def test_another_model_is_trained_on_its_negatives() -> None:
    config = loaded("train={base: other/model}", "encoder.passage_max_length=256", "encoder.query_instruction='find: '")
    encoder = stage.STAGE.config(config).encoder
    assert (encoder.backend, encoder.model) == ("sentence-transformers", "other/model")
    assert encoder.passage_max_length == 256 and encoder.query_instruction == "find: "


def test_the_section_of_another_backend_is_not_looked_at() -> None:
    config = loaded("encoder.backend=sentence-transformers", "encoder.pooling=cls")
    assert config.encoder.runs_here and config.encoder.http is not None
