"""Every mistake in a config is named by its place, with what to write instead."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_source as small
import yaml

from negpipe.config import kept, machine
from negpipe.config.file import find_config, load_config, schema
from negpipe.errors import ConfigError

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
LEAST: dict[str, Any] = {"run_dir": "run", "data": {"path": "set"}, "encoder": {"model": "some/model"}}


def problem(overrides: list[str], tree: dict[str, Any] = LEAST) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(copy.deepcopy(tree), overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sed=1", "sed: unknown key. Did you mean 'seed'?"),
        ("encoder.modell=x", "encoder.modell: unknown key. Did you mean 'model'?"),
        ("data.colums.corpus_id=x", "data.colums: unknown key. Did you mean 'columns'?"),
        ("data.columns.corpusid=x", "data.columns.corpusid: unknown key. Did you mean 'corpus_id'?"),
        # Tables may be absent, or written as a plain path: their keys are known all the same.
        ("data.corpus.pth=x", "data.corpus.pth: unknown key. Did you mean 'path'?"),
        ("data.qrels.splits=x", "data.qrels.splits: unknown key. Did you mean 'split'?"),
        # A key in the wrong place.
        ("num_negatives=3", "num_negatives: unknown key. Did you mean 'mining.num_negatives'?"),
        ("data.range_min=3", "data.range_min: unknown key. Did you mean 'mining.range_min'?"),
        (
            "index.zzz=3",
            "index.zzz: unknown key. Known here: kind, min_recall, nprobe, recall_anchors, shard_size, trained.",
        ),
    ],
)
def test_unknown_keys_get_the_nearest_known_name(override: str, message: str) -> None:
    assert message in problem([override])


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("seed=-1", ["seed: ", "greater than or equal to 0", "(got -1)"]),
        ("seed=1.5", ["seed: must be a valid integer (got 1.5)"]),
        ("seed=many", ["seed: must be a valid integer (got 'many')"]),
        ("mining.relative_margin=5%", ["mining.relative_margin: ", "(got '5%')", "write 0.05"]),
        ("mining.relative_margin=5", ["mining.relative_margin: ", "(got 5)", "write 0.05"]),
        ("mining.rank_over=both", ["mining.rank_over: ", "'raw' or 'survivors'", "(got 'both')"]),
        ("mining.exclude=[positive_id, nope]", ["mining.exclude.1: ", "'anchor_text'", "(got 'nope')"]),
        ("mining.range_min=192", ["mining: mining.range_max (192) must be above mining.range_min (192)"]),
        ("mining.range_max=2", ["mining: the window of 2 ranks", "mining.num_negatives (3)", "lower num_negatives"]),
        ("search.depth=100", ["search.depth (100) is below mining.range_max (192)", "set it to null"]),
        ("encoder.model=null", ["encoder: backend 'flagembedding' needs encoder.model"]),
        ("encoder.backend=precomputed", ["encoder: backend 'precomputed' needs encoder.corpus_vectors and"]),
        ("encoder.query_max_length=1", ["encoder.query_max_length: ", "(got 1)"]),
        ("data.path=null", ["data: the source is missing: set data.path"]),
        ("data.format=columns", ["data: format 'columns' requires data.corpus"]),
        ("data.format=bier", ["data.format: ", "'beir'", "(got 'bier')"]),
        ("data.corpus=5", ["data.corpus: expected a section with keys from path, split, subset, table (got 5)"]),
        ("mining=5", ["mining: expected a section with keys from ", "num_negatives", "(got 5)"]),
        ("executor.workers=0", ["executor.workers: ", "(got 0)"]),
        ("resources.memory_budget=1MB", ["resources.memory_budget: 1,000,000 bytes are too few: set 64MiB or more"]),
        ("resources.memory_budget=3 parsecs", ["resources.memory_budget: '3 parsecs'", "write for example 2GiB"]),
        ("resources.memory_budget=infGiB", ["resources.memory_budget: 'infGiB'", "write for example 2GiB"]),
        ("resources.memory_budget=GiB", ["resources.memory_budget: 'GiB'", "write for example 2GiB"]),
        ("run_dir=null", ["run_dir: "]),
    ],
)
def test_a_bad_value_is_named_by_its_path(override: str, fragments: list[str]) -> None:
    message = problem([override])
    assert [fragment for fragment in fragments if fragment not in message] == [], message


def test_the_file_is_not_blamed_for_what_the_command_line_says() -> None:
    assert problem(["mining.rank_over=both"]).startswith("config with overrides: mining.rank_over: ")
    wrong = {**LEAST, "seed": "none"}
    with pytest.raises(ConfigError, match=r"^config: seed: "):
        load_config(wrong, ["mining.num_negatives=2"])


def test_all_problems_are_listed_at_once_and_the_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("data: {path: x}\nseed: -1\nminig: {}\nencoder: {model: m, batch_size: 0}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert lines[0].startswith(f"{path}: run_dir: this key is required")
    for place in ("seed: ", "encoder.batch_size: ", "minig: unknown key. Did you mean 'mining'?"):
        assert any(line.startswith(f"{path}: {place}") for line in lines)


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ("a: [1", "not valid YAML"),
        ("seed: 1\nmining: {}\n---\nseed: 2\n", r"line 3: a second document begins \(---\): keep one"),
        ("mining:\n  range_min: 1\n\trange_max: 5\n", "line 3: indent with spaces, not a tab"),
        ("", "must be a mapping"),
        ("- 1\n", "must be a mapping"),
        ("\udcff", "not valid"),
        ("seed: 1\nmining: {}\nseed: 2\n", "'seed' is set twice, in lines 1 and 3: merge them"),
    ],
)
def test_what_is_no_config_at_all(content: str, fragment: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=fragment) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("seed=7", 7),
        ("data.min_grade=0.5", 0.5),
        ("mining.relative_margin=null", None),
        ("mining.relative_margin=", None),
        ("encoder.normalize=false", False),
        ("data.revision='1'", "1"),
        ("mining.exclude=[anchor_text]", ("anchor_text",)),
        ("encoder.query_instruction='a=b: c'", "a=b: c"),
        ("data.path=http://x/y=z", "http://x/y=z"),
    ],
)
def test_overrides_are_parsed_as_yaml(override: str, value: Any) -> None:
    found: Any = load_config(LEAST, [override])
    for step in override.partition("=")[0].split("."):
        found = getattr(found, step)
    assert found == value
    assert type(found) is type(value)


def test_the_last_override_wins_and_the_mapping_given_stays_as_it_was() -> None:
    given = copy.deepcopy(LEAST)
    assert load_config(given, ["seed=1", "seed=2", "data.corpus.path=x.jsonl"]).seed == 2
    assert given == LEAST


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.text={title} {text}", "{title} {text}"),
        ("data.text={text}", "{text}"),
        ("data.text='{text}'", "{text}"),
        ("data.split=2024", "2024"),
        ("encoder.model=1e5", "1e5"),
        ("encoder.query_instruction=Query: ", "Query: "),
        ("encoder.query_instruction=[x", "[x"),
        ("data.columns.corpus_id=null", None),
        ("data.path=[a, b]", ("a", "b")),
    ],
)
def test_a_text_is_taken_as_it_stands(override: str, value: Any) -> None:
    config: Any = load_config(LEAST, [override])
    for name in override.partition("=")[0].split("."):
        config = getattr(config, name)
    assert config == value


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("seed", "expected key=value"),
        ("=3", "expected key=value"),
        ("seed.deep=3", "'seed' is a value"),
        ("seed=[1", "not valid YAML"),
        ("data.path.more=1", "'path' is a value"),
    ],
)
def test_a_bad_override_is_quoted(override: str, fragment: str) -> None:
    message = problem([override], LEAST | {"seed": 1})
    assert f"--set {override}: " in message
    assert fragment in message


@pytest.mark.parametrize(
    ("written", "count"),
    [
        ("2GiB", 2**31),
        ("2 GiB", 2**31),
        ("1.5gib", 3 * 2**29),
        ("800MB", 8 * 10**8),
        ("800mib", 800 * 2**20),
        ("1TiB", 2**40),
        ("100000KB", 10**8),
        ("'67108864'", 2**26),
        ("67108864", 2**26),
    ],
)
def test_memory_in_units(written: str, count: int) -> None:
    assert load_config(LEAST, [f"resources.memory_budget={written}"]).resources.memory_budget == count


def test_a_share_of_the_machine() -> None:
    assert load_config(LEAST, ["resources.memory_budget=25%"]).resources.memory_budget == machine.memory() // 4
    for wrong in ("0%", "130%", "some%"):
        with pytest.raises(ConfigError, match="is not a share of this machine's memory"):
            load_config(LEAST, [f"resources.memory_budget={wrong}"])


def test_a_kind_of_index_in_other_letters() -> None:
    for written, kind in (("Flat", "flat"), ("AUTO", "auto"), ("Stream", "stream"), ("IVF16,Flat", "IVF16,Flat")):
        assert load_config(LEAST, [f"index.kind={written}"]).index.kind == kind


def test_a_plain_path_stands_for_a_table() -> None:
    data = load_config(LEAST, ["data.corpus=pool.jsonl"]).data
    assert data.corpus is not None
    assert (data.corpus.path, data.corpus.split) == ("pool.jsonl", "train")


def test_depth_is_a_multiple_of_64_with_room_for_positives() -> None:
    for range_max, depth in ((192, 256), (193, 320), (10, 128), (210, 320)):
        assert load_config(LEAST, [f"mining.range_max={range_max}"]).depth == depth
    assert load_config(LEAST, ["search.depth=200"]).depth == 200


def test_configs_are_found_by_path_or_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    quick = Path("configs/quickstart.yaml")
    assert find_config("quickstart") == find_config("quickstart.yaml") == find_config(str(quick)) == quick
    with pytest.raises(ConfigError, match=r"no config 'quikstart'.*Did you mean configs/quickstart\.yaml\?"):
        find_config("quikstart")
    with pytest.raises(ConfigError, match=r"Configs here: configs/ablate\.yaml, .*quickstart\.yaml"):
        find_config("nowhere")


def test_a_missing_config_names_a_similar_one_or_how_to_write_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no config 'shopp\.yaml'.*`negpipe init` writes a first config"):
        find_config("shopp.yaml")
    (tmp_path / "shop.yaml").touch()
    kept.path_in(tmp_path / "runs/shop").parent.mkdir(parents=True)
    kept.path_in(tmp_path / "runs/shop").touch()
    for typed, meant in (("shopp.yaml", "shop.yaml"), ("Shop.yml", "shop.yaml"), ("runs/shp", "runs/shop")):
        with pytest.raises(ConfigError, match=rf"Did you mean {meant}\?"):
            find_config(typed)


def test_a_run_in_a_bucket_needs_its_config() -> None:
    run = "s3://my-bucket/runs/first"
    with pytest.raises(ConfigError, match=rf"stores no config: .* `negpipe status my.yaml --set run_dir={run}`"):
        load_config(run)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configs_are_valid_and_use_only_what_the_schema_knows(path: Path) -> None:
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    config = load_config(path)
    tree.get("ablate", {}).pop("arms", None)  # names and keys of the user's own
    known = set(_schema_paths(schema(), schema()))
    assert set(_tree_paths(tree)) <= known
    # What is written is what is read.
    dumped = config.model_dump(mode="json")
    for place in _tree_paths(tree):
        written, read = _at(tree, place), _at(dumped, place)
        assert isinstance(written, dict) or written == read, place


def test_the_schema_says_what_every_key_is_for_and_refuses_unknown_ones() -> None:
    whole = schema()
    objects = [whole, *whole["$defs"].values()]
    assert all(entry["additionalProperties"] is False for entry in objects)
    assert {"run_dir", "data", "encoder"} == set(whole["required"])
    undescribed = [
        f"{entry['title']}.{name}"
        for entry in objects
        for name, field in entry["properties"].items()
        if not (field.get("description") or "$ref" in field or "anyOf" in field)
    ]
    assert undescribed == []


def _schema_paths(node: dict[str, Any], whole: dict[str, Any], before: str = "") -> Iterator[str]:
    for name, field in node.get("properties", {}).items():
        yield before + name
        for option in [field, *field.get("anyOf", [])]:
            if "$ref" in option:
                yield from _schema_paths(whole["$defs"][option["$ref"].rpartition("/")[2]], whole, f"{before}{name}.")


def _tree_paths(tree: dict[str, Any], before: str = "") -> Iterator[str]:
    for name, value in tree.items():
        yield before + name
        if isinstance(value, dict):
            yield from _tree_paths(value, f"{before}{name}.")


def _at(tree: Any, place: str) -> Any:
    for step in place.split("."):
        tree = tree[step]
    return tree


def test_the_commands_about_configs(tmp_path: Path) -> None:
    path = small.build(tmp_path)
    checked = small.run("config", "check", path)
    assert (checked.code, checked.out) == (0, f"{path} is valid.\n")
    shown = small.run("config", "show", path, "--set", "seed=7")
    assert shown.code == 0
    assert load_config(yaml.safe_load(shown.out)) == load_config(path, ["seed=7"])
    assert json.loads(small.run("config", "schema").out) == schema()
    wrong = small.run("config", "check", path, "--set", "sed=7")
    assert wrong.code == 2
    assert wrong.err == f"negpipe: {path} with overrides: sed: unknown key. Did you mean 'seed'?\n"


@pytest.mark.parametrize("form", ["x", "{}", "{} {} {}", "{0}", "{instruction}{text}", "{"])
def test_instruction_formats_hold_both_places(form: str) -> None:
    settings = {"run_dir": "x", "data": {"path": "d"}, "encoder": {"model": "m", "query_instruction_format": form}}
    with pytest.raises(ConfigError, match="query_instruction_format must contain two"):
        load_config(settings)


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_numbers_are_finite(value: str) -> None:
    settings = {"run_dir": "x", "data": {"path": "d"}, "encoder": {"model": "m"}}
    with pytest.raises(ConfigError, match=r"mining\.relative_margin"):
        load_config(settings, [f"mining.relative_margin={value}"])
