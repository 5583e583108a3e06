"""Several run directories share the parts of one store: each is made once, and none is lost to another's `clean`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import small_source as small
import yaml
from real_runs import Run

from negpipe import graph
from negpipe.config.file import load_config
from negpipe.engine import upkeep
from negpipe.engine.manifest import Books
from negpipe.errors import ConfigError, LockedError, StorageError
from negpipe.store.files import write_all
from negpipe.store.lock import run_lock
from negpipe.store.store import LocalStore

pytestmark = pytest.mark.guarantee(
    "two run directories share a store",
    "each part is made once; `clean` keeps what either needs, and does not run beside other commands that write",
)


@pytest.fixture
def variants(tmp_path: Path) -> tuple[Run, Run]:
    """Two runs of one job that differ in what is selected; the store is beside them."""
    small.build(tmp_path)
    base = small.settings(tmp_path) | {"store": str(tmp_path / "store")}
    return tuple(Run({**base, "run_dir": str(tmp_path / name)}) for name in ("first", "second"))  # type: ignore[return-value]


def rows(run: Run) -> list[dict[str, Any]]:
    return [row for path in sorted((run.folder / "triplets").glob("part-*")) for row in pq.read_table(path).to_pylist()]


def stored(store: Path) -> dict[str, int]:
    """Data files by inode."""
    paths = (path for path in store.rglob("*") if path.is_file() and ".negpipe" not in path.parts)
    return {str(path.relative_to(store)): path.stat().st_ino for path in paths}


@pytest.mark.slow
def test_variants_encode_and_search_once_and_have_the_rows_of_runs_of_their_own(
    variants: tuple[Run, Run], tmp_path: Path
) -> None:
    first, second = variants
    first.mine()
    before = stored(tmp_path / "store")
    assert not list(first.folder.rglob("*.npy"))
    second.mine("mining.num_negatives=2")
    after = stored(tmp_path / "store")
    assert {name: after[name] for name in before} == before
    new = {name.partition("/")[0] for name in after.keys() - before.keys()}
    assert new == {"rows", "ledger"}
    for run, settings in ((first, []), (second, ["mining.num_negatives=2"])):
        alone = {name: value for name, value in run.config.items() if name != "store"}
        fresh = Run({**alone, "run_dir": str(tmp_path / f"alone-{run.folder.name}")})
        fresh.mine(*settings)
        assert rows(run) == rows(fresh)
    assert len(rows(first)) != len(rows(second))
    assert {state.state for state in first.states().values()} == {"current"}


def test_clean_keeps_what_any_run_needs(variants: tuple[Run, Run], tmp_path: Path) -> None:
    first, second = variants
    first.mine()
    second.mine("mining.num_negatives=2")
    first.mine("mining.num_negatives=1")
    assert graph.clean(load_config(first.config)) > 0
    for run, settings in ((first, ["mining.num_negatives=1"]), (second, ["mining.num_negatives=2"])):
        config = load_config(run.config, settings)
        assert not upkeep.verify(config, graph.inventory(config))
        assert {state.state for state in run.states(*settings).values()} == {"current"}
    assert graph.clean(load_config(first.config)) == 0


def test_clean_keeps_both_of_two_parts_with_one_key(variants: tuple[Run, Run], tmp_path: Path) -> None:
    """A part that was rebuilt with other bytes, as by other library versions, while another run names the old one."""
    for run in variants:
        run.mine()
    store = LocalStore(tmp_path / "store")
    books = Books(variants[1].folder, "encode", store)
    manifest, sealed = books.manifest(), books.content()
    assert manifest
    part, *others = manifest.parts
    old = part.file("vectors")
    content = store.path(old.path).read_bytes() + b"other"
    made = store.put("encode", lambda digest: f"{part.key}-{digest[:12]}.npy", lambda file: write_all(file, content))
    new = old.model_copy(update={"path": f"encode/{made.name}", "bytes": made.bytes, "digest": made.digest})
    rebuilt = part.model_copy(update={"files": (new,)})
    assert books.write_manifest(manifest.model_copy(update={"parts": (rebuilt, *others)}), sealed)
    for run in variants:
        assert graph.clean(load_config(run.config)) == 0
    assert store.path(old.path).is_file() and store.path(new.path).read_bytes() == content


def test_clean_refuses_while_a_run_cannot_be_read_until_it_is_forgotten(
    variants: tuple[Run, Run], tmp_path: Path
) -> None:
    first, second = variants
    first.mine()
    second.mine("mining.num_negatives=2")
    before = stored(tmp_path / "store")
    shutil.rmtree(second.folder)
    with pytest.raises(StorageError) as refused:
        graph.clean(load_config(first.config))
    assert f"--forget {second.folder}" in str(refused.value)
    assert stored(tmp_path / "store") == before
    config = tmp_path / "first.yaml"
    config.write_text(yaml.safe_dump(first.config), encoding="utf-8")
    wrong = small.run("clean", config, "--yes", "--forget", str(tmp_path / "nobody"))
    assert wrong.code == ConfigError.exit_code
    assert str(second.folder) in wrong.err.replace("\n", "")
    done = small.run("clean", config, "--yes", "--forget", str(second.folder))
    assert done.code == 0, done.err
    assert len(stored(tmp_path / "store")) < len(before)
    assert {state.state for state in first.states().values()} == {"current"}


def test_clean_and_a_run_exclude_each_other(variants: tuple[Run, Run]) -> None:
    first, second = variants
    first.mine()
    second.mine("mining.num_negatives=2")
    with run_lock(second.folder), pytest.raises(LockedError) as refused:
        graph.clean(load_config(first.config))
    assert str(second.folder) in str(refused.value)


def test_repair_and_rebuild_wait_for_no_run_that_is_at_work(variants: tuple[Run, Run]) -> None:
    """They drop what may be damaged, whoever made it."""
    first, second = variants
    first.mine()
    second.mine("mining.num_negatives=2")
    with run_lock(second.folder):
        with pytest.raises(LockedError):
            graph.mine(load_config(first.config), repair=True)
        with pytest.raises(LockedError):
            graph.mine(load_config(first.config), rebuild=True)


def test_a_run_directory_is_no_store_of_others_and_a_store_no_run_directory(
    variants: tuple[Run, Run], tmp_path: Path
) -> None:
    first, _ = variants
    alone = Run({name: value for name, value in first.config.items() if name != "store"})
    alone.mine()
    before = stored(alone.folder)
    with pytest.raises(ConfigError, match="store"):
        graph.mine(load_config({**first.config, "run_dir": str(tmp_path / "new"), "store": str(alone.folder)}))
    first_shared = Run({**first.config, "run_dir": str(tmp_path / "new")})
    first_shared.mine()
    for act in (graph.mine, graph.clean):
        with pytest.raises(ConfigError, match="run_dir"):
            act(load_config({**alone.config, "run_dir": str(tmp_path / "store")}))
    assert stored(alone.folder) == before


def test_parts_of_a_run_are_moved_into_a_store_and_not_made_again(variants: tuple[Run, Run], tmp_path: Path) -> None:
    first, _ = variants
    alone = Run({name: value for name, value in first.config.items() if name != "store"})
    alone.mine()
    before = stored(alone.folder)
    with pytest.raises(ConfigError, match="already has parts"):
        first.mine()
    (tmp_path / "store").mkdir(exist_ok=True)
    for path in [*alone.folder.iterdir()]:
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            path.rename(tmp_path / "store" / path.name)
    for record in [*(alone.folder / ".negpipe").glob("*/" + "[0-9a-f]" * 16 + ".json")]:
        place = tmp_path / "store/.negpipe" / record.parent.name
        place.mkdir(parents=True, exist_ok=True)
        record.rename(place / record.name)
    assert first.mine().ran == ()
    assert {name: inode for name, inode in before.items() if not name.startswith((".", "triplets"))} == {
        name: inode for name, inode in stored(tmp_path / "store").items() if not name.startswith(".")
    }


def test_no_export_replaces_the_store(variants: tuple[Run, Run], tmp_path: Path) -> None:
    from negpipe.review.finished import export
    from negpipe.rows.exports import ExportOptions

    first, _ = variants
    first.mine()
    before = stored(tmp_path / "store")
    for place in ("store", "store/encode", "."):
        with pytest.raises(ConfigError, match="not an export"):
            export(load_config(first.config), ExportOptions(to="jsonl", out=tmp_path / place, force=True))
    assert stored(tmp_path / "store") == before


def test_a_run_directory_that_moved_is_one(variants: tuple[Run, Run], tmp_path: Path) -> None:
    first, second = variants
    first.mine()
    second.mine("mining.num_negatives=2")
    moved = second.folder.rename(tmp_path / "moved")
    second.folder.symlink_to(moved)
    second.mine("mining.num_negatives=1")
    assert graph.clean(load_config(second.config)) > 0
    assert {state.state for state in second.states("mining.num_negatives=1").values()} == {"current"}


def test_forget_is_for_shared_stores(tmp_path: Path) -> None:
    small.build(tmp_path)
    with pytest.raises(ConfigError, match="store"):
        upkeep.forget(load_config(small.settings(tmp_path)), tmp_path)


def test_a_store_on_another_disk_is_shown_by_symbolic_links(tmp_path: Path, other_disk: Path) -> None:
    from datasets import load_dataset

    small.build(tmp_path)
    run = Run(small.settings(tmp_path) | {"store": str(other_disk)})
    run.mine()
    shown = [*(run.folder / "triplets").iterdir()]
    assert shown
    assert all(path.is_symlink() for path in shown)
    loaded = load_dataset("parquet", data_dir=str(run.folder / "triplets"), cache_dir=str(tmp_path / "cache"))
    assert len(loaded["train"]) == len(rows(run)) > 0
    run.mine("mining.num_negatives=2")
    assert run.mine().ran == ("triplets",)
    assert run.mine().ran == ()
    graph.clean(load_config(run.config))
    assert {state.state for state in run.states().values()} == {"current"}


def test_so_are_files_with_names_of_their_own_and_no_other_link_leads_out(tmp_path: Path, other_disk: Path) -> None:
    small.build(tmp_path)
    train = {"base": "unused", "split": {"test": 0.5}}
    run = Run(small.settings(tmp_path) | {"store": str(other_disk), "train": train})
    run.mine(only="ingest")
    shown = {path.name: path for path in (run.folder / "split").iterdir() if path.name != ".shown"}
    assert {*shown} == {"train.parquet", "test.parquet"} and all(path.is_symlink() for path in shown.values())
    assert run.mine(only="ingest").ran == ()
    run.mine("train.split.seed=1", only="ingest")
    graph.clean(load_config(run.config, ["train.split.seed=1"]))
    assert run.mine("train.split.seed=1", only="ingest").ran == ()
    (run.folder / "split/notes").symlink_to(other_disk)
    with pytest.raises(StorageError, match="notes is a link that leads out"):
        run.mine(only="ingest")
