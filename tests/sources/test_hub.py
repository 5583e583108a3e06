"""Data sets of a hub, read over HTTP by the library's own code; the hub is on this machine."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hub_server
import pyarrow.parquet as pq
import pytest
import small_source as small
import written_sources

pytestmark = [pytest.mark.slow, pytest.mark.cases]

NAME = "team/set"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[hub_server.Hub]:
    """With a data set in the layout of MTEB."""
    folder = tmp_path / "hub" / NAME
    folder.mkdir(parents=True)
    draw = random.Random(4)
    written_sources.mteb(draw, written_sources.made(draw), folder)
    (tmp_path / "here").mkdir()
    with hub_server.started(tmp_path / "hub") as served:
        yield served


def negpipe(hub: hub_server.Hub, *words: object) -> small.Outcome:
    """A command in a process of its own: the libraries read HF_ENDPOINT when they are imported."""
    hub.asked.clear()
    command = [sys.executable, "-m", "negpipe", *map(str, words)]
    here, environment = hub.folder.parent / "here", {**os.environ, **hub.environment}
    done = subprocess.run(command, env=environment, cwd=here, capture_output=True, text=True, check=False)
    return small.Outcome(done.returncode, done.stdout, done.stderr)


def ingested(hub: hub_server.Hub, run: str, *words: object) -> dict[str, str]:
    """Digests of the tables of a run, by name."""
    done = negpipe(hub, "ingest", "set.yaml", "--set", f"run_dir={run}", *words)
    assert done.code == 0, done.err
    return small.output(hub.folder.parent / "here" / run)


def downloads(hub: hub_server.Hub) -> set[str]:
    """Names of the files whose content was read."""
    return {path.rpartition("/")[2] for kind, path in hub.asked if kind == "GET" and "/resolve/" in path}


TABLES = {"corpus-0.parquet", "queries-0.parquet", "train-0.parquet"}


@pytest.mark.guarantee(
    "a data set is on a hub",
    "the tables of a local copy, read once per commit, streamed without a copy, from the cache without a network",
    section="input",
)
def test_a_data_set_of_a_hub_is_that_of_its_folder(hub: hub_server.Hub) -> None:
    local = hub.folder / NAME
    begun = negpipe(hub, "init", NAME)
    assert begun.code == 0 and f"{NAME} is read as data.format: mteb" in begun.out, begun.err
    wanted = ingested(hub, "local", "--set", f"data.path={local}")
    assert ingested(hub, "loaded") == wanted
    # The same commit is not read again; of another one, what changed is.
    done = negpipe(hub, "ingest", "set.yaml", "--set", "run_dir=loaded")
    assert "ingest: up to date" in done.err and not downloads(hub)
    corpus = local / "corpus/corpus-0.parquet"
    rows = pq.read_table(corpus)
    pq.write_table(rows.take([*range(len(rows))][::-1]), corpus)
    changed = ingested(hub, "loaded")
    assert changed.items() > wanted.items() and downloads(hub) & TABLES == {"corpus-0.parquet"}
    hub.home = hub.folder / ".streams"
    streamed = ingested(hub, "streamed", "--set", "data.streaming=true")
    assert streamed.items() <= changed.items() and not streamed.items() <= wanted.items()
    assert downloads(hub) >= TABLES and not [*hub.home.rglob("*.arrow"), *hub.home.rglob("*.parquet")]


def test_a_hub_that_is_gone_is_replaced_by_the_cache(hub: hub_server.Hub) -> None:
    assert negpipe(hub, "init", NAME).code == 0
    wanted = ingested(hub, "run")
    hub.address = "http://127.0.0.1:9"  # where nothing listens
    done = negpipe(hub, "ingest", "set.yaml", "--set", "run_dir=run")
    assert done.code == 0 and "ingest: up to date" in done.err, done.err
    assert ingested(hub, "other") == wanted


def test_what_a_hub_does_not_have_is_named(hub: hub_server.Hub) -> None:
    unknown = negpipe(hub, "init", "team/other")
    assert unknown.code == 3 and "team/other: no local file or folder" in unknown.err
    assert negpipe(hub, "init", NAME).code == 0
    revision = negpipe(hub, "ingest", "set.yaml", "--set", "data.revision=v2", "--set", "run_dir=run")
    assert revision.code == 3 and "Revision 'v2' doesn't exist" in revision.err and "data.revision" in revision.err
    assert not (hub.folder.parent / "here/run/corpus").exists()
