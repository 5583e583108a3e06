"""Ways to run a model: what is timed, and what agreement of neighbours means."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest
import small_source as small

from negpipe.cli.planning import _advice, _encoding
from negpipe.config.encoder import Encoder
from negpipe.config.file import load_config
from negpipe.encoders import has_units, is_installed, timing
from negpipe.encoders.timing import Timed, time_models
from negpipe.engine import processor
from negpipe.engine.budget import DEFAULT
from negpipe.errors import ConfigError, TaskFailedError
from negpipe.plan import variants
from negpipe.plan.estimate import Encoding, Plan, recommended
from negpipe.plan.sample import Outcome
from negpipe.plan.variants import BATCH_TOKENS, NEIGHBOURS, Variant, agreement, measured

pytestmark = pytest.mark.slow

units = pytest.mark.skipif(not has_units("bfloat16", "cpu"), reason="this processor has no units for bfloat16")


def neighbours(vectors: np.ndarray) -> Iterable[set[int]]:
    for at, vector in enumerate(vectors):
        scores = {row: float(other @ vector) for row, other in enumerate(vectors) if row != at}
        yield {*sorted(scores, key=lambda row: -scores[row])[:NEIGHBOURS]}


def test_agreement_counts_neighbours_that_both_have() -> None:
    random = np.random.default_rng(0)
    some = random.standard_normal((60, 16)).astype(np.float32)
    others = some + 0.3 * random.standard_normal(some.shape).astype(np.float32)
    shared = [len(a & b) / NEIGHBOURS for a, b in zip(neighbours(some), neighbours(others), strict=True)]
    assert agreement(some, others) == pytest.approx(np.mean(shared)) and 0.3 < np.mean(shared) < 0.95
    assert agreement(some, some[:40]) == 1.0  # of the texts that both have
    assert agreement(some, others[:NEIGHBOURS]) is None


@units
@pytest.mark.parametrize("configured", ["float32", "bfloat16"])
def test_what_this_processor_can_do_is_timed(tiny: Path, configured: str) -> None:
    texts = [f"text {number} of {number % 7} things" for number in range(64)]
    encoder = Encoder(model=str(tiny), pooling="mean", precision=configured, passage_max_length=32)
    found = measured(encoder, str(tiny), texts, DEFAULT)
    assert [(one.settings["precision"], one.settings.get("batch_tokens"), one.configured) for one in found] == [
        (configured, None, True),
        ("float32", BATCH_TOKENS, False),
        ("bfloat16", BATCH_TOKENS, False),
    ]
    assert all(one.speed > 0 and one.texts == 64 and one.dimension == 32 for one in found)
    for one in found:
        least, most = (1.0, 1.0) if one.settings["precision"] == "float32" else (0.5, 0.999)
        assert least <= (one.agreement or 0) <= most


def test_other_ways_are_timed_for_a_run_that_encodes_for_long(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "flags", frozenset)
    encoder = Encoder(model=str(tiny), pooling="mean")
    few, many = (measured(encoder, str(tiny), ["one text", "another"], DEFAULT, count=count) for count in (2, 10**9))
    assert [one.configured for one in few] == [True] and [one.configured for one in many] == [True, False]


def test_tokens_of_a_batch_that_the_config_says_are_kept(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "flags", frozenset)
    encoder = Encoder(model=str(tiny), pooling="mean", batch_tokens=600)
    found = measured(encoder, str(tiny), ["one text", "another"], DEFAULT)
    assert [one.settings for one in found] == [{"runtime": "torch", "precision": "float32", "batch_tokens": 600}]


def test_what_it_cannot_do_is_not(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "flags", frozenset)
    found = measured(
        Encoder(model=str(tiny), pooling="mean", passage_max_length=5000), str(tiny), ["one text", "another"], DEFAULT
    )
    own = {"runtime": "torch", "precision": "float32"}
    assert [one.settings for one in found] == [own, own | {"batch_tokens": 5000}]
    assert found[0].agreement is None


@pytest.mark.slow
@pytest.mark.skipif(not (is_installed("onnx") and is_installed("openvino")), reason="their extras are not installed")
def test_runtimes_that_are_installed_are_timed(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(processor, "flags", frozenset)
    texts = [f"text {number} of {number % 7} things" for number in range(64)]
    encoder = Encoder(model=str(tiny), backend="sentence-transformers", runtime="openvino", passage_max_length=32)
    found = measured(encoder, str(tiny), texts, DEFAULT)
    ways = {("openvino", "float32"), ("torch", "float32"), ("onnx", "float32"), ("onnx", "int8"), ("openvino", "int8")}
    assert tuple(found[0].settings.values()) == ("openvino", "float32")
    assert {tuple(one.settings.values()) for one in found[1:]} == {(*way, BATCH_TOKENS) for way in ways}
    assert [one.configured for one in found] == [True, *[False] * 5]
    assert all((one.agreement or 0) > 0.5 for one in found)


def test_ways_that_end_their_process_are_said_and_the_others_are_timed(tiny: Path, tmp_path: Path) -> None:
    """A folder of weights is a real death: the model ends its process while it is loaded with its own code, killed the
    first time."""
    deadly, note = tmp_path / "deadly", tmp_path / "note"
    shutil.copytree(tiny, deadly)
    (deadly / "modeling.py").write_text(
        f"""
import os, pathlib, signal, sys
note = pathlib.Path({str(note)!r})
if note.exists():
    sys.exit("a reason")
note.write_text(os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"])
os.kill(os.getpid(), signal.SIGKILL)
"""
    )
    config = json.loads((deadly / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling.Model", "AutoConfig": "modeling.Config"}
    (deadly / "config.json").write_text(json.dumps(config))
    texts = [f"text {number}" for number in range(8)]
    good = Encoder(model=str(deadly), pooling="mean")
    bad = good.model_copy(update={"trust_remote_code": True})
    first, killed, ended, last = time_models([good, bad, bad, good], str(deadly), texts, DEFAULT)
    assert isinstance(first, Timed) and isinstance(last, Timed) and len(last.vectors) == 8
    assert isinstance(killed, TaskFailedError) and "exited with -9" in str(killed)
    assert isinstance(ended, TaskFailedError) and "exited with 1: " in str(ended) and "a reason" in str(ended)
    # Read once a process, so that of float32, which gains nothing by it, would be that of bfloat16, which does.
    assert note.read_text() == "16"


def test_what_the_configured_way_is_refused_for_ends_the_others(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="truncate_dim") as refused:
        measured(Encoder(model=str(tiny), pooling="mean", truncate_dim=99), str(tiny), ["one text"], DEFAULT)
    assert refused.traceback  # the frames are there still
    assert not [child for child in psutil.Process().children() if "negpipe.encoders.timing" in child.cmdline()]


@pytest.mark.parametrize("configured", ["torch", "openvino"])
def test_settings_to_paste_name_the_runtime_where_it_would_be_another(configured: str) -> None:
    ways = [
        Encoding(Variant({"runtime": runtime, "precision": "float32"}, runtime == configured, 1.0, 1.0, 64, 8), 1.0)
        for runtime in (configured, "torch", "onnx")
    ]
    column = [*_encoding(Plan(1.0, (), (), tuple(ways), None, 0)).columns[0].cells]
    named = [str(cell).startswith("runtime: ") for cell in column]
    assert named == ([False, False, True] if configured == "torch" else [True] * 3)


def way(seconds: float, ndcg: float | None, agreement: float = 0.99, configured: bool = False) -> Encoding:
    settings = {"runtime": "torch", "precision": "float32" if configured else f"of {seconds}"}
    return Encoding(Variant(settings, configured, 1.0, agreement, 64, 8, (9, 64), 0.88, ndcg), seconds)


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([way(40, 0.645), way(50, 0.70)], 40),
        ([way(40, 0.60), way(50, 0.6445)], 50),  # the fastest ranks worse
        ([way(95, 0.645)], None),  # less than a tenth is not worth other vectors
        ([way(40, None, 0.90), way(60, None, 0.97)], 60),  # without anchors, the nearest documents decide
        ([], None),
    ],
)
def test_the_fastest_way_that_ranks_as_well_is_recommended(others: list[Encoding], expected: float | None) -> None:
    usual = way(100, None if others and others[0].variant.ndcg is None else 0.646, configured=True)
    best = recommended([usual, *others])
    assert (best and best.seconds) == expected
    encoder = {"backend": "sentence-transformers", "model": "model"}
    config = load_config({"run_dir": "run", "data": {"path": "data"}, "encoder": encoder})
    advice = _advice(Plan(1.0, (), (), (usual, *others), best, 0), config)
    if best is None:
        assert advice == "Keep the encoder's settings: no other way saves a tenth of the time and ranks as well."
    else:
        assert f"encoder: {{runtime: torch, precision: of {expected}}}: {expected} s instead of 2 min" in advice
        assert "88% of the negatives" in advice


def test_negatives_and_ranking_are_compared_on_what_all_ways_encoded(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "flags", frozenset)
    texts = [f"text {number} of {number % 7} things" for number in range(64)]
    anchors = [("the first", 3), ("the second", 20), ("one whose positives are not encoded", 65)]
    asked: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    outcomes = iter([Outcome(frozenset({(0, 1), (0, 2), (1, 5), (1, 6)}), 0.5), Outcome(frozenset({(0, 2)}), 0.25)])

    def outcome(vectors: np.ndarray, of_anchors: np.ndarray) -> Outcome:
        asked.append((vectors.shape, of_anchors.shape))
        return next(outcomes)

    encoder = Encoder(model=str(tiny), pooling="mean", query_instruction="query: ", passage_max_length=32)
    own, other = measured(encoder, str(tiny), texts, DEFAULT, anchors, outcome)
    assert asked == [((64, 32), (2, 32))] * 2 and own.compared == other.compared == (2, 64)
    assert (own.negatives, own.ndcg) == (1.0, 0.5) and (other.negatives, other.ndcg) == (0.25, 0.25)


@pytest.mark.slow
def test_a_way_that_hangs_is_left_out(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = Path(shutil.copytree(tiny, tmp_path / "hanging"))
    (hanging / "modeling.py").write_text("import time\ntime.sleep(600)\n")
    config = json.loads((hanging / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling.Model", "AutoConfig": "modeling.Config"}
    (hanging / "config.json").write_text(json.dumps(config))
    hangs = Encoder(model=str(hanging), pooling="mean", trust_remote_code=True)
    good = hangs.model_copy(update={"trust_remote_code": False})
    with closing(time_models([hangs, good], str(hanging), ["one text", "another"], DEFAULT)) as answers:
        with monkeypatch.context() as patch:
            patch.setattr(timing, "_LIMIT", 5.0)
            hung = next(answers)
        assert isinstance(hung, TaskFailedError) and "no answer in 5 s" in str(hung)
        assert isinstance(next(answers), Timed)


def test_plan_compares_and_divides_nothing_that_takes_a_minute(tiny: Path, tmp_path: Path) -> None:
    config = small.build(tmp_path)
    config.write_text(json.dumps(small.settings(tmp_path) | {"encoder": {"model": str(tiny), "pooling": "mean"}}))
    assert small.run("ingest", config).code == 0
    shown = small.run("plan", config).out
    assert "measured on" in shown and "precision" not in shown and "On several machines" not in shown
    (own,) = [line for line in shown.splitlines() if "as configured" in line]
    assert own.startswith("flat")


@units
def test_plan_shows_what_was_timed(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small.build(tmp_path)
    config.write_text(json.dumps(small.settings(tmp_path) | {"encoder": {"model": str(tiny), "pooling": "mean"}}))
    assert small.run("ingest", config).code == 0
    monkeypatch.setattr(variants, "WORTH_TIMING", 0)
    shown = small.run("plan", config).out
    assert re.search(r"precision: float32 +[\d,]+ .* 100\.0% +100\.0% +[01]\.\d{3} +as configured", shown)
    assert re.search(r"from mining \d+ anchors among 40 documents", " ".join(shown.split()))
    assert re.search(r"precision: bfloat16 +[\d,]+ .*\d% +[01]\.\d{3} +other vectors", shown)
    assert "Recommended: encoder: {" in shown or "Keep the encoder's settings" in shown
    assert max(map(len, shown[shown.index("encoder ") : shown.index("index.kind")].splitlines())) <= 80
    assert "precision" not in small.run("plan", config, "--no-probe").out
    # Once there are parts, they tell the speed, and another precision would throw them away.
    assert small.run("encode", config).code == 0
    assert "precision" not in small.run("plan", config).out
