"""Damage of every kind in every stage: found, named, and made again, with as little as possible made again."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_source as small
from beir_data import numbered_folder, precomputed_config
from real_runs import STAGES, Run

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.errors import DamagedError

KINDS = {
    "ingest": ["ingest", "ingest:anchors"],
    "encode": ["encode", "encode:anchors"],
    "index": ["index:ids", "index:flat"],
    "search": ["search"],
    "triplets": ["triplets", "ledger", "deeper"],
}
pytestmark = [pytest.mark.torture, pytest.mark.slow]
PLACES = [place for places in KINDS.values() for place in places]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run in which some anchors lack negatives and are searched again, so that there are deeper candidates."""
    folder = tmp_path_factory.mktemp("whole")
    config = precomputed_config(folder / "run", numbered_folder(folder / "beir", 100, 48))
    run = Run(config | {"mining": {"range_max": 4, "num_negatives": 3, "relative_margin": 0.5}, "search": {"depth": 8}})
    run.mine()
    assert all(len(files_at(run, place)) > 1 for place in PLACES if place != "index:flat")
    return run


def files_at(run: Run, place: str) -> list[Path]:
    """The files of a folder, or of a kind of part in a stage."""
    stage, _, kind = place.partition(":")
    if stage in ("ledger", "deeper"):
        return run.paths("triplets", stage)
    return run.files(stage, kind or {"ingest": "corpus", "encode": "corpus"}.get(stage))


def flip(path: Path) -> None:
    """Change one bit in the middle; size and time stay."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def digests(run: Run) -> dict[str, str]:
    """Every file of the run directory but the lock."""
    return {
        str(path.relative_to(run.folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in run.folder.rglob("*")
        if path.is_file()
    }


def stamps(run: Run) -> dict[str, tuple[int, int]]:
    """Inode and time of every file of the current output: what is made again has others."""
    found = ((path, (run.folder / path).stat()) for path in run.inodes())
    return {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in found}


def verified(run: Run) -> str:
    """What `negpipe verify` complains of, in one line; "" if nothing. It changes nothing."""
    config = run.folder.with_name("verified.yaml")
    config.write_text(json.dumps(run.config), encoding="utf-8")
    before = digests(run)
    outcome = small.run("verify", config)
    assert digests(run) == before
    if outcome.code == 0:
        assert "are intact" in outcome.out
        return ""
    assert outcome.code == 5
    return outcome.err.replace("\n", "")


def repaired(run: Run) -> graph.Result:
    return graph.mine(load_config(run.config, ["executor.kind=inline"]), repair=True)


@pytest.mark.guarantee(
    "a bit flips, files are swapped",
    "`verify` names it and changes nothing; `mine --repair` makes it and what may come from it again",
)
def test_every_kind_of_damage_in_every_stage_is_found_and_repaired(
    whole: Run, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    run = whole.copied(tmp_path / "run")
    struck: list[Path] = []
    for place in PLACES:
        files = files_at(run, place)
        flip(files[0])
        struck.append(files[0])
        if len(files) > 2:
            os.truncate(files[1], files[1].stat().st_size - 1)
            os.truncate(files[2], 0)
            struck += files[1:3]
    log = verified(run)
    assert f"{len(struck)} of " in log
    named = [path for path in struck if str(path.relative_to(run.folder)) in log]
    assert len(named) == min(20, len(struck))
    repaired(run)
    assert run.content() == whole.content()
    assert not verified(run)
    record_property("count: damages found", len(struck))


@pytest.mark.parametrize("place", PLACES)
def test_a_flipped_bit_and_what_may_come_from_it_are_made_again(
    place: str, whole: Run, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    run = whole.copied(tmp_path / "run")
    before = stamps(run)
    path = files_at(run, place)[0]
    flip(path)
    assert {state.state for state in run.states().values()} == {"current"}  # sizes tell nothing
    repaired(run)
    assert run.content() == whole.content()
    again = {name for name, stamp in stamps(run).items() if before[name] != stamp}
    assert str(path.relative_to(run.folder)) in again
    folders = {stage: "rows" if stage == "triplets" else stage for stage in STAGES}
    per_stage = {stage: sum(name.startswith(f"{folder}/") for name in again) for stage, folder in folders.items()}
    parts = {stage: len(run.parts(stage)) for stage in STAGES}
    # Of what cannot have read the file, nothing is made again.
    least = {
        "ingest": (1, 1, 1, 0, parts["triplets"]),
        "ingest:anchors": (1, 1, 0, 1, 1),
        "encode": (0, 1, 1, 0, parts["triplets"]),
        "encode:anchors": (0, 1, 0, 1, 1),
        "index:ids": (0, 0, 1, 0, 0),
        "index:flat": (0, 0, 1, parts["search"], 0),
        "search": (0, 0, 0, 1, 1),
    }.get(place, (0, 0, 0, 0, 1))
    assert tuple(per_stage.values()) == least
    record_property("count: damages found", 1)


@pytest.mark.guarantee("a bit flips, files are swapped")
def test_what_was_made_from_a_flipped_bit_is_not_believed(whole: Run, tmp_path: Path) -> None:
    """The flip is read before it is found: candidates of another depth come from it, and pass every check."""
    run, right = whole.copied(tmp_path / "run"), whole.copied(tmp_path / "right")
    deeper = ("search.depth=16", "mining.relative_margin=0.1")
    right.mine(*deeper)
    for path in files_at(run, "index:flat"):
        content = bytearray(path.read_bytes())
        content[-3] ^= 0x40  # a high byte of the last vector's last number
        path.write_bytes(content)
    run.mine(*deeper)
    assert run.content("search") != right.content("search")
    config = load_config(run.config, ["executor.kind=inline", *deeper])
    assert graph.mine(config, repair=True).ran == ("index", "search", "triplets")
    assert run.content() == right.content()
    run.mine()
    assert run.content("ingest", "encode", "index") == whole.content("ingest", "encode", "index")
    # Candidates stored deeper serve as well; the rows taken from them are the same.
    assert [path.read_bytes() for path in run.files("triplets")] == [
        path.read_bytes() for path in whole.files("triplets")
    ]


@pytest.mark.guarantee(
    "a changed byte makes a stage fail",
    "the file is named, with `--repair`",
    section="input",
)
@pytest.mark.parametrize("executor", ["inline", "local"])
def test_what_fails_for_a_changed_byte_names_the_file(whole: Run, tmp_path: Path, executor: str) -> None:
    """A row number that leads out of the corpus: only the row itself is wrong, every header is as it was."""
    run = whole.copied(tmp_path / "run")
    path = run.files("ingest", "anchors")[0]
    whole_file = pa.memory_map(str(path)).read_buffer()
    known = pa.ipc.open_file(whole_file).read_all()["known"].chunk(0).values
    content = bytearray(path.read_bytes())
    content[known.buffers()[1].address - whole_file.address + 5] ^= 0x10
    path.write_bytes(content)
    settings = ["mining.num_negatives=1", 'mining.exclude=["positive_normalized"]']
    with pytest.raises(DamagedError) as told:
        graph.mine(load_config(run.config, [f"executor.kind={executor}", *settings]))
    assert str(path.relative_to(run.folder)) in str(told.value)
    assert "--repair" in str(told.value)
    graph.mine(load_config(run.config, ["executor.kind=inline", *settings]), repair=True)


@pytest.mark.guarantee("a bit flips, files are swapped")
def test_swapped_files_are_found(whole: Run, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    swapped = 0
    run = whole.copied(tmp_path / "run")
    for place in PLACES:
        files = files_at(run, place)
        if len(files) > 1:
            one, other = files[0], files[-1]
            one.rename(tmp_path / "aside")
            other.rename(one)
            (tmp_path / "aside").rename(other)
            swapped += 2
    assert f"{swapped} of " in verified(run)
    repaired(run)
    assert run.content() == whole.content()
    record_property("count: damages found", swapped)


@pytest.mark.guarantee(
    "a file is cut or emptied",
    "seen at use, named, that part made again",
)
@pytest.mark.parametrize("place", PLACES)
def test_a_cut_file_is_seen_at_use_and_made_again(place: str, whole: Run, tmp_path: Path) -> None:
    run = whole.copied(tmp_path / "run")
    before = stamps(run)
    path = files_at(run, place)[-1]
    os.truncate(path, path.stat().st_size - 1)
    stage = next(stage for stage, places in KINDS.items() if place in places)
    state = run.states()[stage]
    assert state.state == "damaged"
    assert str(path.relative_to(run.folder)) in state.reason
    assert run.mine().ran == (stage,)
    assert run.content() == whole.content()
    remade = {name for name, stamp in stamps(run).items() if before[name] != stamp}
    assert str(path.relative_to(run.folder)) in remade
    assert len(remade) <= 3  # the file, and in triplets what goes with it


def another_header(path: Path) -> None:
    """The size stays; what says where things are in the file does not."""
    content = bytearray(path.read_bytes())
    content[:6] = content[-6:] = bytes(6)
    path.write_bytes(content)


def another_number_of_rows(path: Path) -> None:
    """A whole file of the same kind, schema and size, with some of the rows: what is missing is padded."""
    size, sink = path.stat().st_size, pa.BufferOutputStream()
    if path.suffix == ".npy":
        vectors = np.load(path)
        np.save(path, vectors[:-1])
        os.truncate(path, size)
        return
    if path.suffix == ".faiss":
        flat = faiss.read_index(str(path))
        other = faiss.IndexFlatIP(2 * flat.d)
        other.add(flat.reconstruct_n(0, flat.ntotal).reshape(-1, 2 * flat.d))
        faiss.write_index(other, str(path))
        return
    if path.suffix == ".arrow":
        table = pa.ipc.open_file(path).read_all()
        some = pa.Table.from_pylist(table.to_pylist()[: len(table) // 2], table.schema)
        with pa.ipc.new_file(sink, some.schema) as writer:
            writer.write_table(some)
        tail = 10
    else:
        table = pq.read_table(path)
        some = table[: len(table) // 2]
        pq.write_table(some, sink, compression="zstd", use_dictionary=False, write_statistics=False)
        tail = 8
    content = sink.getvalue().to_pybytes()
    # The footer says where the rows are, and its length stands behind it: there may be anything before it.
    footer = len(content) - tail - int.from_bytes(content[-tail : 4 - tail], "little")
    path.write_bytes(content[:footer] + bytes(size - len(content)) + content[footer:])
    again = pq.read_table(path) if tail == 8 else pa.ipc.open_file(path).read_all()
    assert again.equals(some)


TABLES = [place for place in PLACES if place != "index:flat"]


@pytest.mark.guarantee(
    "a file of the right size has another header or number of rows",
    "whatever reads the run names it, exit 5; `mine --repair` makes it and what may come from it again",
)
@pytest.mark.parametrize("change", [another_header, another_number_of_rows])
def test_wrong_content_of_the_same_size_is_seen_by_its_header_at_use(
    change: Callable[[Path], None], whole: Run, tmp_path: Path
) -> None:
    run = whole.copied(tmp_path / "run")
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(run.config), encoding="utf-8")
    anchor = run.tables("anchors")["id"][0].as_py()
    readers = [
        ["audit", config],
        ["report", config],
        ["explain", config, "--anchor", anchor],
        ["export", config, "--to", "flagembedding", "--out", tmp_path / "out.jsonl"],
        ["quality", config],
    ]
    assert [small.run(*reader).code for reader in readers[2:4]] == [0, 0]
    (tmp_path / "out.jsonl").unlink()
    for number, place in enumerate(TABLES):
        path = files_at(run, place)[0]
        right, size = path.read_bytes(), path.stat().st_size
        change(path)
        assert path.stat().st_size == size and path.read_bytes() != right
        assert {state.state for state in run.states().values()} == {"current"}
        before = digests(run)
        outcome = small.run(*readers[number % len(readers)])
        assert (outcome.code, outcome.out) == (5, ""), (place, outcome)
        assert f"{path.relative_to(run.folder)} has changed since it was written (" in outcome.err, (place, outcome)
        assert f"Run `negpipe mine {config} --repair`" in outcome.err
        assert digests(run) == before
        assert not (tmp_path / "out.jsonl").exists()
        path.write_bytes(right)
    for place in TABLES:
        change(files_at(run, place)[0])
    repaired(run)
    assert run.content() == whole.content()


@pytest.mark.guarantee("a file of the right size has another header or number of rows")
@pytest.mark.parametrize("change", [another_header, another_number_of_rows])
def test_a_run_sees_by_its_header_what_is_wrong_with_what_it_reads(
    change: Callable[[Path], None], whole: Run, tmp_path: Path
) -> None:
    run = whole.copied(tmp_path / "run")
    deeper, margin = "search.depth=12", "mining.relative_margin=0.2"
    reading = {
        "ingest": [margin],
        "ingest:anchors": [margin],
        "search": [margin],
        "index:ids": [deeper],
        "index:flat": [deeper],
        "encode": [deeper, "index.kind=stream"],
        "encode:anchors": [deeper, "index.kind=stream"],
    }
    for path, settings in [(files_at(run, place)[0], settings) for place, settings in reading.items()]:
        right = path.read_bytes()
        change(path)
        with pytest.raises(DamagedError, match=re.escape(str(path.relative_to(run.folder)))):
            run.mine(*settings)
        path.write_bytes(right)
    run.mine()
    assert run.content() == whole.content()


@pytest.mark.guarantee(
    "a record or manifest is damaged",
    "found, dropped, made again",
)
def test_damaged_records_are_found_and_dropped(
    whole: Run, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    run = whole.copied(tmp_path / "run")
    books = run.folder / ".negpipe"
    struck = []
    for stage in STAGES:
        struck.append(books / stage / "manifest.json")
        text = struck[-1].read_text(encoding="utf-8")
        struck[-1].write_text(text.replace('"rows": 1', '"rows": 2', 1), encoding="utf-8")
        sidecar = next(path for path in sorted((books / stage).glob("*.json")) if path.name != "manifest.json")
        sidecar.write_bytes(sidecar.read_bytes()[:-40])
        struck.append(sidecar)
    log = verified(run)
    for path in struck:
        assert str(path) in log
    repaired(run)
    assert run.content() == whole.content()
    assert not verified(run)
    record_property("count: damages found", len(struck))


def test_a_record_or_manifest_that_lost_its_digest_is_damaged(whole: Run, tmp_path: Path) -> None:
    """Only the first edition wrote none, and it wrote no roles."""
    run = whole.copied(tmp_path / "run")
    books = run.folder / ".negpipe/encode"
    for path in (books / "manifest.json", next(path for path in sorted(books.glob("*.json")) if len(path.stem) == 16)):
        value = json.loads(path.read_text(encoding="utf-8"))
        del value["digest"]
        path.write_text(json.dumps(value), encoding="utf-8")
        assert str(path) in verified(run)
    repaired(run)
    assert run.content() == whole.content()


def test_the_command_repairs(whole: Run, tmp_path: Path) -> None:
    run = whole.copied(tmp_path / "run")
    path = run.files("search")[0]
    flip(path)
    assert re.search(r"Rebuild them with `negpipe mine \S+verified\.yaml --repair`\.", verified(run))
    code, _, log = run.command("mine", flags=["--repair"])
    assert code == 0
    assert f"{path.relative_to(run.folder)} has changed since it was written: recomputing it" in log
    assert not verified(run)
    assert run.content() == whole.content()


def test_a_flipped_bit_of_a_trained_index_costs_what_was_built_on_it(whole: Run, tmp_path: Path) -> None:
    run = whole.copied(tmp_path / "run")
    run.mine("index.kind=IVF2,Flat", "index.min_recall=0.5")
    right = run.content()
    before = stamps(run)
    (path,) = (path for path in run.files("index", "trained"))
    flip(path)
    config = load_config(run.config, ["executor.kind=inline", "index.kind=IVF2,Flat", "index.min_recall=0.5"])
    graph.mine(config, repair=True)
    assert run.content() == right
    again = {name.split("/")[0] for name, stamp in stamps(run).items() if before[name] != stamp}
    assert again == {"index"}  # what was built on it has the same bytes, so nothing further follows
    kept = {str(path.relative_to(run.folder)) for path in run.files("index", "ids")}
    assert all(stamps(run)[name] == before[name] for name in kept)
