"""Runs whose vectors come from a server: the rows of the model here, restarted without sending anything twice."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import small_source as small
import yaml
from model_server import Fault, ModelServer, tree
from real_runs import Run, encoding_here, interrupted, kill

from negpipe.config.file import load_config
from negpipe.engine.manifest import Books
from negpipe.engine.stage import Context
from negpipe.engine.state import digests_of
from negpipe.errors import BudgetError, ConfigError, InputError
from negpipe.plan import estimate
from negpipe.stages import STAGES, encode

pytestmark = pytest.mark.slow

TEXTS = small.DOCUMENTS + small.QUERIES


def run_of(folder: Path, encoder: dict[str, Any]) -> Run:
    if not (folder / "data").exists():
        small.build(folder)
    return Run({**small.settings(folder), "encoder": encoder})


def rows(run: Run) -> list[Any]:
    return [row for path in run.files("triplets") for row in pq.read_table(path).to_pylist()]


def vectors(run: Run) -> list[bytes]:
    return [np.load(path).tobytes() for path in run.files("encode")]


@pytest.fixture(scope="module")
def here(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run of the model on this machine, text by text as the server does."""
    encoder = {"model": str(tiny), "batch_size": 1, "query_max_length": 128, "passage_max_length": 128}
    run = run_of(tmp_path_factory.mktemp("here"), {**encoder, "query_instruction": "find: "})
    with encoding_here():
        run.mine()
    return run


@pytest.mark.parametrize("api", ["openai", "tei"])
def test_mine_gives_the_rows_of_the_model_here(server: ModelServer, here: Run, tmp_path: Path, api: str) -> None:
    run = run_of(tmp_path, tree(server, api, query_instruction="find: ", http={"price": 5}))
    server.faults.extend([Fault(500), Fault(), Fault(429)])
    config = tmp_path / "served.yaml"
    config.write_text(yaml.safe_dump(run.config))
    outcome = small.run("mine", config)
    assert outcome.code == 0, outcome.err
    assert vectors(run) == vectors(here) and rows(run) == rows(here) and len(rows(run)) > 20
    once = {*server.texts}
    assert len(once) == TEXTS and len(server.texts) == TEXTS + len(
        run.parts("encode")
    )  # one text again after each part
    tokens = server.model.vectors([*once])[1]
    cost = f"cost {tokens * 5e-6:.4g} at 5 per million"
    said = f"the server read {tokens:,} tokens for these vectors, by its own count, {cost}"
    assert said in " ".join(outcome.err.split())
    stats = run.manifest("encode")["stats"]
    assert stats["tokens"] == tokens and stats["sent"]["cost"] == pytest.approx(tokens * 5e-6)
    again = small.run("mine", config, "--set", f"encoder.http.url={server.url}/", "--set", "encoder.http.batch_texts=3")
    assert "every stage is up to date" in again.out and len(server.texts) == TEXTS + len(run.parts("encode"))


def test_plan_tells_tokens_and_cost_and_sends_nothing(server: ModelServer, tmp_path: Path) -> None:
    encoder = tree(server, passage_instruction="text: ", http={"price": 1000.0})
    run = run_of(tmp_path, encoder)
    run.mine(only="ingest")
    (step,) = (step for step in estimate.plan(load_config(run.config)).steps if step.stage == "encode")
    written = [f"text: Title {i} document {i}" for i in range(small.DOCUMENTS)]
    written += [f"query {i}" for i in range(small.QUERIES)]
    expected = sum(len(text) // 4 + 1 for text in written)
    assert step.tokens == expected and step.cost == pytest.approx(expected / 1000)
    assert step.note.endswith(
        f"about {expected} tokens (a quarter of the bytes), cost 0.{expected} at 1000 per million"
    )
    config = tmp_path / "served.yaml"
    config.write_text(yaml.safe_dump(run.config))
    assert f"about {expected} tokens" in " ".join(small.run("plan", config).out.split())
    assert not server.tried
    server.counts = False
    run.mine()
    assert {*server.texts} == {*written}
    stats = run.manifest("encode")["stats"]
    assert stats["tokens"] == expected and stats["sent"]["estimated"]
    (step,) = (step for step in estimate.plan(load_config(run.config)).steps if step.stage == "encode")
    assert step.state == "current" and step.tokens is None


CHANGES = {
    "dimension": (Fault(change=lambda vectors: [vector[:16] for vector in vectors]), "previously of 32"),
    "model": (Fault(name="huge"), "serves the model 'huge'"),
    "weights": (
        Fault(change=lambda vectors: [vector[::-1] for vector in vectors]),
        "returns another vector for the first",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_server_that_changes_in_the_middle_costs_no_part(server: ModelServer, tmp_path: Path, what: str) -> None:
    run = run_of(tmp_path, tree(server, http={"concurrency": 1}))
    # Each part is one request, and one that repeats the first text.
    server.faults.extend([Fault()] * 4)
    server.always, said = CHANGES[what]
    with pytest.raises(InputError, match=said):
        run.mine()
    server.always = None
    made = run.committed("encode")
    sent = len(server.texts)
    assert 1 <= len(made) <= 3
    run.mine()
    missing = sum(part["key"] not in str(made) for part in run.parts("encode"))
    assert len(server.asked[-1 - 2 * missing]) == 1
    assert len(server.texts) - sent == TEXTS - sum(part["rows"] for part in made) + 1 + missing
    undisturbed = run.at(tmp_path / "undisturbed")
    undisturbed.mine()
    assert run.content("encode", "triplets") == undisturbed.content("encode", "triplets")


@pytest.mark.parametrize("dimension", [32, 16])
def test_another_model_under_the_same_name_is_found_out(server: ModelServer, tmp_path: Path, dimension: int) -> None:
    run = run_of(tmp_path, tree(server, "tei", http={"concurrency": 1}))
    server.faults.extend([Fault(), Fault(), Fault(401)])
    with pytest.raises(ConfigError, match="401"):
        run.mine()
    sent = len(server.asked)
    server.always = Fault(change=lambda vectors: [vector[::-1][:dimension] for vector in vectors])
    with pytest.raises(InputError, match=r"differs from the stored one.*another model"):
        run.mine()
    assert server.asked[sent:] == [server.asked[sent][:1]]


def test_a_cache_keeps_what_was_paid_for_within_a_part(server: ModelServer, here: Run, tmp_path: Path) -> None:
    http, cache = {"concurrency": 1, "batch_texts": 3}, str(tmp_path / "cache")
    run = run_of(tmp_path, tree(server, query_instruction="find: ", cache=cache, http=http))
    server.faults.extend([Fault()] * 4 + [Fault(401)])
    with pytest.raises(ConfigError, match="401"):
        run.mine()
    run.mine()
    repeated = {text for text, times in Counter(server.texts).items() if times > 1}
    assert len(repeated) <= 3  # which are compared: the first of each run, and one of a finished part
    assert rows(run) == rows(here)
    another = run.at(tmp_path / "another")
    sent = len(server.texts)
    another.mine()
    assert len(server.texts) == sent and rows(another) == rows(here)


def test_a_cache_of_another_dimension_is_said(server: ModelServer, tmp_path: Path) -> None:
    run = run_of(tmp_path, tree(server, cache=str(tmp_path / "cache"), http={"batch_texts": 3, "concurrency": 1}))
    server.faults.extend([Fault(), Fault(401)])
    with pytest.raises(ConfigError, match="401"):
        run.mine()
    server.always = Fault(change=lambda vectors: [vector[:16] for vector in vectors])
    with pytest.raises(InputError, match=r"gives vectors of dimension 16, the cache 32"):
        run.mine()


def test_a_missing_key_is_said_before_the_source_is_read(server: ModelServer, tmp_path: Path) -> None:
    run = run_of(tmp_path, tree(server, http={"key_env": "NOBODY_HAS_SET_THIS"}))
    with pytest.raises(ConfigError, match=r"encoder\.http\.key_env"):
        run.mine()
    assert not run.complete("ingest") and not server.tried


def test_a_document_that_is_refused_is_named(server: ModelServer, tmp_path: Path) -> None:
    run = run_of(tmp_path, tree(server))
    server.refuses = "Title 17 document 17".__eq__
    with pytest.raises(InputError, match=r"corpus, id 'd17': the server rejects this text.*returns 400"):
        run.mine()


def test_storage_and_the_size_of_requests(server: ModelServer, here: Run, tmp_path: Path) -> None:
    run = run_of(tmp_path, tree(server, query_instruction="find: ", storage="float32", http={"batch_texts": 3}))
    run.mine(only="ingest")
    run.mine(only="encode")
    for path, other in zip(run.files("encode"), here.files("encode"), strict=True):
        assert np.load(path).dtype == np.float32
        assert np.load(path).astype(np.float16).tobytes() == np.load(other).tobytes()


def test_what_requests_hold_is_counted_in_memory(tmp_path: Path) -> None:
    run = run_of(tmp_path, tree("http://nowhere"))
    run.mine(only="ingest")
    manifest = Books(run.folder, "ingest").manifest()
    assert manifest is not None
    for texts, fits in ((1, nullcontext()), (32, pytest.raises(BudgetError, match="encoding a part"))):
        http = tree("http://nowhere", http={"batch_texts": texts, "concurrency": 1})
        config = load_config({**run.config, "encoder": http, "resources": {"memory_budget": "64MiB"}})
        with digests_of(config) as digests, fits:
            context = Context(config, run.folder, digests)
            context = context.after(STAGES["ingest"], manifest)
            encode.check_fits(encode.STAGE.within(context), 150_000)


def test_settings_that_are_circumstance(tmp_path: Path) -> None:
    small.build(tmp_path)
    of = {}
    for name, encoder in {
        "one": tree("http://one"),
        "other place": tree("http://two:80/v1", http={"key_env": "K", "timeout": 1, "retries": 0, "price": 2}),
        "other requests": tree("http://one", http={"concurrency": 1, "batch_texts": 1, "batch_tokens": 5}),
        "model": tree("http://one") | {"model": "other"},
        "api": tree("http://one", "tei"),
        "answers_as": tree("http://one", http={"answers_as": "x"}),
        "instruction": tree("http://one", query_instruction="x"),
        "normalize": tree("http://one", normalize=False),
    }.items():
        of[name] = encode.STAGE.settings(load_config({**small.settings(tmp_path), "encoder": encoder}))
    assert of["one"] == of["other place"] == of["other requests"]
    assert len({json.dumps(settings) for settings in of.values()}) == 6


@pytest.mark.slow
@pytest.mark.parametrize("api", ["openai", "tei"])
def test_killed_and_resumed(server: ModelServer, here: Run, tmp_path: Path, api: str) -> None:
    """A worker of its own is killed with its parent: what it had not finished is all that is sent again."""
    http = {"concurrency": 2, "batch_texts": 2, "key_env": "THE_KEY"}
    run = run_of(tmp_path, tree(server, api, query_instruction="find: ", http=http))
    run = Run({**run.config, "executor": {"kind": "local", "workers": 1}})
    server.delay = 0.1
    server.faults.append(Fault(500, said="s3cr3t/Key+42"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THE_KEY", "s3cr3t/Key+42")
        interrupted(run, "encode", parts=2, how=kill)
        made = run.committed("encode")
        done = sum(part["rows"] for part in made)
        sent, server.delay = len(server.texts), 0.0
        code, _, log = run.command("mine")
    assert code == 0, log
    left = len(run.parts("encode")) - len(made)
    assert len(server.texts) - sent == TEXTS - done + 1 + left  # one is asked for again at first and after each part
    assert vectors(run) == vectors(here) and rows(run) == rows(here)
    assert {*server.keys} == {"Bearer s3cr3t/Key+42"}
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"s3cr3t" in content for content in written)


def test_no_secret_is_shown_or_written(server: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Good runs and bad ones, the key in the environment or the secret in the address: the disk and the terminal."""
    secrets = ("s3cr3t/Key+42", "passw0rd9", "t0k3n-in-query")
    monkeypatch.setenv("THE_KEY", secrets[0])
    addresses = [
        (f"{server.url}/v1?token={secrets[2]}", {"key_env": "THE_KEY"}, f"{secrets[0]} {secrets[2]}"),
        (server.url.replace("//", f"//mallory:{secrets[1]}@"), {}, secrets[1]),
    ]
    for number, (address, http, said) in enumerate(addresses):
        run = run_of(tmp_path / str(number), tree(address, http=http))
        config = tmp_path / f"{number}.yaml"
        config.write_text(yaml.safe_dump(run.config))
        shown = []
        server.faults.extend([Fault(500, said=said), Fault(401, said=said)])
        for command in (
            ["mine", config, "--debug"],
            ["mine", config, "--set", "output.report=true"],
            ["status", config],
            ["plan", config, "--set", "encoder.model=other", "--no-probe"],
            ["mine", config, "--set", f"encoder.http.url={address.replace('http:', 'ftp:')}"],
            ["mine", config, "--set", f"encoder.http.key_env={secrets[0]}"],
            ["export", config, "--to", "hub", "--out", str(tmp_path / f"hub-{number}")],
        ):
            outcome = small.run(*command)
            shown.append(outcome.out + outcome.err)
        assert "returns 401" in shown[0] and "Retrying in" in shown[0] and "rows in" in shown[1]
        assert "url is not an address" in shown[4] and "never put the key itself" in shown[5]
        config.unlink()
        written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
        for secret in secrets:
            assert not [text for text in shown if secret in text]
            assert not any(secret.encode() in content for content in written)
    assert not any(b"127.0.0.1" in path.read_bytes() for path in tmp_path.glob("hub-*/**/*") if path.is_file())
