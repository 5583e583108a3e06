"""What the pages of the documentation name is there: keys, commands, options, files, and code that compiles."""

from __future__ import annotations

import gzip
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import small_source as small
import yaml
from doc_pages import DOCS, ROOT, Block, blocks, pages

import negpipe
from negpipe import errors
from negpipe.config.file import load_config
from negpipe.config.schema import Config

sys.path.insert(0, str(ROOT / "scripts"))
import benchmarks_page
import command_page
import config_table
import guarantees_page

COMMANDS = dict(command_page.commands())
WHOLE: dict[str, Any] = {"run_dir": "runs/x", "data": {"path": "my/folder"}, "encoder": {"model": "m"}}


def test_every_key_of_the_config_is_explained() -> None:
    for section, table in config_table.tables().items():
        file = config_table.file_of(section)
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        assert text == config_table.page(section, table), "run: python scripts/config_table.py"
        assert f"reference/config/{file.name}" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), "add it to nav"


def test_every_command_is_explained() -> None:
    written = command_page.PAGE.read_text(encoding="utf-8")
    assert written == command_page.page(), "run: python scripts/command_page.py"


def test_examples_of_the_stages_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.build(tmp_path).rename(tmp_path / "quickstart.yaml")
    monkeypatch.chdir(tmp_path)
    for stage in ("ingest", "encode", "index", "slices", "search", "triplets"):
        example = (COMMANDS[stage].help or "").rpartition("Example: negpipe ")[2]
        outcome = small.run(*shlex.split(example))
        assert outcome.code == 0, outcome.err


def configs() -> Iterator[Block]:
    for block in blocks("yaml"):
        tree = yaml.safe_load(block.text)
        if isinstance(tree, dict) and tree.keys() <= Config.model_fields.keys():
            yield block


@pytest.mark.parametrize("block", [*configs()], ids=str)
def test_configs_are_accepted(block: Block) -> None:
    tree = yaml.safe_load(block.text)
    data = {**WHOLE["data"], **tree.get("data", {})}
    encoder = tree.get("encoder", {})
    load_config(
        {**WHOLE, **tree, "data": data, "encoder": encoder if "model" in encoder else {**WHOLE["encoder"], **encoder}}
    )


def test_configs_in_sentences_are_accepted() -> None:
    """`data: {format: nemo, path: FOLDER}` and the like, in code."""
    sections = "|".join(name for name in Config.model_fields if name not in ("run_dir", "store", "seed"))
    found = [
        (page, text)
        for page in pages()
        if page != DOCS / "decisions.md"
        for text in re.findall(rf"`((?:{sections}): \{{[^`]+\}})`", page.read_text(encoding="utf-8"))
    ]
    assert len(found) > 10
    for page, text in found:
        (section, settings), *_ = yaml.safe_load(text).items()
        try:
            load_config({**WHOLE, section: {**WHOLE.get(section, {}), **settings}})
        except errors.ConfigError as error:
            pytest.fail(f"{page}: {text}: {error}")


def test_yaml_is_a_config_or_known_to_be_another_thing() -> None:
    others = {block.text.split("\n")[0] for block in blocks("yaml")} - {
        block.text.split("\n")[0] for block in configs()
    }
    assert others <= {"apiVersion: batch/v1", "cores: 32"}, "a key that there is not?"


def lines() -> Iterator[tuple[Block, str]]:
    """The commands of negpipe in blocks of shell, as typed."""
    for block in blocks("bash", "sh", "console", ""):
        for line in block.text.replace("\\\n", " ").splitlines():
            command = re.sub(r"^\s*(\$ )?(\.venv/bin/)?", "", line)
            if command.startswith("negpipe "):
                yield block, command


@pytest.mark.parametrize(("block", "line"), [*lines()], ids=str)
def test_commands_and_their_options_exist(block: Block, line: str) -> None:
    words = [word.strip("[]") for word in shlex.split(line, comments=True)]
    name = " ".join(words[1:3]) if words[1] == "config" else words[1]
    if name == "--help":
        return
    for verb in name.split("|"):
        assert verb in COMMANDS, f"{block}: there is no command {verb}"
        known = {
            option for parameter in COMMANDS[verb].params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        used = {word.split("=")[0] for word in words[2:] if word.startswith("--")}
        assert used <= known | {"--help"}, f"{block}: {line}"


def test_commands_in_sentences_exist() -> None:
    for page in pages():
        text = page.read_text(encoding="utf-8")
        for verbs in re.findall(r"`negpipe ([a-z|]+)[ `]", text):
            for verb in verbs.split("|"):
                assert verb == "config" or verb in COMMANDS, f"{page}: negpipe {verb}"


@pytest.mark.parametrize("block", [*blocks("python")], ids=str)
def test_python_compiles(block: Block) -> None:
    session = block.text.startswith(">>>")  # tests/run/test_api.py runs those
    if 'title="' not in block.info and not session:  # a piece of a file, see below
        compile(block.text, str(block), "exec")


RUN_ELSEWHERE = {
    "articles.jsonl.gz": "below, beside the files that it reads",
    "s3://my-bucket": "engine/test_in_a_bucket.py, in a bucket",
}


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that need no more than a config, a run or an export, in a folder with those that pages name."""
    monkeypatch.chdir(tmp_path)
    small.build(tmp_path).rename("my.yaml")
    assert small.run("mine", "my.yaml").code == 0
    exported = small.run("export", "my.yaml", "--to", "distillation", "--out", "OUT")
    assert exported.code == 0, exported.err
    untested = [block for block in blocks("python") if block.page.parent.name != "tutorials"]  # test_tutorials.py does
    texts = {block.text for block in untested if 'title="' not in block.info and ">>>" not in block.text}
    elsewhere = {text for text in texts for sign in RUN_ELSEWHERE if sign in text}
    assert len(elsewhere) == len(RUN_ELSEWHERE) and len(texts - elsewhere) > 4
    for name in {name for text in texts for name in re.findall(r"\bruns/\w+", text)} - {"runs/first"}:
        shutil.copytree("run", name, symlinks=True)
    for text in sorted(texts - elsewhere):
        exec(compile(text, text, "exec"), {})


def test_keys_in_sentences_exist() -> None:
    """`mining.range_min` and the like, in code, anywhere."""
    known = {key for key, *_ in config_table.rows(Config)}
    known |= {".".join(key.split(".")[:n]) for key in known for n in (1, 2)} | {
        "data.extra.corpus",
        "data.extra.queries",
    }
    sections = "|".join(name for name in Config.model_fields if name not in ("run_dir", "store", "seed"))
    for page in pages():
        if page == DOCS / "decisions.md":  # what was, is not changed
            continue
        for key in re.findall(rf"`((?:{sections})(?:\.[a-z_]+)+)[`:= ]", page.read_text(encoding="utf-8")):
            assert key in known or key.rsplit(".", 1)[1] in ("py", "md", "yaml", "parquet", "json", "jsonl"), (
                f"{page}: {key}"
            )


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert len(text.encode()) <= 8192
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_glossary_is_short_and_has_one_word_per_thing() -> None:
    page = (ROOT / "docs/reference/glossary.md").read_text(encoding="utf-8")
    words = re.findall(r"^\| (.+?) \| .+ \|$", page, re.MULTILINE)[1:]
    assert 20 <= len(words) <= 30
    assert len({*words}) == len(words)
    assert not [word for word in words if "," in word]


def test_every_guarantee_is_listed_with_its_tests() -> None:
    written = guarantees_page.PAGE.read_text(encoding="utf-8")
    assert written == guarantees_page.page(), "run: python scripts/guarantees_page.py"
    assert len(guarantees_page.guarantees()) >= 60


def test_every_result_of_a_benchmark_is_shown() -> None:
    written = benchmarks_page.PAGE.read_text(encoding="utf-8")
    assert written == benchmarks_page.page(), "run: python scripts/benchmarks_page.py"


@pytest.mark.parametrize("left", [{"date": "not noted"}, {"machine": ""}, {"versions": {}}, {"command": ""}], ids=str)
def test_a_result_says_when_where_and_how_it_was_measured(
    left: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = benchmarks_page.results()[0]
    (tmp_path / "result.json").write_text(json.dumps(good | left), encoding="utf-8")
    monkeypatch.setattr(benchmarks_page, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match=f"{next(iter(left))}: not noted"):
        benchmarks_page.results()


def test_code_that_is_quoted_stands_in_its_file() -> None:
    for block in blocks("python"):
        if title := re.search(r'title="(negpipe/[^"]+)"', block.info):
            source = (ROOT / title[1]).read_text(encoding="utf-8")
            assert unindented(block.text) in unindented(source), f"{block}: {title[1]}"


def unindented(code: str) -> str:
    return "\n".join(line.strip() for line in code.strip().splitlines())


def test_every_code_of_an_error_is_explained() -> None:
    text = (DOCS / "reference/exit-codes.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| (`[^|]+`) \| (\d) \|", text, re.MULTILINE)
    codes = {code: int(number) for names, number in listed for code in re.findall(r"`([a-z-]+)`", names)}
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.NegpipeError)}
    assert codes == {"usage": 2, "unexpected": 1} | {kind.code: kind.exit_code for kind in kinds}


def test_the_columns_of_a_run_are_explained(finished: Path) -> None:
    text = (DOCS / "reference/run-directory.md").read_text(encoding="utf-8")
    sections = {part.split("\n")[0]: part for part in text.split("\n## ")[1:]}
    folders = {"Rows": "triplets", "Ledger": "ledger", "Candidates": "search", "Id map": "index"}
    for title, folder in folders.items():
        names = set(re.findall(r"`([a-z_]+)`", sections[title]))
        columns = pq.read_schema(next((finished / "run" / folder).glob("*.parquet"))).names
        assert {name for name in columns if not name.startswith("dropped_")} <= names, title


def test_queries_of_a_run_are_answered(tmp_path: Path) -> None:
    """From its current output alone: there are parts of an earlier source and of other settings, too."""
    import duckdb

    config = small.build(tmp_path, small.documents(37))
    assert small.run("mine", config).code == 0
    small.build(tmp_path)
    for range_max in ("20", "30"):
        outcome = small.run("mine", config, "--set", f"mining.range_max={range_max}", "--set", "mining.num_negatives=5")
        assert outcome.code == 0, outcome.err
    run = negpipe.Run(tmp_path / "run")
    answers = []
    for block in blocks("sql"):
        answer = duckdb.sql(re.sub(r"'runs/\w+/", f"'{tmp_path / 'run'}/", block.text))
        assert answer is not None
        answers.append(answer.fetchall())
    files, short, candidates = answers
    assert len(files) > 4 and sum(count for _, count in short) == small.QUERIES
    best = [tuple(row.values()) for row in run.candidates().to_pylist() if row["rank"] < 3]
    assert sorted(candidates) == sorted(best)


def test_nested_fields_and_several_ids_in_a_cell_are_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (DOCS / "how-to/data.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(import duckdb\n.*?)```", page, re.DOTALL)
    with gzip.open(tmp_path / "articles.jsonl.gz", "wt") as file:
        for n in range(9):
            row = {"sku": f"D{n}", "meta": {"lang": "en"}, "content": {"headline": f"head {n}", "body": f"body {n}"}}
            file.write(json.dumps(row) + "\n")
    asked = "".join(f"T{n},question {n},D{n}|D{n + 1}\n" for n in range(4))
    (tmp_path / "tickets.csv").write_text(f"ticket,customer_text,solved_by\n{asked}")
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "-c", program], check=True)
    found = json.loads(small.run("inspect", "source", "--json").out)
    assert found["data"] == {"format": "beir", "path": "source"} and not found["odd"]
    assert found["positives"] == {"2": 4} and found["documents"]["count"] == 9
