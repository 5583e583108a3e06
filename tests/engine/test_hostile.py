"""Hostile input: nothing of it steers a terminal, becomes a path, runs, leaks a secret or leads out of the run."""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import os
import pickle
import re
import stat
import sys
from contextlib import nullcontext
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import small_source as small
from real_runs import Run, encoding_here
from upkeep_of import config_of

import negpipe
from negpipe import graph
from negpipe.ann import vectors as parts_of_vectors
from negpipe.config import safe_yaml
from negpipe.config.file import load_config
from negpipe.engine import upkeep
from negpipe.errors import ConfigError, InputError, NegpipeError, StorageError
from negpipe.redaction import redact
from negpipe.sources import identity

ESCAPES = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e<script>alert(1)</script>[bold]x[/bold]\x08"
PACKAGE = Path(negpipe.__file__).parent


# --- terminals --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in which every text and every id tries to steer the terminal."""
    folder = tmp_path_factory.mktemp("hostile")
    corpus = [{"_id": f"d{i}{ESCAPES}", "title": "", "text": f"{ESCAPES} document {i}"} for i in range(40)]
    asked = [{"_id": f"q{i}{ESCAPES}", "text": f"{ESCAPES} query {i}"} for i in range(12)]
    small.build(folder, corpus, asked)
    small.write_rows(folder / "data/corpus.jsonl", [*corpus, {"_id": ESCAPES, "text": 5}])
    np.save(folder / "corpus.npy", small.vectors(41, 1))
    qrels = [(f"q{i}{ESCAPES}", f"d{3 * i}{ESCAPES}", 1) for i in range(12)]
    small.write_qrels(folder / "data/qrels/train.tsv", qrels)
    outcome = small.run("mine", folder / "config.yaml", "--max-bad-rows", 1)
    assert outcome.code == 0, outcome.err
    check_harmless(outcome)
    assert "document" in outcome.out
    return folder


def check_harmless(outcome: small.Outcome) -> None:
    raw = [c for c in outcome.out + outcome.err if c != "\n" and not c.isprintable()]
    assert raw == []


ALLOWED = ("--set", "data.max_bad_rows=1")


@pytest.mark.slow
@pytest.mark.guarantee(
    "texts or ids contain terminal escapes or HTML",
    "shown written out, never raw",
    section="input",
)
@pytest.mark.parametrize(
    "command",
    [
        ("status", *ALLOWED),
        ("verify",),
        ("clean", "--yes"),
        ("explain", "--anchor", f"q1{ESCAPES}", *ALLOWED),
        ("explain", "--anchor", f"q1{ESCAPES}", "--json", *ALLOWED),
        ("explain", "--anchor", f"q99{ESCAPES}", *ALLOWED),
        ("explain", "--anchor", ESCAPES, "--debug", *ALLOWED),
        ("quality", *ALLOWED),
        ("audit", *ALLOWED),
        ("calibrate", "--near-anchors", "0.5", *ALLOWED),
        ("plan", *ALLOWED),
        ("report", *ALLOWED),
        ("mine", *ALLOWED),
        ("mine",),
        ("mine", "--log-format", "json"),
        ("mine", "--debug"),
        ("mine", "--set", f"data.{ESCAPES}=1"),
        ("mine", "--set", f"data.path=./{ESCAPES}"),
        ("mine", "--set", f"encoder.corpus_vectors={ESCAPES}.npy", *ALLOWED),
        ("mine", f"--{ESCAPES}"),
        (f"{ESCAPES}",),
        ("config", "show", "--set", f'data.path="{ESCAPES!a}"'.replace("'", "")),
    ],
    ids=lambda command: re.sub(r"[^\w -]", "", " ".join(command))[:60],
)
def test_no_command_lets_an_escape_through(command: tuple[str, ...], hostile: Path) -> None:
    verbs = 2 if command[0] == "config" else 1
    outcome = small.run(*command[:verbs], hostile / "config.yaml", *command[verbs:])
    check_harmless(outcome)
    assert outcome.out + outcome.err


@pytest.mark.guarantee("texts or ids contain terminal escapes or HTML")
def test_an_export_lets_no_html_into_its_card(hostile: Path, tmp_path: Path) -> None:
    outcome = small.run("export", hostile / "config.yaml", "--to", "hub", "--out", tmp_path / "hub", *ALLOWED)
    assert outcome.code == 0, outcome.err
    check_harmless(outcome)
    card = (tmp_path / "hub/README.md").read_text(encoding="utf-8")
    assert "<script>" not in card


def test_what_a_terminal_gets_is_filtered_too(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal rich writes escapes of its own; those of the data still do not pass."""
    import io

    from rich.console import Console

    from negpipe.cli import console

    screen = Console(file=io.StringIO(), force_terminal=True, width=200, highlight=False)
    screen.push_render_hook(console._Visible())
    screen.print("[bold]own[/bold]")
    screen.print(f"a{ESCAPES}", markup=False)
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[1mown\x1b[0m" in shown
    assert not re.search("\x1b\\[2J|\x1b\\]|\x07|\x9b|\u202e|\x08", shown)
    assert "\\x1b[2J" in shown
    assert console.out._render_hooks
    assert console.err._render_hooks


def test_a_manifest_with_escapes_is_shown_without(hostile: Path, tmp_path: Path) -> None:
    graph.mine(load_config(str(small.build(tmp_path))), only="ingest")
    run = Run({"run_dir": str(tmp_path / "run")})
    manifest = run.manifest("ingest")
    manifest["provenance"]["finished"] = f"[red]now{ESCAPES}"
    manifest["parts"][0]["files"][0]["path"] = "ingest/" + ESCAPES.replace("/", "-")
    run.change_manifest("ingest", manifest)
    outcome = small.run("status", tmp_path / "config.yaml")
    check_harmless(outcome)
    assert "damaged" in outcome.out


# --- paths ------------------------------------------------------------------------------------------------


@pytest.mark.guarantee(
    "an id is `../../x`",
    "it is never a path",
    section="input",
)
def test_ids_never_become_paths(tmp_path: Path) -> None:
    names = [
        "../../escape",
        "/etc/passwd",
        "..",
        ".",
        "a/b",
        "CON",
        "x" * 5000,
        "~root",
        "$HOME",
        "-rf",
        "a\x00b",
        "%2e",
    ]
    corpus = [{"_id": name, "title": "", "text": f"document {at}"} for at, name in enumerate(names)]
    asked = [{"_id": name, "text": f"query {at}"} for at, name in enumerate(names)]
    config = small.build(tmp_path / "inside", corpus, asked)
    qrels = [(name, name, 1) for name in names]
    small.write_rows(
        tmp_path / "inside/data/qrels.jsonl",
        [{"query-id": one, "corpus-id": other, "score": grade} for one, other, grade in qrels],
    )
    tables = ("corpus", "queries", "qrels")
    named = [f"data.{name}={tmp_path}/inside/data/{name}.jsonl" for name in tables]
    result = negpipe.mine(config, ["data.format=columns", *named])
    assert set(pq.read_table(result.triplets)["anchor_id"].to_pylist()) == set(names)
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]
    for path in (tmp_path / "inside/run").rglob("*"):
        assert re.fullmatch(r"[\w@.-]+", path.name), path
    options = ["--to", "flagembedding", "--out", str(tmp_path / "out"), "--shard-rows", "3"]
    settings = [word for name in ["data.format=columns", *named] for word in ("--set", name)]
    assert small.run("export", config, *options, *settings).code == 0
    assert {re.sub(r"\d+", "N", path.name) for path in (tmp_path / "out").iterdir()} <= {
        "train-N-of-N.jsonl",
        "train-N.jsonl",
    }


# --- code -------------------------------------------------------------------------------------------------


class Exploit:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.guarantee(
    "a vector file contains a pickle",
    "refused, not run",
    section="input",
)
def test_vectors_are_never_unpickled(tmp_path: Path) -> None:
    owned = tmp_path / "owned"
    bomb = np.array([[Exploit(owned)] * 8] * 40, dtype=object)
    config = small.build(tmp_path)
    np.save(tmp_path / "corpus.npy", bomb, allow_pickle=True)
    with pytest.raises(InputError, match=r"corpus\.npy.*Python objects"):
        negpipe.mine(config)
    (tmp_path / "corpus.npy").write_bytes(pickle.dumps(Exploit(owned)))
    with pytest.raises(InputError, match=r"corpus\.npy.*not a readable \.npy"):
        negpipe.mine(config)
    np.save(tmp_path / "part.npy", bomb, allow_pickle=True)
    with pytest.raises(NegpipeError):
        parts_of_vectors.open_parts([tmp_path / "part.npy"])
    assert not owned.exists()
    pickle.loads(pickle.dumps(Exploit(owned)))  # the exploit is one
    assert owned.exists()


@cache
def all_calls() -> list[ast.Call]:
    """Every call in the package."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]
    return [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]


def calls(name: str) -> list[ast.Call]:
    """Every call of `….NAME(…)` in the package."""
    return [node for node in all_calls() if getattr(node.func, "attr", getattr(node.func, "id", "")) == name]


def test_nothing_in_the_package_unpickles_or_evaluates() -> None:
    found = [node for node in calls("load") if isinstance(node.func, ast.Attribute)]
    of_numpy = [node for node in found if ast.unparse(node.func) == "np.load"]
    assert of_numpy
    for node in of_numpy:
        pickled = [keyword.value for keyword in node.keywords if keyword.arg == "allow_pickle"]
        assert all(isinstance(value, ast.Constant) and value.value is False for value in pickled)
    assert not {"pickle.load", "torch.load", "yaml.load", "joblib.load"} & {ast.unparse(node.func) for node in found}
    for name in ("eval", "exec", "loads"):
        assert all(ast.unparse(node.func) in ("json.loads", "model.eval") for node in calls(name))
    for name in ("load_dataset", "load_dataset_builder"):
        assert not [k for node in calls(name) for k in node.keywords if k.arg == "trust_remote_code"]


@pytest.mark.guarantee(
    "a config contains Python tags or an alias bomb",
    "refused before it grows",
    section="input",
)
@pytest.mark.parametrize(
    "text",
    [
        "run_dir: !!python/object/apply:os.system ['touch owned']",
        "!!python/object/new:os.system [touch owned]",
        "seed: !!python/name:os.system",
        "data: !!python/module:os",
        "data: !!python/tuple [1]",
        "data: !custom 1",
    ],
)
def test_a_config_makes_no_objects(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"c\.yaml is not valid YAML: line 1, .*could not determine a constructor"):
        load_config("c.yaml")
    with pytest.raises(ConfigError, match=r"not valid YAML"):
        load_config(small.settings(tmp_path), [f"seed={text.partition(': ')[2] or text}"])
    assert not Path("owned").exists()


def bomb(inner: str, opening: str, closing: str) -> str:
    """Nine levels that each name the one before nine times."""
    levels = [f"a: &a {inner}"]
    for before, name in pairwise("abcdefghi"):
        levels.append(f"{name}: &{name} {opening}{', '.join([f'*{before}'] * 9)}{closing}")
    return "\n".join(levels)


@pytest.mark.guarantee("a config contains Python tags or an alias bomb")
@pytest.mark.parametrize(
    "text",
    [
        bomb("[x, x, x, x, x, x, x, x, x]", "[", "]"),
        bomb("{x: 1}", "{<<: [", "]}"),
        "a: &a [*a]",
        "a: &a {b: *a}",
        "seed: [" + "1, " * 10_001 + "1]",
        "[" * 500,
    ],
)
def test_a_bomb_of_aliases_is_refused_before_it_grows(text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"c\.yaml is not valid YAML: (more than 10,000 values|it is nested too deeply)"
    ):
        load_config(str(path))


def test_aliases_that_people_write_still_work() -> None:
    assert safe_yaml.load("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}") == {
        "a": {"x": 1},
        "b": {"x": 1},
        "c": {"x": 1, "y": 2},
    }


MODELING = """
from pathlib import Path
Path({owned!r}).touch()
from transformers import BertConfig, BertModel
class OwnConfig(BertConfig):
    model_type = "own-bert"
class OwnModel(BertModel):
    config_class = OwnConfig
"""


@pytest.mark.guarantee(
    "a model brings code",
    "not run unless `encoder.trust_remote_code` is on, then with a warning",
    section="input",
)
@pytest.mark.slow
@pytest.mark.torture
@pytest.mark.parametrize("backend", ["flagembedding", "sentence-transformers"])
def test_code_of_a_model_runs_only_where_the_config_says_so(
    backend: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """In worker processes with --torture; without, the stage runs here, where the libraries are imported already."""
    import shutil

    full = request.config.getoption("--torture")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    if not full:  # read when the library was imported
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
        monkeypatch.setattr(sys, "path", [*sys.path])
    owned = tmp_path / "owned"
    model = tmp_path / f"model_{backend.replace('-', '_')}"
    shutil.copytree(tiny, model)
    (model / "own.py").write_text(MODELING.format(owned=str(owned)), encoding="utf-8")
    settings = json.loads((model / "config.json").read_text(encoding="utf-8"))
    mapped = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    (model / "config.json").write_text(json.dumps(settings | {"model_type": "own-bert", "auto_map": mapped}))
    config = small.build(tmp_path)
    options = [f"encoder.backend={backend}", f"encoder.model={model}", "encoder.batch_size=8"]
    options += ["executor.kind=local"] if full else []
    arguments = [word for option in options for word in ("--set", option)]

    with nullcontext() if full else encoding_here():
        outcome = small.run("mine", config, *arguments)
    assert outcome.code == 3, outcome.err
    assert "encoder.trust_remote_code" in outcome.err
    assert not owned.exists()

    with nullcontext() if full else encoding_here():
        trusting = small.run("encode", config, *arguments, "--set", "encoder.trust_remote_code=true")
    assert "encoder.trust_remote_code is on: code shipped with the model runs" in trusting.err
    assert owned.exists(), trusting.err


# --- secrets ----------------------------------------------------------------------------------------------

SECRET = "sEcReT123"
URLS = [
    f"https://user:{SECRET}@host.invalid/p.jsonl",
    f"https://{SECRET}@host.invalid/p.jsonl",
    f"https://user:p@{SECRET}@host.invalid/p.jsonl",
    f"https://host.invalid/p.jsonl?X-Amz-Signature={SECRET}&X-Amz-Credential={SECRET}",
    f"https://host.invalid/p.jsonl?a=b&anything={SECRET}#{SECRET}",
    f"https://host.invalid/p.jsonl#token={SECRET}",
    f"s3://key:{SECRET}@bucket/p.jsonl",
]


@pytest.mark.parametrize("url", URLS)
def test_a_url_keeps_its_place_and_loses_its_secrets(url: str) -> None:
    for text in (url, f"'{url}'", f"({url}), row 3", f'"{url}".', f"a {url} b {url}"):
        assert SECRET not in redact(text)
        assert "p.jsonl" in redact(text)
    assert redact(f"hf_{SECRET}x") == "hf_***"
    for plain in ("https://host/p.jsonl", "a@b.c", "what? #1", "memory://store/p.jsonl.gz", "hf_hub"):
        assert redact(plain) == plain


def everything(folder: Path) -> str:
    return "".join(path.read_text(encoding="utf-8", errors="replace") for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
@pytest.mark.guarantee(
    "a URL contains a password or token",
    "hidden in logs, errors, manifests, cards",
    section="input",
)
def test_no_secret_of_a_url_is_shown_or_written(tmp_path: Path) -> None:
    """A run whose source is at an address with secrets: logs, errors, manifests, sidecars, summary, export, list."""
    import fsspec

    rows = [{"anchor": f"a{i}", "positive": f"p{i}"} for i in range(12)]
    url = f"memory://store/p.jsonl?token={SECRET}"
    with fsspec.open(url, "wb") as file:
        file.write(b"".join(json.dumps(row).encode() + b"\n" for row in [*rows, {"anchor": 1, "positive": "p"}]))
    config = small.build(tmp_path / "work")
    np.save(tmp_path / "work/corpus.npy", small.vectors(13, 1))
    np.save(tmp_path / "work/anchors.npy", small.vectors(13, 2))
    options = ["--set", "data.format=pairs", "--set", f"data.path={url}"]
    shown = []
    for command in (
        ("mine", *options),
        ("mine", *options, "--debug"),
        ("mine", *options, "--log-format", "json"),
        ("mine", *options, "--max-bad-rows", "1"),
        ("status", *options, "--set", "data.max_bad_rows=1"),
        ("status", *options),
        ("status",),
        ("export", *options, "--set", "data.max_bad_rows=1", "--to", "hub", "--out", str(tmp_path / "hub")),
        ("audit", *options, "--set", "data.max_bad_rows=1"),
        ("mine", "--set", f"encoder.model=https://u:{SECRET}@h/m", "--set", "encoder.backend=flagembedding"),
        ("mine", "--set", f"data.part_rows=https://u:{SECRET}@h/m"),
        ("mine", "--set", "data.format=pairs", "--set", f"data.path=https://u:{SECRET}@127.0.0.1:1/p.jsonl?k={SECRET}"),
    ):
        outcome = small.run(command[0], config, *command[1:])
        shown.append(outcome.out + outcome.err)
        assert SECRET not in shown[-1], command
    assert "13 rows" not in shown[3]
    assert "memory://store/p.jsonl?***, row 13, field 'anchor'" in shown[0]
    assert "source rows rejected" in shown[3]
    assert "memory://store/p.jsonl?***" in (tmp_path / "work/run/.negpipe/ingest/manifest.json").read_text()
    assert "memory://store/p.jsonl?***" in (tmp_path / "work/run/rejected.jsonl").read_text()
    written = everything(tmp_path / "work/run") + everything(tmp_path / "hub")
    assert SECRET not in written


def test_a_new_token_is_no_new_source(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(url: str) -> str:
        return "ETag=1"

    monkeypatch.setattr(identity, "version", version)
    from negpipe.config.schema import Data

    urls = [f"https://host.invalid/p.jsonl?sig={n}" for n in (1, 2)]
    assert len({identity.revision(Data(format="pairs", path=url)) for url in urls}) == 1


def test_a_worker_writes_no_secret_into_its_log(tmp_path: Path) -> None:
    """What a library says of an address in a worker lands in a file of the run directory."""
    from negpipe.redaction import Redacting

    try:
        raise OSError(URLS[0])
    except OSError:
        record = logging.makeLogRecord({"msg": "failed: %s", "args": (URLS[3],), "exc_info": sys.exc_info()})
    assert SECRET not in Redacting("%(message)s").format(record)
    worker = (PACKAGE / "worker.py").read_text(encoding="utf-8")
    assert "print_exc" not in worker
    assert "Redacting(" in worker


# --- links and rights -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    [
        "triplets",
        ".negpipe",
        ".negpipe/logs",
        ".negpipe/ingest",
        ".triplets-old",
        ".model/0/config.json",
        "rounds/1/.triplets/part-00000.parquet",
        "encode/deep",
    ],
)
def test_a_folder_that_leads_out_of_the_run_directory_is_refused(place: str, tmp_path: Path) -> None:
    config = small.build(tmp_path)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept.npy").write_text("mine", encoding="utf-8")
    link = tmp_path / "run" / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(outside)
    for repair in (False, True):
        with pytest.raises(
            StorageError, match=rf"run/{re.escape(place)} is a link that leads out of the run directory"
        ):
            graph.mine(load_config(str(config)), repair=repair)
    with pytest.raises(StorageError):
        graph.clean(config_of(tmp_path / "run"))
    assert [path.name for path in outside.iterdir()] == ["kept.npy"]


@pytest.mark.parametrize("name", ["run.lock", "holder.json", "digests.json", "logs/encode-0.log"])
def test_a_file_that_leads_out_of_the_run_directory_is_not_written_through(name: str, tmp_path: Path) -> None:
    config = small.build(tmp_path)
    victim = tmp_path / "victim"
    victim.write_text("mine", encoding="utf-8")
    link = tmp_path / "run/.negpipe" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(victim)
    outcome = small.run("mine", config)
    assert outcome.code == 1
    assert "is a link that leads out of the run directory" in outcome.err
    assert victim.read_text(encoding="utf-8") == "mine"


@pytest.mark.guarantee(
    "any other link in the run directory leads out of it",
    "refused; nothing outside is written or deleted",
    section="input",
)
def test_clean_and_repair_delete_nothing_elsewhere(tmp_path: Path) -> None:
    config = load_config(str(small.build(tmp_path)))
    graph.mine(config)
    outside = tmp_path / "outside"
    outside.mkdir()
    victim = outside / "victim.npy"
    victim.write_text("mine", encoding="utf-8")
    for place in ("encode/link.npy", "encode/folder", "file.npy"):
        link = tmp_path / "run" / place
        link.symlink_to(victim if place.endswith("npy") else outside)
        with pytest.raises(StorageError):
            graph.clean(config_of(tmp_path / "run"))
        with pytest.raises(StorageError):
            graph.mine(config, repair=True)
        link.unlink()
    assert victim.read_text(encoding="utf-8") == "mine"
    # A link that stays inside is nobody's business, and the run directory itself may be one.
    (tmp_path / "run/here").symlink_to(tmp_path / "run/encode")
    assert graph.mine(config).ran == ()
    (tmp_path / "run/here").unlink()
    (tmp_path / "run").rename(outside / "run")
    (tmp_path / "run").symlink_to(outside / "run")
    assert graph.mine(config).ran == ()


@pytest.mark.slow
@pytest.mark.guarantee(
    "a folder of a stage is a link to another disk",
    "used; only what was recorded is deleted there, and no link in it is followed",
    section="input",
)
@pytest.mark.parametrize("place", ["ingest", "encode", "index", "search", "ledger"])
def test_a_folder_of_a_stage_may_lie_on_another_disk(place: str, tmp_path: Path) -> None:
    config, scratch = small.build(tmp_path), tmp_path / "scratch"
    (scratch / "other").mkdir(parents=True)
    (scratch / "mine.npy").write_text("mine", encoding="utf-8")
    link = tmp_path / "run" / place
    link.parent.mkdir()
    link.symlink_to(scratch)
    for settings in ([], ["mining.num_negatives=2", "encoder.storage=float16", "search.depth=20", "data.part_rows=5"]):
        graph.mine(load_config(str(config), settings))
        assert link.is_symlink()
    assert len([*scratch.iterdir()]) > 2
    graph.mine(load_config(str(config)))
    graph.mine(load_config(str(config)), repair=True)
    assert not upkeep.verify(config_of(tmp_path / "run"), graph.inventory(config_of(tmp_path / "run")))
    assert graph.clean(config_of(tmp_path / "run")) > 0
    kept = {path.name for path in scratch.iterdir()}
    recorded = {Path(file.path).name for file in graph.inventory(config_of(tmp_path / "run")).files}
    assert {"other", "mine.npy"} <= kept <= recorded | {"other", "mine.npy"}
    assert {state.state for state in graph.status(load_config(str(config)))} == {"current"}
    # Beyond the folder nothing is followed.
    (scratch / "leads.npy").symlink_to(tmp_path / "corpus.npy")
    with pytest.raises(StorageError):
        graph.clean(config_of(tmp_path / "run"))


def test_two_runs_that_share_a_linked_folder_clean_their_own(tmp_path: Path) -> None:
    config, scratch = small.build(tmp_path), tmp_path / "scratch"
    scratch.mkdir()
    runs = [str(tmp_path / name) for name in ("one", "two")]
    for run_dir, storage in zip(runs, ("float16", "float32"), strict=True):
        Path(run_dir).mkdir()
        (Path(run_dir) / "encode").symlink_to(scratch)
        graph.mine(load_config(str(config), [f"run_dir={run_dir}", f"encoder.storage={storage}"]))
    for run_dir in runs:
        graph.clean(config_of(Path(run_dir)))
        assert not upkeep.verify(config_of(Path(run_dir)), graph.inventory(config_of(Path(run_dir))))
    assert not upkeep.verify(config_of(Path(runs[0])), graph.inventory(config_of(Path(runs[0]))))


@pytest.mark.parametrize("place", ["encode/sub/victim.txt", "photos/victim.txt", "index/victim.txt"])
def test_a_forged_record_frees_nothing_of_others(place: str, tmp_path: Path) -> None:
    config, run_dir = small.build(tmp_path), tmp_path / "run"
    (tmp_path / "scratch").mkdir()
    run_dir.mkdir()
    (run_dir / "encode").symlink_to(tmp_path / "scratch")
    graph.mine(load_config(str(config)))
    victim = run_dir / place
    victim.parent.mkdir(exist_ok=True)
    victim.write_text("mine", encoding="utf-8")
    record = run_dir / ".negpipe/encode" / f"{'0' * 16}.json"
    value = json.loads(next((run_dir / ".negpipe/encode").glob("[0-9a-f]*.json")).read_text(encoding="utf-8"))
    del value["digest"]  # as before there were any
    value |= {"key": "0" * 16, "files": [{"path": place, "bytes": 4, "digest": "0" * 64}]}
    record.write_text(json.dumps(value), encoding="utf-8")
    graph.clean(config_of(run_dir))
    assert victim.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("name", ["photos", "triplets", "logs"])
def test_only_folders_of_stages_may_be_links(name: str, tmp_path: Path) -> None:
    config = small.build(tmp_path)
    for folder in ("run", "elsewhere"):
        (tmp_path / folder).mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError):
        graph.mine(load_config(str(config)))


def test_a_link_to_a_folder_around_the_run_is_refused(tmp_path: Path) -> None:
    config = small.build(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/encode").symlink_to(tmp_path)
    with pytest.raises(StorageError):
        graph.mine(load_config(str(config)))


@pytest.mark.guarantee(
    "files of your own are beside the rows",
    "kept by `clean` and by every new setting",
    section="input",
)
def test_clean_deletes_what_was_recorded_and_nothing_else(tmp_path: Path) -> None:
    config = small.build(tmp_path)
    run_dir = tmp_path / "run"
    for settings in (["mining.num_negatives=2", "encoder.storage=float16"], []):
        graph.mine(load_config(str(config), settings))
    key, digest = "0" * 16, "1" * 12
    theirs = [
        *(f"{folder}/{name}" for folder in ("triplets", "encode", "ledger") for name in ("NOTES.md", "a.parquet")),
        f"encode/{key}-{digest}.npy",  # called like a part, with another content
        "encode/.note.tmp",
        ".negpipe/encode/notes.json",
        ".negpipe/search/mine.npz",
        ".triplets-backup/part-00000.parquet",
    ]
    content = b"a part that a killed run could not record any more"
    orphan = run_dir / "encode" / f"{key}-{hashlib.sha256(content).hexdigest()[:12]}.npy"
    orphan.write_bytes(content)
    for name in theirs:
        (run_dir / name).parent.mkdir(exist_ok=True)
        (run_dir / name).write_text("mine", encoding="utf-8")
    listed = {path for path, _ in graph.superseded(config_of(run_dir))}
    before = {path for path in run_dir.rglob("*") if path.is_file()}
    assert graph.clean(config_of(run_dir)) > 0
    gone = before - {path for path in run_dir.rglob("*") if path.is_file()}
    assert {path for path in gone if ".triplets" not in path.parts} == listed  # links to rows go with the rows
    assert orphan in listed
    assert all((run_dir / name).read_text(encoding="utf-8") == "mine" for name in theirs)
    assert {state.state for state in graph.status(load_config(str(config)))} == {"current"}


@pytest.mark.guarantee(
    "a run directory is made",
    "for you alone (0700); one that exists keeps its rights",
    section="input",
)
def test_a_new_run_directory_is_for_the_user_alone(tmp_path: Path) -> None:
    config = small.build(tmp_path)
    before = os.umask(0o000)
    try:
        assert small.run("mine", config, "--set", f"run_dir={tmp_path}/deep/new").code == 0
        (tmp_path / "shared").mkdir(mode=0o775)
        assert small.run("mine", config, "--set", f"run_dir={tmp_path}/shared").code == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "deep/new").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o775
    assert (tmp_path / "deep/new/triplets").is_dir()


def test_archives_are_no_source(tmp_path: Path) -> None:
    import io
    import tarfile

    with tarfile.open(tmp_path / "p.tar.gz", "w:gz") as archive:
        entry = tarfile.TarInfo("../escape.jsonl")
        entry.size = 2
        archive.addfile(entry, io.BytesIO(b"{}"))
    outcome = small.run(
        "mine", small.build(tmp_path / "in"), "--set", "data.format=pairs", "--set", f"data.path={tmp_path}/p.tar.gz"
    )
    assert outcome.code == 3
    assert "unknown file extension '.tar'" in outcome.err
    assert not list(tmp_path.rglob("escape*"))
