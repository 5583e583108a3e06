"""Fine-tuning an encoder on rows with Sentence Transformers' trainer.

Guarantees: no text is twice in a batch; anchors and documents are cut and prompted as the encoder's settings say; a run
that was killed goes on from its last whole checkpoint, on a CPU to the same weights, bit for bit, as one that was not
(on a GPU as far as its kernels repeat themselves); a loss or gradient that is not finite ends it before a checkpoint is
written of it; the saved model is loaded again, and gives the vector it gave before.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from negpipe import encoders
from negpipe.config.schema import DISTILLING, Config, Encoder, Train
from negpipe.encoders.backends import class_and_pooling, instructed
from negpipe.encoders.prompts import KINDS, TASKS, Kind, instruction
from negpipe.errors import ConfigError, DamagedError, InputError, TaskFailedError
from negpipe.store.files import remove, sync_folder, sync_tree

Progress = Callable[[int, str], None]
"""Called with rows trained on since the last call, and a note."""

CHECKPOINTS = 3
"""That there may be at a time: two are kept while one is written."""
_WHOLE = "whole"  # a file in a checkpoint that is on the disk to its last byte
_POOLINGS = {"last_token": "lasttoken"}  # as Sentence Transformers calls them
_PROBE = "a text to compare vectors by"
_LOGGED = {"loss": "loss", "learning_rate": "learning_rate", "grad_norm": "gradient_norm"}


@dataclass(frozen=True)
class Trained:
    """A trained model.

    Attributes:
        folder: the saved model, as Sentence Transformers loads it.
        log: a row a step: step, loss, learning_rate, gradient_norm.
        width: numbers of its vectors.
        resumed: the step from which this process went on; 0: from the start.
    """

    folder: Path
    log: pa.Table
    width: int
    resumed: int


def train(
    config: Config, rows: Sequence[Path], base: str, guide: str, folder: Path, *, threads: int, progress: Progress
) -> Trained:
    """Fine-tune a model.

    Args:
        config: with a section `train`; its encoder is the one that is trained.
        rows: Parquet files of the config's output format.
        base: folder of the model.
        guide: folder of the model that guides CachedGISTEmbedLoss.
        folder: where checkpoints are, and what a run before has begun.
        threads: of the CPU.
        progress: told of every step.

    Raises:
        ConfigError: the model is narrower than `train.matryoshka` asks for.
        InputError: a row has no score to learn, or the model does not load.
        TaskFailedError: loss or gradient are not finite.
    """
    import torch
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
    from sentence_transformers.sentence_transformer.training_args import BatchSamplers
    from transformers import PrinterCallback, set_seed

    train, encoder = config.train, config.encoder
    assert train is not None
    torch.set_num_threads(threads)
    device = encoders.provenance(encoder)["device"]
    seed = config.seed if train.seed is None else train.seed
    set_seed(seed)
    model = load(encoder, base, device)
    width = int(model.get_embedding_dimension())
    if max(train.matryoshka, default=0) > width:
        raise ConfigError(f"train.matryoshka: vectors of {base} have {width} numbers: ask for no more")
    texts = _text_columns(config)
    kinds: dict[str, Kind] = {name: "query" if name == "anchor" else "passage" for name in texts}
    prompts = {kind: instructed(instruction(encoder, base, kind), [])[0] for kind in KINDS}
    data = Dataset.from_file(str(_data(config, rows, kinds, base, folder)))
    checkpoint = _last_checkpoint(folder)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=train.epochs,
        max_steps=train.steps or -1,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.gradient_accumulation,
        learning_rate=train.learning_rate,
        warmup_steps=train.warmup,
        bf16=train.precision == "bfloat16",
        seed=seed,
        data_seed=seed,
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=train.checkpoint_steps,
        save_total_limit=CHECKPOINTS - 1,
        report_to="none",
        disable_tqdm=True,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # the trainer would share batches among all GPUs that it sees
    watch = _watcher(folder, train, progress)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        loss=_loss(config, model, guide, device),
        data_collator=SentenceTransformerDataCollator(
            preprocess_fn=model.preprocess,
            router_mapping={name: TASKS[kind] for name, kind in kinds.items()},
            prompts={name: prompts[kind] for name, kind in kinds.items() if prompts[kind]},
            max_length={TASKS["query"]: encoder.query_max_length, TASKS["passage"]: encoder.passage_max_length},
        ),
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    # In bfloat16, the trainer has put a wrapper around the model's forward.
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    for kind in KINDS:
        if prompts[kind]:
            model.prompts[TASKS[kind]] = prompts[kind]
    saved = folder / "model"
    remove(saved)
    model.save_pretrained(str(saved))
    _check_saved(model, saved, width, encoder, device)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    log = pa.table(
        {"step": pa.array([entry["step"] for entry in steps], pa.int64())}
        | {name: pa.array([entry.get(key) for entry in steps], pa.float64()) for key, name in _LOGGED.items()}
    )
    return Trained(saved, log, width, int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0)


def load(encoder: Encoder, path: str, device: str) -> Any:
    """The model as Sentence Transformers has it, in float32, pooled as the encoder's settings say.

    Raises:
        InputError: the folder does not load as a model.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData
    from sentence_transformers.sentence_transformer.modules import Pooling

    # No file of the model is looked for on the hub, and no request is made for the sake of the card.
    card = SentenceTransformerModelCardData(local_files_only=True, generate_widget_examples=False)
    options: dict[str, Any] = {"device": device, "trust_remote_code": encoder.trust_remote_code}
    try:
        model = SentenceTransformer(
            path, model_kwargs={"dtype": torch.float32}, local_files_only=True, model_card_data=card, **options
        )
    except Exception as error:  # loaders raise whatever the files make them raise
        raise InputError(
            f"the model does not load: {type(error).__name__}: {error}", file=path, remedy="Fetch the model again"
        ) from error
    if encoder.backend == "flagembedding":
        _, pooling = class_and_pooling(encoder, path)
        pooled = Pooling(model[0].get_embedding_dimension(), _POOLINGS.get(pooling, pooling))
        model = SentenceTransformer(modules=[model[0], pooled], model_card_data=card, **options)
    if encoder.model and "://" not in encoder.model and not Path(encoder.model).exists():
        card.base_model = encoder.model
    return model


def as_trained(encoder: Encoder, folder: Path) -> Encoder:
    """The settings that run a trained model as its base was run.

    Args:
        encoder: the settings of the base.
        folder: of the trained model, which names its pooling itself. Only dense vectors are trained, and only they are
            saved: what FlagEmbedding had another class for is an ordinary encoder or decoder from then on.
    """
    changed = {"model": str(folder), "revision": None, "model_class": None, "pooling": None}
    return encoder.model_copy(update=changed)


def _text_columns(config: Config) -> list[str]:
    assert config.train is not None
    if not config.train.negatives:
        return ["anchor", "positive"]
    if config.output.format == "triplet":
        return ["anchor", "positive", "negative"]
    return ["anchor", "positive", *(f"negative_{number}" for number in range(1, config.mining.wanted + 1))]


def _data(config: Config, rows: Sequence[Path], kinds: dict[str, Kind], base: str, folder: Path) -> Path:
    """Write what the loss takes of the rows as an Arrow stream, which is then read from disk, a row group at a time."""
    assert config.train is not None
    forms = {kind: instruction(config.encoder, base, kind) for kind in KINDS}
    scores = {"triplet": ["positive_score", "negative_score"], "n-tuple": ["scores"]}[config.output.format]
    labels = scores if config.train.loss in DISTILLING else []

    def batches() -> Iterator[pa.Table]:
        for path in rows:
            first, file = 0, pq.ParquetFile(path)
            for batch in file.iter_batches(columns=[*kinds, *labels]):
                columns = {
                    name: pa.array(instructed(forms[kind], batch[name].to_pylist())[1], pa.large_string())
                    for name, kind in kinds.items()
                }
                if labels:
                    columns["label"] = _labels(batch, path, first)
                first += batch.num_rows
                yield pa.table(columns)

    fields = [pa.field(name, pa.large_string()) for name in kinds]
    if labels:
        fields.append(pa.field("label", pa.list_(pa.float32())))
    path = folder / "rows.arrow"
    with pa.ipc.new_stream(str(path), pa.schema(fields)) as stream:
        for table in batches():
            stream.write_table(table)
    return path


def _labels(batch: pa.RecordBatch, path: Path, first: int) -> pa.Array:
    """(n, 1 + negatives) scores of positive and negatives."""
    if "scores" in batch.schema.names:
        values = batch["scores"].to_pylist()
    else:
        values = [
            list(pair) for pair in zip(*(batch[name].to_pylist() for name in batch.schema.names[-2:]), strict=True)
        ]
    for row, own in enumerate(values):
        if any(score is None or not np.isfinite(score) for score in own):
            raise InputError(
                "a document has no score to learn",
                file=str(path),
                row=first + row,
                field="scores",
                remedy="Mine without random negatives, or take a loss that needs no scores",
            )
    return pa.array(values, pa.list_(pa.float32()))


def _loss(config: Config, model: Any, guide: str, device: str) -> Any:
    """The loss, by the similarity that negpipe's scores are."""
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.util import cos_sim, dot_score, pairwise_cos_sim, pairwise_dot_score

    train, cosines = config.train, config.encoder.normalize
    assert train is not None
    kind = getattr(losses, train.loss)
    if train.loss in DISTILLING:
        made = kind(model, similarity_fct=pairwise_cos_sim if cosines else pairwise_dot_score)
    elif train.loss == "CachedGISTEmbedLoss":
        judge = (
            config.encoder
            if train.guide is None
            else config.encoder.model_copy(update={"backend": "sentence-transformers", "model": train.guide})
        )
        made = kind(model, load(judge, guide, device), mini_batch_size=train.mini_batch_size)
    else:
        own = {"mini_batch_size": train.mini_batch_size} if train.loss.startswith("Cached") else {}
        similarity = {} if cosines else {"scale": 1.0, "similarity_fct": dot_score}
        made = kind(model, **({"similarity_fct": cos_sim} | similarity | own))
    if train.matryoshka:
        width = int(model.get_embedding_dimension())
        made = losses.MatryoshkaLoss(model, made, sorted({width, *train.matryoshka}, reverse=True))
    return made


def _last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint; those that a kill cut short are deleted."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in found:
        if not (path / _WHOLE).exists():
            shutil.rmtree(path)
    return next((path for path in reversed(found) if path.is_dir()), None)


def _watcher(folder: Path, train: Train, progress: Progress) -> Any:
    from transformers import TrainerCallback

    rows = train.batch_size * train.gradient_accumulation  # a step

    class Watcher(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
        """Tells of progress, ends what went wrong, and says which checkpoints are whole."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress(state.global_step * rows, "")

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            wrong = {name: logs[key] for key, name in _LOGGED.items() if key in logs and not np.isfinite(logs[key])}
            for name, value in wrong.items():
                raise TaskFailedError(
                    f"train: the {name.replace('_', ' ')} is {value} at step {state.global_step:,} of"
                    f" {state.max_steps:,}; the last good checkpoint is {_last_checkpoint(folder) or 'the base model'}."
                    f" Lower train.learning_rate ({train.learning_rate:g}), raise train.warmup ({train.warmup:g}), or"
                    " set train.precision: float32"
                )
            if "loss" in logs:
                note = f"step {state.global_step:,} of {state.max_steps:,}, loss {logs['loss']:.4f}"
                progress(rows, note)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            place = folder / f"checkpoint-{state.global_step}"
            sync_tree(place)
            (place / _WHOLE).touch()
            sync_folder(place)

    return Watcher()


def _check_saved(model: Any, saved: Path, width: int, encoder: Encoder, device: str) -> None:
    """The saved model is the one that was trained.

    Raises:
        DamagedError: it has other vectors.
    """
    from sentence_transformers import SentenceTransformer

    again = SentenceTransformer(
        str(saved), device=device, local_files_only=True, trust_remote_code=encoder.trust_remote_code
    )
    vectors = [one.encode([_PROBE], prompt="", show_progress_bar=False) for one in (model.eval(), again)]
    if (
        vectors[1].shape != (1, width)
        or not np.allclose(vectors[0], vectors[1], 1e-4, 1e-5)
        or not np.isfinite(vectors).all()
    ):
        raise DamagedError(f"{saved}: the saved model gives other vectors than the trained one: run the command again")
