"""The section of a model behind a server: where it is, how it is asked, and what it costs.

The key is never here: the config names the variable of the environment that holds it.
"""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

from pydantic import Field, model_validator

from negpipe.config.section import Section

_ENDS = {"openai": "embeddings", "tei": "embed"}  # of an endpoint's path
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)


class Server(Section):
    """A server that has the model."""

    url: str = Field(
        description="With a section encoder.http: the server's address, such as https://api.openai.com/v1 or"
        " http://localhost:8080; what is missing of /v1/embeddings or /embed is added."
    )
    api: Literal["openai", "tei"] = Field(
        "openai",
        description="openai: /v1/embeddings, which most servers have. tei: /embed of text-embeddings-inference, which"
        " cuts texts at the model's length.",
    )
    answers_as: str | None = Field(
        None,
        min_length=1,
        description="Name of the model in the server's answers, where it is another one than encoder.model; part of the"
        " identity.",
    )
    key_env: str | None = Field(
        None,
        description="Environment variable that holds the key, such as OPENAI_API_KEY: sent as Authorization: Bearer."
        " null: no key is sent.",
    )
    concurrency: int = Field(8, ge=1, description="Requests at a time, shared out among executor.workers.")
    batch_texts: int = Field(32, ge=1, description="Most texts a request.")
    batch_tokens: int = Field(
        16384,
        ge=1,
        description="Most tokens a request, estimated: a quarter of the bytes in UTF-8. A longer text goes alone.",
    )
    timeout: float = Field(60, gt=0, description="Seconds without sign of the server, after which it is asked again.")
    retries: int = Field(
        8,
        ge=0,
        description="How often a request is sent again after 408, 429, 5xx, a broken answer or none: after 0.5 s, 1 s,"
        " 2 s …, at most a minute, or as long as Retry-After says.",
    )
    price: float | None = Field(None, ge=0, description="What a million tokens cost; log and plan tell the cost.")

    # Checked here, and not field by field, as an error of a field shows its value: it may hold a secret.
    @model_validator(mode="after")
    def _addressed(self) -> Server:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError("url is no address: write http:// or https://, a host and, if need be, a port and a path")
        if self.key_env is not None and not _VARIABLE.fullmatch(self.key_env):
            raise ValueError("key_env is no name of an environment variable: never write the key itself here")
        if self.key_env is not None and "@" in parts.netloc:
            raise ValueError("url has a user, and key_env names a key: a request carries one of them, leave one out")
        return self

    @property
    def endpoint(self) -> str:
        """The address that texts are sent to."""
        parts, end = urlsplit(self.url), _ENDS[self.api]
        path = parts.path.rstrip("/")
        if path.rpartition("/")[2] != end:
            path = f"{path or ('/v1' if self.api == 'openai' else '')}/{end}"
        return urlunsplit(parts._replace(path=path))

    @property
    def info(self) -> str:
        """The address where text-embeddings-inference tells of its model."""
        parts = urlsplit(self.endpoint)
        return urlunsplit(parts._replace(path=parts.path.removesuffix(_ENDS["tei"]) + "info"))
