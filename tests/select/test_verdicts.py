"""A reviewer's file of pairs that are never negatives."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import small_source as small

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.errors import InputError


def triples(folder: Path, *overrides: str) -> set[tuple[str, str]]:
    """(anchor, negative) ids of a run."""
    result = graph.mine(load_config(small.settings(folder), list(overrides)))
    rows = pq.read_table(result.triplets).to_pydict()
    return set(zip(rows["anchor_id"], rows["negative_id"], strict=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    documents = small.documents()
    documents.append(documents[20] | {"_id": "copy of 20"})
    small.build(tmp_path, documents)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "csv", "csv with a byte order mark", "tsv"])
def test_pairs_in_the_file_are_never_negatives(folder: Path, kind: str) -> None:
    before = triples(folder)
    anchor, document = sorted(before)[0]
    file = folder / f"verdicts.{kind[:5].split(maxsplit=1)[0]}"
    if kind == "jsonl":
        text = f'{{"anchor_id": "{anchor}", "document_id": "{document}"}}\n'
    else:
        comma = "\t" if kind == "tsv" else ","
        text = f"anchor_id{comma}document_id\n{anchor}{comma}{document}\n"
    file.write_text(text, encoding="utf-8-sig" if "mark" in kind else "utf-8")
    after = triples(folder, f"mining.exclude_file={file}")
    assert (anchor, document) not in after
    assert {pair for pair in before if pair[0] != anchor} == {pair for pair in after if pair[0] != anchor}


def test_a_verdict_on_any_id_of_a_text_counts(folder: Path) -> None:
    settings = ("mining.range_max=30", "mining.num_negatives=30", "mining.relative_margin=null")
    first = small.documents()[20]["_id"]
    anchor = next(anchor for anchor, document in sorted(triples(folder, *settings)) if document == first)
    file = folder / "verdicts.jsonl"
    file.write_text(f'{{"anchor_id": "{anchor}", "document_id": "copy of 20"}}\n')
    assert (anchor, first) not in triples(folder, *settings, f"mining.exclude_file={file}")


def test_pairs_that_name_nothing_are_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = folder / "verdicts.jsonl"
    pairs = [("q1", "copy of 20"), ("q1", "d2000"), ("Q2", "d1"), ("Q2", "d2000"), ("q3", "d4")]
    small.write_rows(file, [{"anchor_id": anchor, "document_id": document} for anchor, document in pairs])
    triples(folder, f"mining.exclude_file={file}")
    told = [message for message in caplog.messages if "pairs of" in message]
    assert told == [
        f"triplets: 3 of 5 pairs of {file} (mining.exclude_file) name an anchor or document that does not exist,"
        " such as document 'd2000'"
    ]
    caplog.clear()
    small.write_rows(file, [{"anchor_id": "q1", "document_id": "d4"}])
    triples(folder, f"mining.exclude_file={file}")
    assert not any("pairs of" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{oops\n", "row 1"),
        ('{"anchor_id": "q1"}\n', "anchor_id and document_id"),
        ("[]\n", "anchor_id and document_id"),
    ],
)
def test_a_broken_file_is_found_before_anything_runs(folder: Path, text: str, message: str) -> None:
    file = folder / "verdicts.jsonl"
    file.write_text(text)
    config = load_config(small.settings(folder), [f"mining.exclude_file={file}"])
    with pytest.raises(InputError, match=message):
        graph.mine(config)
    assert not (folder / "run" / "ingest").exists()


def test_a_narrower_window_searches_nothing_and_takes_what_a_fresh_run_takes(folder: Path) -> None:
    wide = ["search.depth=null", "mining.range_max=100", "mining.relative_margin=0.3"]
    narrow = ["mining.relative_margin=0.3", "mining.range_max=5", "search.depth=6", "mining.max_depth=null"]
    graph.mine(load_config(small.settings(folder), wide))
    config = load_config(small.settings(folder), narrow)
    again = graph.mine(config)
    assert again.ran == ("triplets",)
    fresh = graph.mine(load_config(small.settings(folder), [*narrow, f"run_dir={folder / 'fresh'}"]))
    rows = [pq.read_table(result.triplets) for result in (again, fresh)]
    assert rows[0].equals(rows[1]) and rows[0].num_rows
    assert again.stats["triplets"] == fresh.stats["triplets"]


def test_a_file_that_is_no_longer_named_is_told(tmp_path: Path) -> None:
    config = small.build(tmp_path)
    verdict = {"anchor_id": "q1", "document_id": "d1", "verdict": "false_negative"}
    (tmp_path / "verdicts.jsonl").write_text(json.dumps(verdict) + "\n", encoding="utf-8")
    graph.mine(load_config(str(config), [f"mining.exclude_file={tmp_path / 'verdicts.jsonl'}"]))
    (triplets,) = [state for state in graph.status(load_config(str(config))) if state.stage == "triplets"]
    assert (triplets.state, triplets.reason) == ("stale", "mining.exclude_file was removed")
