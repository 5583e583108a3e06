"""report.html holds what the run left, asks nobody for anything, and its verdicts come back as exclusions."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import reviewed_run
import small_source as small
from small_source import run as negpipe

from negpipe.config.file import load_config
from negpipe.review.report import words, write
from negpipe.store.lock import run_lock

VOID = {"meta", "link", "input", "br", "img", "path", "use"}


@dataclass
class Page(HTMLParser):
    """Elements with their attributes, scripts, and the text people see."""

    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    scripts: list[str] = field(default_factory=list)
    text: str = ""
    _inside: str = ""

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(anchor, document) of every negative shown, in order."""
        boxes = [box for box in self.all("input") if "data-anchor" in box]
        return [(json.loads(str(box["data-anchor"])), json.loads(str(box["data-document"]))) for box in boxes]


def page_of(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for path in (folder / "run/triplets").glob("*.parquet") for row in pq.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def mined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and its report as `mine` left it."""
    folder = tmp_path_factory.mktemp("reported")
    done = negpipe("mine", reviewed_run.build(folder))
    assert done.code == 0, done.err
    assert "report: " in done.err
    return folder


@pytest.fixture
def folder(mined: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(mined, tmp_path / "copy", symlinks=True)
    config = json.loads((tmp_path / "copy/config.yaml").read_text("utf-8"))
    config["run_dir"] = str(tmp_path / "copy/run")
    (tmp_path / "copy/config.yaml").write_text(json.dumps(config), "utf-8")
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def page(mined: Path) -> Page:
    return page_of(mined / "run/report.html")


# --- the file -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_asks_nobody_for_anything_and_allows_one_script(page: Page) -> None:
    links = [
        (tag, found[name]) for tag, found in page.elements for name in ("src", "href", "xlink:href") if name in found
    ]
    assert {link for _, link in links if not str(link).startswith("#")} == {"data:,"}
    assert not [name for _, found in page.elements for name in found if name.startswith("on")]
    policy = next(found["content"] for found in page.all("meta") if found.get("http-equiv"))
    data, script = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; script-src 'sha256-{digest}';" in str(policy)
    assert json.loads(data) == []
    assert [found.get("type") for found in page.all("script")] == ["application/json", None]
    ids = [found["id"] for _, found in page.elements if "id" in found]
    assert len(ids) == len(set(ids))


def test_ids_and_texts_are_shown_as_they_are(page: Page, mined: Path) -> None:
    rows = {(row["anchor_id"], row["negative_id"]): row for row in rows_of(mined)}
    assert set(page.pairs) <= set(rows)
    harmful = [pair for pair in page.pairs if any(harm in name for harm in reviewed_run.HARM for name in pair)]
    assert len(harmful) > 10
    seen = re.sub(r"\s+", "", page.text)
    for pair in harmful:
        for text in (pair[1], rows[pair]["negative"]):
            assert re.sub(r"\s+", "", text) in seen


def test_it_says_what_ran(page: Page, mined: Path) -> None:
    books = {
        stage: json.loads((mined / f"run/.negpipe/{stage}/manifest.json").read_text("utf-8"))
        for stage in ("ingest", "encode", "index", "search", "triplets")
    }
    assert all(part["provenance"]["peak_memory"] > 10_000_000 for one in books.values() for part in one["parts"])
    for stated in (
        "90 documents",
        "160 texts",
        "70 anchors",
        f"{books['triplets']['stats']['rows']} rows",
        "1 (exact)",
    ):
        assert stated in page.text
    assert books["encode"]["inputs"]["encoder.corpus_vectors"][:16] in page.text
    assert len([found for tag, found in page.elements if tag == "svg"]) == 6
    for header in page.all("th"):
        assert header.get("scope") in ("row", "col")


# --- when it is made ----------------------------------------------------------------------------------


def test_mine_makes_it_when_something_was_mined(folder: Path) -> None:
    config, report = folder / "config.yaml", folder / "run/report.html"
    before = report.read_bytes()
    report.unlink()
    assert negpipe("mine", config).code == 0
    assert not report.exists(), "nothing was mined"
    changed = negpipe("mine", config, "--set", "mining.num_negatives=2", "--set", "output.report=false")
    assert "triplets: done" in changed.err and not report.exists()
    again = negpipe("mine", config, "--set", "mining.num_negatives=2")
    assert "triplets: up to date" in again.err and not report.exists(), "what it is for changes no row"
    assert negpipe("mine", config).code == 0
    assert page_of(report).pairs == page_of_bytes(before).pairs


def page_of_bytes(data: bytes) -> Page:
    page = Page()
    page.feed(data.decode())
    return page


def test_a_report_that_cannot_be_made_fails_no_mining(folder: Path) -> None:
    (folder / "run/report.html").unlink()
    (folder / "run/report.html").mkdir()
    done = negpipe("mine", folder / "config.yaml", "--set", "mining.num_negatives=2")
    assert done.code == 0
    assert "report: failed, the rows are complete" in done.err
    assert len(rows_of(folder)) == 2 * reviewed_run.ANCHORS


def test_the_same_run_gives_the_same_page(folder: Path, mined: Path, tmp_path: Path) -> None:
    out = tmp_path / "elsewhere/page.html"
    assert negpipe("mine", folder / "config.yaml").code == 0  # the copy keeps the config of its own place
    done = negpipe("report", folder / "config.yaml", "--out", out)
    assert (done.code, done.out.strip()) == (0, f"Written: {out}")
    first, second = (path.read_text("utf-8").replace(str(mined), "") for path in (mined / "run/report.html", out))
    assert first == second.replace(str(folder), "")


# --- what it needs ------------------------------------------------------------------------------------


def test_what_is_missing_is_named_with_the_command_to_run(tmp_path: Path) -> None:
    config = reviewed_run.build(tmp_path)
    done = negpipe("report", config)
    assert (done.code, done.out) == (3, "")
    assert f"Run `negpipe ingest {config}` first, or `negpipe mine {config}` to run all stages" in done.err
    assert not (tmp_path / "run").exists()
    for stage, following in (("ingest", "encode"), ("encode", "index"), ("index", "search"), ("search", "triplets")):
        assert negpipe(stage, config).code == 0
        done = negpipe("report", config)
        assert done.code == 3
        assert f"report needs the output of {following}" in done.err
        assert f"Run `negpipe {following} {config}` first" in done.err
    assert not (tmp_path / "run/report.html").exists()


def test_a_run_that_is_still_going_is_let_be(folder: Path) -> None:
    before = (folder / "run/report.html").read_bytes()
    with run_lock(folder / "run"):
        done = negpipe("report", folder / "config.yaml")
    assert done.code == 4
    assert "is in use by process" in done.err
    assert f"A report needs a finished run; `negpipe status {folder / 'config.yaml'}`" in done.err
    assert (folder / "run/report.html").read_bytes() == before


# --- what stands in it --------------------------------------------------------------------------------


def test_verdicts_come_back_as_exclusions(folder: Path, page: Page) -> None:
    config, verdicts = folder / "config.yaml", folder / "verdicts.jsonl"
    marked = [page.pairs[0], *[pair for pair in page.pairs if "script" in pair[1]], page.pairs[-1]]
    lines = [json.dumps({"anchor_id": anchor, "document_id": document}) + "\n" for anchor, document in marked]
    verdicts.write_text("".join(lines), "utf-8")
    done = negpipe("mine", config, "--set", f"mining.exclude_file={verdicts}")
    assert done.code == 0 and "search: up to date" in done.err and "triplets: done" in done.err
    left = {(row["anchor_id"], row["negative_id"]) for row in rows_of(folder)}
    assert not left & set(marked)
    report = page_of(folder / "run/report.html")
    assert not set(report.pairs) & set(marked)
    assert {tuple(pair) for pair in json.loads(report.scripts[0])} == set(marked)
    assert "is an answer" in report.text and "download folder" in report.text


def test_the_sample_is_random_and_riskiest_first(mined: Path) -> None:
    html = (mined / "run/report.html").read_text("utf-8")
    why = re.findall(r"(\d+) of 50 · ([a-z ]+)<", html)
    groups = {
        "a negative scores close to the positive": 15,
        "a negative shares words with a positive": 15,
        "drawn at random": 20,
    }
    assert [name for _, name in why] == [name for name, count in groups.items() for _ in range(count)]
    shown: dict[str, str] = {}
    order = list(dict.fromkeys(anchor for anchor, _ in page_of(mined / "run/report.html").pairs))
    assert len(order) == 50
    for anchor, (_, name) in zip(order, why, strict=True):
        shown[anchor] = name
    nearest: dict[str, float] = {}
    for row in rows_of(mined):
        near = (row["negative_score"] - row["positive_score"]) / abs(row["positive_score"])
        nearest[row["anchor_id"]] = max(near, nearest.get(row["anchor_id"], -9e9))
    drawn = {anchor for anchor, name in shown.items() if name == "drawn at random"}
    expected = sorted((anchor for anchor in nearest if anchor not in drawn), key=lambda anchor: -nearest[anchor])[:15]
    assert order[:15] == expected


def test_words_in_common_are_marked() -> None:
    text = "A Bridge over the river, a bridge."
    found = words.marked(text, {"bridge"}, {"river", "bridge"})
    assert "".join(piece for piece, _ in found) == text
    assert [piece for piece in found if piece[1]] == [("Bridge", "anchor"), ("river", "positive"), ("bridge", "anchor")]
    texts = [{"the", f"word{i}"} for i in range(10)] + [{"rare"}, {"rare"}]
    assert words.common(texts) == {"the"}
    assert words.likeness({"a", "b", "c"}, {"b", "c", "d"}) == 0.5
    assert words.likeness(set(), set()) == 0.0


def test_fewer_anchors_are_looked_at_where_there_are_many(folder: Path) -> None:
    out = write(load_config(folder / "config.yaml"), anchors=20)
    text = re.sub(r"\s+", " ", page_of(out).text)
    found = re.search(r"cover (\d+) of 70 anchors, evenly spaced", text)
    assert found and 14 <= int(found[1]) <= 24
    assert f"of {found[1]} anchors." in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        ["output.format=n-tuple", "output.include_positives=true"],
        ["output.format=labeled-list", "output.ids=false", "mining.margin_reference=each", "mining.num_random=2"],
        ["mining.min_score=99", "output.min_rows=0"],
        ["index.kind=IVF2,Flat", "index.min_recall=0.5", "search.depth=16", "mining.range_max=10"],
    ],
)
def test_every_kind_of_run(folder: Path, changes: list[str]) -> None:
    options = [option for change in changes for option in ("--set", change)]
    done = negpipe("mine", folder / "config.yaml", *options)
    assert done.code == 0 and "report: failed" not in done.err, done.err
    report = page_of(folder / "run/report.html")
    if "index.kind=IVF2,Flat" in changes:
        assert "IVF2,Flat" in report.text and "recall at ranks 0 to 9" in report.text
    if "mining.min_score=99" in changes:
        assert "there is nothing to review" in report.text and not report.pairs
    else:
        rows = json.loads((folder / "data/qrels.jsonl").read_text("utf-8").splitlines()[0])
        assert report.pairs and (rows["query-id"], rows["corpus-id"]) not in report.pairs


@pytest.mark.slow
def test_audit_and_calibration_of_other_rows_are_not_shown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = folder / "config.yaml"
    assert "compared to the qrels" in page_of(folder / "run/report.html").text
    assert "negpipe calibrate" in page_of(folder / "run/report.html").text
    options = ["--near-anchors", "0.1", "--range-min", "0", "--relative-margin", "none", "--absolute-margin", "none"]
    assert negpipe("calibrate", config, *options).code == 0
    assert negpipe("report", config).code == 0
    assert "Leak against hardness" in page_of(folder / "run/report.html").text
    monkeypatch.setattr("negpipe.review.report.gather._AUDITED", 0)
    assert negpipe("report", config).code == 0, "audited before"
    assert "compared to the qrels" in page_of(folder / "run/report.html").text
    assert negpipe("mine", config, "--set", "mining.num_negatives=2", "--set", "encoder.storage=float32").code == 0
    text = page_of(folder / "run/report.html").text
    assert "140 rows not audited: run `negpipe audit" in text
    assert "Leak against hardness" not in text


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["[" * 200_000, "[]"], ids=["deep", "list"])
def test_an_audit_that_cannot_be_read_is_made_again(stored: str, folder: Path) -> None:
    (folder / "run/audit.json").write_text(stored, encoding="utf-8")
    assert negpipe("report", folder / "config.yaml").code == 0
    assert "compared to the qrels" in page_of(folder / "run/report.html").text


def test_secrets_of_a_config_are_not_shown(folder: Path) -> None:
    out = folder / "report.html"
    config = folder / "config.yaml"
    assert negpipe("report", config, "--set", "data.path=https://user:hunter2@host/x", "--out", out).code == 0
    assert "https://***@host/x" in page_of(out).text
    assert "hunter2" not in out.read_text("utf-8")


def test_a_report_of_earlier_rows_is_told(tmp_path: Path) -> None:
    config = small.build(tmp_path)
    assert small.run("mine", config).code == 0
    (tmp_path / "run/report.html").touch()
    assert "shows earlier rows" not in small.run("mine", config).err  # nothing to do: its rows are these
    changed = small.run("mine", config, "--set", "mining.range_max=9")
    assert "report.html shows earlier rows: negpipe report" in changed.err.replace("\n", " ")
