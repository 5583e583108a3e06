"""The section of a model behind a server: its address, request settings, and cost.

The API key is never in the config, which only names the environment variable that holds it.
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
    """A server that runs the model."""

    url: str
    """Required in encoder.http. Address of the server, such as https://api.openai.com/v1 or http://localhost:8080;
    /v1/embeddings or /embed is completed if missing."""
    api: Literal["openai", "tei"] = "openai"
    """openai: /v1/embeddings, supported by most servers. tei: /embed of text-embeddings-inference, which truncates
    texts to the model's length."""
    answers_as: str | None = Field(None, min_length=1)
    """Name of the model in the server's responses, if not encoder.model; part of the identity."""
    key_env: str | None = None
    """Environment variable with the API key, such as OPENAI_API_KEY, sent as Authorization: Bearer. null: no key is
    sent."""
    concurrency: int = Field(8, ge=1)
    """Concurrent requests, divided among executor.workers."""
    batch_texts: int = Field(32, ge=1)
    """Maximum texts per request."""
    batch_tokens: int = Field(16384, ge=1)
    """Maximum tokens per request, estimated as UTF-8 bytes / 4. A longer text is sent alone."""
    timeout: float = Field(60, gt=0)
    """Seconds without a response before a request is sent again."""
    retries: int = Field(8, ge=0)
    """Retries of a request after 408, 429, 5xx, or a broken or missing response: after 0.5 s, 1 s, 2 s …, at most a
    minute, or as given by Retry-After."""
    price: float | None = Field(None, ge=0)
    """Price of a million tokens; log and plan show the cost."""

    # Checked here and not per field, as a field's error shows its value, which may contain a secret.
    @model_validator(mode="after")
    def _addressed(self) -> Server:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError("url is not an address: use http:// or https://, a host and, if needed, a port and a path")
        if self.key_env is not None and not _VARIABLE.fullmatch(self.key_env):
            raise ValueError("key_env is not the name of an environment variable: never put the key itself here")
        if self.key_env is not None and "@" in parts.netloc:
            raise ValueError("url has a user, and key_env names a key: a request carries only one, remove the other")
        return self

    @property
    def endpoint(self) -> str:
        """The URL that texts are sent to."""
        parts, end = urlsplit(self.url), _ENDS[self.api]
        path = parts.path.rstrip("/")
        if path.rpartition("/")[2] != end:
            path = f"{path or ('/v1' if self.api == 'openai' else '')}/{end}"
        return urlunsplit(parts._replace(path=path))

    @property
    def info(self) -> str:
        """The URL of the model information of text-embeddings-inference."""
        parts = urlsplit(self.endpoint)
        return urlunsplit(parts._replace(path=parts.path.removesuffix(_ENDS["tei"]) + "info"))
