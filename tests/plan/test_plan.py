"""What a run would do: said without running, with what would keep it from running."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import small_source as small
from clustered import DIMENSION, DOCUMENTS, KINDS, QUERIES, mined, write

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.engine.manifest import Books
from negpipe.engine.stage import Context, Made, Needs, Stage, Task, Workload
from negpipe.errors import ConfigError, InputError, NegpipeError
from negpipe.plan import estimate
from negpipe.plan.index_kinds import SEARCH_SHARE

pytestmark = pytest.mark.slow


def test_a_disk_too_small_for_the_plan_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path)
    (tmp_path / "plan.yaml").write_text(json.dumps(source))
    mined(source, "index.kind=stream", only="ingest")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    shown = " ".join(small.run("plan", tmp_path / "plan.yaml").out.split())
    assert re.search(r"encode missing .* refused, see below", shown)
    assert re.search(r"encode: vectors and search results take about [\d,]+ bytes in .*, 1,000 bytes are free", shown)
    assert re.search(r"The run needs [\d.]+ kB: free up space, or set run_dir", shown)


def test_auto_is_estimated_as_what_it_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path)
    mined(source, "index.kind=auto", only="ingest")
    for kind in ("stream", "IVF16,Flat"):
        monkeypatch.setattr("negpipe.ann.auto.choose", lambda *sizes, kind=kind: (kind, "told to"))
        found = estimate.plan(load_config(source, ["index.kind=auto"]), probe_encoder=False)
        steps = {step.stage: step for step in found.steps}
        meant = next(choice for choice in found.choices if choice.kind == kind)
        assert "the choice of auto: told to" in meant.note
        assert steps["index"].seconds == meant.build and steps["index"].note == meant.note
        assert steps["search"].seconds == pytest.approx(meant.search)


def test_nothing_is_fetched_or_read_before_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*arguments: object) -> None:
        raise AssertionError

    source = write(tmp_path)
    source["encoder"] = {"model": "some/model"}
    monkeypatch.setattr("negpipe.encoders.resolve_model", fetch)
    found = estimate.plan(load_config(source), probe_encoder=False)
    assert [step.note for step in found.steps[1:]] == ["waiting for ingest"] * 4


def test_ids_of_brought_vectors_are_read_by_encode_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be a hundred million: what a plan and a check want to know is how long a vector is."""
    source = write(tmp_path)
    mined(source, "index.kind=stream", only="ingest")

    def read(*arguments: object) -> None:
        raise AssertionError

    monkeypatch.setattr("negpipe.stages.encode.VectorFile", read)
    steps = {step.stage: step for step in estimate.plan(load_config(source)).steps}
    assert steps["encode"].disk and not steps["encode"].refusal


def test_brackets_in_a_refusal_are_shown(tmp_path: Path) -> None:
    source = write(tmp_path)
    (tmp_path / "plan.yaml").write_text(json.dumps(source))
    mined(source, "index.kind=stream", only="ingest")
    outcome = small.run("plan", tmp_path / "plan.yaml", "--set", "index.kind='IVF[/old]'")
    assert outcome.code == 0 and "index.kind 'IVF[/old]': FAISS rejects it" in " ".join(outcome.out.split())


def test_shards_take_about_an_hour_and_are_no_more_than_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path)
    (tmp_path / "plan.yaml").write_text(json.dumps(source))
    for stage in ("ingest", "encode", "index"):
        mined(source, only=stage)
    tasks = next(one.todo for one in estimate.plan(load_config(source)).steps if one.stage == "search")
    assert tasks
    for hours, shards in ((0.5, 1), (tasks - 0.5, tasks), (5 * tasks, tasks)):
        rate = DOCUMENTS * QUERIES * DIMENSION / SEARCH_SHARE / (3600 * hours) / source["resources"]["cpus"]
        monkeypatch.setattr("negpipe.ann.rate", lambda *sizes, rate=rate: rate)
        found = {one.stage: one for one in estimate.plan(load_config(source)).steps}
        assert found["search"].seconds == pytest.approx(3600 * hours) and found["search"].shards == shards
        assert found["ingest"].shards is None and found["encode"].shards is None  # nothing to do
    shown = " ".join(small.run("plan", tmp_path / "plan.yaml").out.split())
    assert f"in shards (negpipe work): search {tasks} × 5.0 h" in shown


def test_a_stage_of_ones_own_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(context: Context) -> Iterator[Task]:
        for part in context.manifest("ingest").of_kind("anchors"):
            yield Task(part.key, "counts", part.rows, {})

    def run(task: Task, *_: object) -> Made:
        return Made(task.rows)

    def needs(context: Context, work: Workload) -> Needs:
        return Needs(seconds=work.left / 10, disk=context.config.seed, note=f"{work.documents} documents")

    source = write(tmp_path)
    source["seed"] = 7
    silent = Stage("silent", 1, ("ingest",), lambda _: {}, plan, run)
    stages = {**graph.mining(load_config(source)), "silent": silent, "own": replace(silent, name="own", needs=needs)}
    monkeypatch.setattr(graph, "stages", lambda _: stages)
    found = {step.stage: step for step in estimate.plan(load_config(source)).steps}
    assert (found["own"].todo, found["own"].seconds, found["own"].note) == (None, None, "waiting for ingest")
    mined(source, only="ingest")
    found = {step.stage: step for step in estimate.plan(load_config(source)).steps}
    own = found["own"]
    assert own.todo and (own.seconds, own.disk, own.note) == (QUERIES / 10, 7, f"{DOCUMENTS} documents")
    assert found["silent"] == estimate.Step("silent", "missing", 0, own.todo)


@pytest.mark.parametrize("kind", ["stream", "IVF16,Flat"])
def test_a_search_takes_the_time_of_the_anchors_that_are_left(kind: str, tmp_path: Path) -> None:
    source = write(tmp_path)
    for stage in ("ingest", "encode", "index", "search"):
        mined(source, f"index.kind={kind}", only=stage)
    books = Books(Path(source["run_dir"]), "search")
    lost, *kept = books.parts()
    assert kept
    books.forget(lost.key)
    books.drop_manifest()
    found = estimate.plan(load_config(source, [f"index.kind={kind}"]))
    step = next(step for step in found.steps if step.stage == "search")
    whole = next(choice.search for choice in found.choices if choice.kind == kind)
    assert whole and step.seconds == pytest.approx(whole * lost.rows / QUERIES)


FOUR_OF_16 = ("resources.memory_budget=64MiB", "executor.kind=local", "executor.workers=4", "resources.cpus=4")


def test_plan_tells_without_running(tmp_path: Path) -> None:
    source = write(tmp_path)
    config = Path(source["run_dir"]).parent / "plan.yaml"
    config.write_text(json.dumps(source))
    outcome = small.run("plan", config, "--json")
    assert outcome.code == 0, outcome.err
    steps = {step["stage"]: step for step in json.loads(outcome.out)["steps"]}
    assert steps["ingest"]["state"] == "missing" and not Path(source["run_dir"]).exists()
    # Once the source is read, the vectors that are brought tell the dimension.
    assert small.run("ingest", config).code == 0
    found = json.loads(small.run("plan", config, "--json").out)
    assert next(choice for choice in found["choices"] if choice["kind"] == "flat")["disk"] == DOCUMENTS * DIMENSION * 4
    shown = small.run("plan", config).out
    assert re.search(r"encode +missing .*3,300 texts", shown) and re.search(r"flat .* 192.0 kB", shown)
    mined(source)
    before = small.made(Path(source["run_dir"]))
    found = json.loads(small.run("plan", config, "--json", "--set", "index.kind=IVF16,Flat").out)
    steps = {step["stage"]: step for step in found["steps"]}
    assert steps["encode"]["todo"] == 0 and steps["index"]["todo"] >= 1
    choices = {choice["kind"]: choice for choice in found["choices"]}
    assert set(choices) >= {"stream", "flat", "IVF16,Flat"}
    assert choices["flat"]["disk"] == DOCUMENTS * DIMENSION * 4
    assert steps["search"]["seconds"] == choices["IVF16,Flat"]["search"] > 0
    assert found["free"] > 0
    assert small.made(Path(source["run_dir"])) == before
    # An edit in the middle: ingest reads it, the plan says how much of encode it costs.
    rows = small.documents(DOCUMENTS)
    rows[1500]["text"] = "edited"
    small.write_rows(Path(source["data"]["path"]) / "corpus.jsonl", rows)
    assert small.run("ingest", config).code == 0
    steps = {step["stage"]: step for step in json.loads(small.run("plan", config, "--json").out)["steps"]}
    assert steps["encode"]["state"] == "stale"


@pytest.mark.parametrize(
    ("overrides", "stage", "message"),
    [
        (["index.kind=IVF16,Nonsense"], "index", "index.kind 'IVF16,Nonsense': FAISS rejects it"),
        (["search.depth=3000", *FOUR_OF_16], "search", "anchors to depth 3,000 needs"),
        (
            ["mining.range_min=5000", "mining.range_max=6000", "search.depth=6000"],
            "triplets",
            "the window starts at rank 5000",
        ),
        (["mining.max_depth=4000", "search.depth=2500", "resources.memory_budget=64MiB"], "triplets", "choosing from"),
    ],
)
def test_what_would_stop_a_run_is_said(tmp_path: Path, overrides: list[str], stage: str, message: str) -> None:
    source = write(tmp_path)
    mined(source, "index.kind=stream")
    found = estimate.plan(load_config(source, ["index.kind=stream", *overrides]), probe_encoder=False)
    refused = {step.stage: step.refusal for step in found.steps if step.refusal}
    assert message in refused[stage]
    arguments = [part for override in ("index.kind=stream", *overrides) for part in ("--set", override)]
    (tmp_path / "plan.yaml").write_text(json.dumps(source))
    shown = small.run("plan", tmp_path / "plan.yaml", "--no-probe", *arguments).out
    assert re.search(rf"^{stage} .*refused, see below", shown, re.MULTILINE)
    assert re.search(rf"^  [\w, ]*{stage}[\w, ]*: .*{re.escape(message)}", shown, re.MULTILINE)
    with pytest.raises(NegpipeError, match=re.escape(message)) as caught:
        mined(source, "index.kind=stream", *overrides)
    if message == "choosing from":  # both remedies together help
        assert "or lower search.depth (2,500 now) and set mining.max_depth: 0" in str(caught.value)
        mined(source, "index.kind=stream", *overrides, "search.depth=64", "mining.max_depth=0")


@pytest.mark.parametrize("kind", [*KINDS, "PQ8x4fsr", "IVF500,Flat"])
def test_plan_estimates_any_kind_and_says_what_is_refused(tmp_path: Path, kind: str) -> None:
    source = write(tmp_path)
    mined(source, "index.kind=stream")
    before = small.made(Path(source["run_dir"]))
    found = estimate.plan(load_config(source, [f"index.kind={kind}"]), probe_encoder=False)
    choice = next(one for one in found.choices if one.kind == kind)
    assert small.made(Path(source["run_dir"])) == before
    if kind not in KINDS:
        assert choice.disk is None and choice.refusal.startswith("index.kind")
        return
    assert choice.build and choice.search and choice.memory


def test_a_script_without_a_main_guard_runs_once(tiny: Path, tmp_path: Path) -> None:
    """multiprocessing's spawn runs the caller's script again, to the end, before it times anything."""
    config = small.build(tmp_path)
    settings = small.settings(tmp_path) | {"encoder": {"model": str(tiny), "pooling": "mean"}}
    config.write_text(json.dumps(settings))
    graph.mine(load_config(settings), only="ingest")
    script = tmp_path / "script.py"
    script.write_text(
        f"""
with open({str(tmp_path / "runs")!r}, "a") as file:
    file.write("x")
from {estimate.__name__} import plan
from negpipe.config.file import load_config
found = plan(load_config({str(config)!r}))
print(next(step.seconds for step in found.steps if step.stage == "encode"))
"""
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 0
    assert (tmp_path / "runs").read_text() == "x"


def test_a_model_that_cannot_be_timed_is_named(tiny: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    settings = small.settings(tmp_path) | {"encoder": {"model": str(broken), "pooling": "mean"}}
    small.build(tmp_path)
    graph.mine(load_config(settings), only="ingest")
    with pytest.raises(InputError) as refused:
        estimate.plan(load_config(settings))
    assert "encoder.model" in str(refused.value)


def test_plan_times_the_model_and_knows_kinds_before_anything_is_encoded(tiny: Path, tmp_path: Path) -> None:
    small.build(tmp_path)
    settings = small.settings(tmp_path)
    settings["encoder"] = {"model": str(tiny), "pooling": "mean"}
    graph.mine(load_config(settings), only="ingest")
    found = estimate.plan(load_config(settings))
    encode = next(step for step in found.steps if step.stage == "encode")
    assert encode.seconds and encode.disk and "measured on" in encode.note
    assert {"stream", "flat"} <= {choice.kind for choice in found.choices}
    assert not (tmp_path / "run/encode").exists()
    # What goes wrong in the model's own process is said as here.
    with pytest.raises(ConfigError, match=r"encoder\.device: 'cuda:99' does not exist"):
        estimate.plan(load_config(settings, ["encoder.device=cuda:99"]))
