"""train: rows → a model, and its evaluation.

Three parts. `base` has the ranking that the encoder finds for every held-out anchor, and the scores before training: of
the retriever to be trained, or of the order that a reranker should improve. It does not depend on rows, so runs that
share a store judge their base once. `model` is what Sentence Transformers saves, one file each, and a log of the steps;
RUN/model shows it. `evaluation` has the scores before and after, and the model card, which reports both; if only the
held-out split changes, it is recomputed, but the model is not.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from negpipe import encoders
from negpipe.config.encoder import Encoder
from negpipe.config.schema import Config
from negpipe.data.tables import ragged, texts
from negpipe.encoders import prompts
from negpipe.encoders.cuts import percent
from negpipe.engine import devices, versions
from negpipe.engine.fingerprint import key
from negpipe.engine.manifest import File, Part
from negpipe.engine.stage import Context, Made, Needs, Progress, Publisher, Shown, Stage, Task
from negpipe.errors import ConfigError, InputError, count_of
from negpipe.stages import encode, shortage
from negpipe.store import files, view
from negpipe.store.files import BOOKS, write_all
from negpipe.train import card, held_out, overlap
from negpipe.train.comparison import METRICS, compare
from negpipe.train.trainer import CARD

VERSION = 5
# The contents of base and guide are in `_sources`, those of split and eval_split in the inputs.
_CIRCUMSTANCE = {"checkpoint_steps", "eval_split", "split", "license", "base", "guide"}
_RUNS = ("batch_size", "call_texts", "precision", "runtime", "truncate_dim")
_OF_EVALUATION = {f"encoder.{name}" for name in _RUNS} | {
    "mining.anchor_id",
    "train.rerank_depth",
    "train.license",  # stated in the card, which is made by the evaluation
}
_NOT_USED = {"encoder.storage", "encoder.cache"}
_EXTRA = ("accelerate", "scipy")
_STATES = 3  # float32 numbers per weight in a checkpoint: itself, and two of the optimizer
_NOT_OF_KIND = {"retriever": {"rerank_depth"}, "reranker": {"guide", "matryoshka", "negatives"}}
_READ_BY_RERANKER = {"encoder.query_max_length", "encoder.passage_max_length", "encoder.trust_remote_code"}


def _config(config: Config) -> Config:
    """The config with the encoder to be judged: for a retriever, the one that is trained."""
    train, encoder = config.train, config.encoder
    assert train is not None
    if train.base is None or train.kind == "reranker":
        return config
    changed: dict[str, Any] = {"model": train.base, "revision": None, "model_class": None, "pooling": None}
    if not encoder.runs_here:
        changed |= {"backend": "sentence-transformers"}
    return config.model_copy(update={"encoder": encoder.model_copy(update=changed)})


def _settings(config: Config) -> dict[str, Any]:
    assert config.train is not None
    values = config.train.model_dump(mode="json", exclude=_CIRCUMSTANCE | _NOT_OF_KIND[config.train.kind])
    values["seed"] = config.seed if config.train.seed is None else config.train.seed
    encoder = encode.STAGE.settings(config)
    stated = {"train.license": config.train.license} if config.train.license else {}
    judged = {"mining.anchor_id": config.mining.anchor_id}
    return (
        judged
        | {f"train.{name}": value for name, value in values.items()}
        | {name: value for name, value in (encoder | stated).items() if name not in _NOT_USED}
    )


def _sources(context: Context) -> dict[str, str]:
    """The trained model, a retriever's prompts, the encoder of a reranker, and the guide."""
    base = {"train.base": _base(context).digest}
    encoder = {"encoder.model": _encoder(context).digest} if _reranks(context.config) else {}
    guide = {"train.guide": _guide(context).digest} if _guided(context.config) else {}
    return base | encoder | _prompts(context) | guide


def _prompts(context: Context) -> dict[str, str]:
    encoder = context.config.encoder
    return {f"encoder.{name}": text for name, text in prompts.of_the_model(encoder, _encoder(context).path).items()}


def _encoder(context: Context) -> encoders.Model:
    """The encoder that finds the documents: the retriever before training, or the one before the reranker."""
    if _reranks(context.config):
        return encoders.resolve_model(context.config.encoder, context.digest_file)
    return _resolved(context, context.config.encoder, "train.base")


def _base(context: Context) -> encoders.Model:
    """The model that is trained."""
    train = context.config.train
    assert train is not None
    return _named(context, "base", train.base) if _reranks(context.config) and train.base else _encoder(context)


def _guide(context: Context) -> encoders.Model:
    train = context.config.train
    assert train is not None
    return _named(context, "guide", train.guide) if train.guide else _base(context)


def _named(context: Context, setting: str, model: str) -> encoders.Model:
    changed = {"backend": "sentence-transformers", "model": model, "revision": None}
    return _resolved(context, context.config.encoder.model_copy(update=changed), f"train.{setting}")


def _guided(config: Config) -> bool:
    return config.train is not None and config.train.loss == "CachedGISTEmbedLoss"


def _reranks(config: Config) -> bool:
    return config.train is not None and config.train.kind == "reranker"


def _resolved(context: Context, encoder: Encoder, field: str) -> encoders.Model:
    named = context.config.train is not None and getattr(context.config.train, field.partition(".")[2]) is not None
    try:
        return encoders.resolve_model(encoder, context.digest_file)
    except InputError as error:
        if not named:
            raise
        raise InputError(error.problem, file=error.file, field=field, remedy=error.remedy) from None


def _check(context: Context) -> None:
    """Check everything that can be checked before hours are spent."""
    train = context.config.train
    assert train is not None
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"train: {' and '.join(missing)} is not installed: run `pip install 'negpipe[train]'`")
    _sources(context)
    _check_room(context)
    held_out.check(context.config)
    if "held_out" in context.manifests:
        _check_held_out(context)
    if "triplets" in context.manifests:
        rows = context.manifest("triplets").stats["rows"]
        if rows < train.batch_size:
            raise InputError(
                f"{count_of(rows, 'row is', 'rows are')} too few for a batch of {train.batch_size:,}",
                field="train.batch_size",
                remedy="Mine more rows, or set a smaller batch",
            )
        if not shortage.negatives_of(context.manifest("triplets").stats):
            raise InputError(
                f"all {rows:,} rows have the label 1: there is nothing to learn",
                field="train.kind",
                remedy="Mine negatives: `negpipe status` and the ledger show why there are none",
            )


def _check_room(context: Context) -> None:
    """Check that checkpoints and the model fit onto the disk.

    Raises:
        StorageError: they do not fit.
    """
    from negpipe.train.trainer import CHECKPOINTS

    weights = 4 * encoders.parameters(Path(_base(context).path))
    place = next(path for path in (context.run_dir, *context.run_dir.absolute().parents) if path.is_dir())
    books = place / BOOKS if (place / BOOKS).is_dir() else place
    remedy = "set run_dir to a folder on a larger disk"
    begun = sum(map(files.bytes_in, (books / "train").glob("begun-*")))
    needed = max(0, (CHECKPOINTS * _STATES + 2) * weights - begun)
    files.check_room({books: needed}, "checkpoints and model take about", remedy)


def _check_held_out(context: Context) -> None:
    """Check that there are held-out anchors, and that not all are trained on."""
    if "ingest" not in context.manifests:
        return
    found, train = overlap.measure(context), context.config.train
    assert train is not None
    judge, field = train.judge
    if found.anchors < 2:
        raise InputError(
            f"{judge} has {found.anchors} anchors with a positive, but a comparison needs two",
            field=field,
            remedy="Raise train.split.test" if train.split else "Use a split with more judgments",
        )
    if found.anchors_trained_on == found.anchors:
        raise InputError(
            f"all {found.anchors:,} anchors of {judge} are also trained on",
            field=field,
            remedy=f"Use a split with anchors that are not in the split '{context.config.data.split}', or, if there is"
            f" none, hold some of its anchors out: train: {{split: {{test: 0.1}}}} in place of train.eval_split",
        )


def _plan(context: Context) -> Iterator[Task]:
    """The base's evaluation, then the model, and once both exist, its evaluation: one at a time, each with all of the
    machine."""
    train = context.config.train
    assert train is not None
    settings, sources = _settings(context.config), _sources(context)
    judged_on, rows = context.manifest("held_out"), context.manifest("triplets")
    judged = sum(part.rows for part in texts(judged_on))
    run = {name: value for name, value in settings.items() if not name.startswith("train.")}
    base = key("train", VERSION, "base", run, _encoder(context).digest, _prompts(context), judged_on.digest)
    yield Task(base, "base", judged, {})
    before = context.own.part(base)
    if before is None:
        return
    if _reranks(context.config):
        trained_by = {name: value for name, value in settings.items() if name.startswith("train.")}
        trained_by |= {name: settings[name] for name in _READ_BY_RERANKER}
        sources = {"train.base": sources["train.base"]}
    else:
        trained_by = settings
    trained_by = {name: value for name, value in trained_by.items() if name not in _OF_EVALUATION}
    written = [file for part in rows.parts for file in part.all("rows")]
    name = key("train", VERSION, "model", trained_by, sources, [file.digest for file in written])
    count = rows.stats["rows"]
    total = train.steps * train.batch_size * train.gradient_accumulation if train.steps else int(train.epochs * count)
    yield Task(name, "model", total, {"rows": [file.path for file in written]})
    part = context.own.part(name)
    if part is None:
        return
    made: dict[str, Any] = {role: before.file(role).path for role in ("scores", "ranking")}
    made["model"] = {name: file.path for name, file in _model_files(part).items()}
    # The overlap is with everything read for training, and the card names the rows.
    of = [part.identity(), before.identity(), judged_on.digest, context.manifest("ingest").digest, rows.digest]
    evaluation = key("train", VERSION, "evaluation", settings, _sources(context), of)
    yield Task(evaluation, "evaluation", before.rows if _reranks(context.config) else judged, made)


def _model_files(part: Part) -> dict[str, File]:
    """The files of a model by their names in its folder."""
    return dict(zip(part.meta["names"], part.all("model"), strict=True))


def _run(task: Task, _: None, context: Context, publish: Publisher, progress: Progress) -> Made:
    device = encoders.provenance(context.config.encoder, context.budget.device)
    installed = versions.installed(_libraries(context.config))
    folder = context.own.begun(key(task.key, installed, device["device_kind"]))
    run = {"base": _judge_base, "model": _train, "evaluation": _evaluate}[task.kind]
    made = run(task, folder, context, publish, progress)
    return replace(made, provenance=device | made.provenance)


def _train(task: Task, folder: Path, context: Context, publish: Publisher, progress: Progress) -> Made:
    from negpipe.train import reranker, retriever

    config, base = context.config, _base(context).path
    rows = [context.store.path(path) for path in task.payload["rows"]]
    budget = context.budget
    options: dict[str, Any] = {"threads": budget.threads, "device": budget.device, "progress": progress}
    if _reranks(config):
        trained = reranker.train(config, rows, base, folder, **options)
    else:
        guide = _guide(context).path if _guided(config) else base
        trained = retriever.train(config, rows, base, guide, folder, **options)
    names = sorted(path.relative_to(trained.folder).as_posix() for path in trained.folder.rglob("*") if path.is_file())
    for number, name in enumerate(names):
        path = trained.folder / name
        suffix = PurePosixPath(name).suffix or ".bin"

        def write(target: Any, path: Path = path) -> None:
            with path.open("rb") as source:
                shutil.copyfileobj(source, target)

        # The card contains the training time.
        publish(f"model-{number:05d}", suffix, write, needed=path.stat().st_size, aside=name == CARD)
    publish("log", ".parquet", lambda file: pq.write_table(trained.log, file, compression="zstd"))
    losses = trained.log["loss"].to_pylist()
    facts = {"names": names, "dimension": trained.width, "steps": len(losses), "loss": [losses[0], losses[-1]]}
    return Made(task.rows, facts, {"resumed_at_step": trained.resumed})


def _judge_base(task: Task, folder: Path, context: Context, publish: Publisher, progress: Progress) -> Made:
    from negpipe.train import evaluation

    encoder = context.config.encoder
    path, budget = _encoder(context).path, context.budget
    rows, scores = evaluation.rank(context, encoder, path, folder, budget=budget, progress=progress)
    ids = {"anchor_id": pa.array(evaluation.anchor_ids(context), pa.large_string())}
    tables = {
        "scores": pa.table(ids | evaluation.measure(context, rows) | evaluation.best_scores(context, rows, scores)),
        "ranking": pa.table(
            ids
            | {
                name: pa.FixedSizeListArray.from_arrays(values.ravel(), values.shape[1])
                for name, values in (("rows", rows), ("scores", scores))
            }
        ),
    }
    for role, table in tables.items():
        publish(role, ".parquet", partial(pq.write_table, table, compression="zstd"))
    return Made(len(rows))


def _evaluate(task: Task, folder: Path, context: Context, publish: Publisher, progress: Progress) -> Made:
    from negpipe.train import evaluation, retriever

    config = context.config
    assert config.train is not None
    linked, begun = folder / "model", folder / "begun"
    begun.mkdir(exist_ok=True)
    files_of = {name: context.store.path(path) for name, path in task.payload["model"].items()}
    view.fill(linked, files_of, symbolic=False)
    options: dict[str, Any] = {"budget": context.budget, "progress": progress}
    kept, after = [*METRICS], dict[str, Any]()
    if _reranks(config):
        found, _ = ragged(pq.read_table(context.store.path(task.payload["ranking"]))["rows"])
        found = found.reshape(task.rows, -1)
        rows = evaluation.rerank(context, found, config.train.rerank_depth, str(linked), begun, **options)
    else:
        encoder = retriever.as_trained(config.encoder, linked)
        rows, scores = evaluation.rank(context, encoder, str(linked), begun, **options)
        kept += evaluation.BEST
        after |= evaluation.best_scores(context, rows, scores)
    after |= evaluation.measure(context, rows)
    before = pq.read_table(context.store.path(task.payload["scores"]))
    sides = {"before": before, "after": after}
    table = pa.table(
        {"anchor_id": before["anchor_id"]}
        | {f"{name}_{side}": values[name] for name in kept for side, values in sides.items()}
    )
    publish("scores", ".parquet", lambda file: pq.write_table(table, file, compression="zstd"))
    compared = [compare(name, *(table[f"{name}_{side}"].to_numpy() for side in sides)).document() for name in METRICS]
    shared = asdict(overlap.measure(context))
    told = card.written(
        linked / CARD, Path(_base(context).path, CARD), context.config, context.manifest("triplets"), compared, shared
    ).encode()
    publish("card", ".md", partial(write_all, data=told), needed=len(told), aside=True)
    return Made(table.num_rows, {"compared": compared, "overlap": shared})


def _stats(context: Context, parts: list[Part]) -> dict[str, Any]:
    made = {part.kind: part for part in parts}
    model, evaluation = made["model"].meta, made["evaluation"].meta
    return {
        "rows": context.manifest("triplets").stats["rows"],
        "steps": model["steps"],
        "dimension": model["dimension"],
        "loss": model["loss"],
        "held_out_anchors": made["evaluation"].rows,
        **evaluation,
    }


def _remarks(stats: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    shared = stats["overlap"]
    for what, of in (("anchors", "anchors"), ("positives", "texts of positives")):
        if count := shared[f"{what}_trained_on"]:
            yield (
                logging.WARNING,
                f"{count:,} of {shared[what]:,} held-out {of} ({percent(count / shared[what])}) are also trained on:"
                " scores on them say less about new data",
            )


def _views(parts: Sequence[Part]) -> dict[str, Shown]:
    shown: dict[str, File] = {}
    for part in parts:
        if part.kind == "model":
            shown |= _model_files(part)
        elif part.kind == "evaluation":
            shown[CARD] = part.file("card")
    return {"model": shown}


def _libraries(config: Config) -> tuple[str, ...]:
    return (*encoders.libraries(config.encoder), "sentence-transformers", "accelerate")


STAGE = Stage(
    name="train",
    version=VERSION,
    inputs=("ingest", "held_out", "triplets"),
    config=_config,
    settings=_settings,
    sources=_sources,
    check=_check,
    needs=lambda *_: Needs(note="its first steps show how long it takes"),
    plan=_plan,
    run=_run,
    rounds=True,
    stats=_stats,
    remarks=_remarks,
    views=_views,
    libraries=_libraries,
    resources=lambda context: context.whole,  # nothing else runs at the same time
    devices=lambda config: devices.of_encoder(config)[:1],
    place=lambda _: "apart",
)
