"""The server that most tests of served vectors ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from model_server import Model, ModelServer, serving

from negpipe.encoders import server as served


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    """What it serves."""
    return Model(tiny)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that failed is asked again at once."""
    monkeypatch.setattr(served, "_FIRST_WAIT", 0.01)


@pytest.fixture
def server(model: Model, impatient: None) -> Iterator[ModelServer]:
    with serving(model) as server:
        yield server
