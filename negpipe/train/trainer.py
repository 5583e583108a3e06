"""Shared by all kinds of models: Sentence Transformers' trainer, its arguments and its checkpoints.

Guarantees: a killed run resumes from its last complete checkpoint; on a CPU, it reaches the same weights, bit for bit,
as an uninterrupted run (on a GPU as far as its kernels are deterministic); a loss or gradient that is not finite stops
the run before a checkpoint of it is written.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from negpipe import encoders
from negpipe.config.schema import Config
from negpipe.config.training import Train
from negpipe.engine import devices
from negpipe.errors import DamagedError, InputError, TaskFailedError
from negpipe.store.files import remove, sync_folder, sync_tree

Progress = Callable[[int, str], None]
"""Called with rows trained on since the last call, and a note."""

CHECKPOINTS = 3
"""Maximum number at a time: two are kept while one is written."""
CARD = "README.md"
"""The card's file name in a saved model's folder."""
_WHOLE = "whole"  # a file in a checkpoint that is completely on the disk
_LOGGED = {"loss": "loss", "learning_rate": "learning_rate", "grad_norm": "gradient_norm"}


@dataclass(frozen=True)
class Trained:
    """A trained model.

    Attributes:
        folder: the saved model, as Sentence Transformers loads it.
        log: one row per step: step, loss, learning_rate, gradient_norm.
        width: dimension of its output.
        resumed: the step from which this process resumed; 0: from the start.
    """

    folder: Path
    log: pa.Table
    width: int
    resumed: int


def begin(config: Config, threads: int, device: str) -> str:
    """Seed every generator and set torch's threads before a model is loaded. Returns torch's name of the device.

    Raises:
        ConfigError: the device does not support `train.precision`.
    """
    import torch
    from transformers import set_seed

    torch.set_num_threads(threads)
    set_seed(_seed(config))
    device = devices.own(device)
    assert config.train is not None
    encoders.check_precision(config.train.precision, device, "train.precision")
    return device


def text_columns(config: Config) -> list[str]:
    """Columns of anchor, positive and negatives, for triplets and n-tuples."""
    assert config.train is not None
    if not config.train.negatives:
        return ["anchor", "positive"]
    if config.output.format == "triplet":
        return ["anchor", "positive", "negative"]
    return ["anchor", "positive", *(f"negative_{number}" for number in range(1, config.mining.wanted + 1))]


def score_columns(config: Config) -> list[str]:
    """Columns of the scores of positive and negatives, for triplets and n-tuples."""
    return ["scores"] if config.output.format == "n-tuple" else ["positive_score", "negative_score"]


def scores(batch: pa.RecordBatch, path: Path, first: int) -> pa.Array:
    """(n, 1 + negatives) scores of positive and negatives.

    Raises:
        InputError: a score is missing.
    """
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
                remedy="Mine without random negatives, or use a loss that needs no scores",
            )
    return pa.array(values, pa.list_(pa.float32()))


def write_rows(folder: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> Any:
    """Write rows as an Arrow stream, which the trainer then reads from disk, a row group at a time."""
    from datasets import Dataset

    path = folder / "rows.arrow"
    with pa.ipc.new_stream(str(path), schema) as stream:
        for table in tables:
            stream.write_table(table)
    return Dataset.from_file(str(path))


def fit(
    kind: Any,
    config: Config,
    model: Any,
    data: Any,
    folder: Path,
    *,
    device: str,
    progress: Progress,
    loss: Any,
    data_collator: Any = None,
    **arguments: Any,
) -> tuple[Any, pa.Table, int]:
    """Train, resuming from the last checkpoint if there is one.

    Args:
        kind: the trainer's class.
        config: with a section `train`.
        model: modified in place.
        data: rows, from `write_rows`.
        folder: the folder of checkpoints.
        device: from `begin`.
        progress: called at every step.
        loss: a loss of Sentence Transformers.
        data_collator: None: the trainer's default.
        arguments: in addition to those common to all kinds.

    Returns:
        the model, its log, and the step it resumed from, see `Trained`.

    Raises:
        TaskFailedError: loss or gradient is not finite.
    """
    from transformers import PrinterCallback

    train, seed = config.train, _seed(config)
    assert train is not None
    checkpoint = _last_checkpoint(folder)
    args = kind.training_args_class(
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
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=train.checkpoint_steps,
        save_total_limit=CHECKPOINTS - 1,
        report_to="none",
        disable_tqdm=True,
        **arguments,
    )
    trainer = kind(
        model=model,
        args=args,
        train_dataset=data,
        loss=loss,
        data_collator=data_collator,
        callbacks=[_watcher(folder, train, progress)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    # In bfloat16, the trainer wraps the model's forward.
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    log = pa.table(
        {"step": pa.array([entry["step"] for entry in steps], pa.int64())}
        | {name: pa.array([entry.get(key) for entry in steps], pa.float64()) for key, name in _LOGGED.items()}
    )
    return model, log, int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def save(model: Any, folder: Path, again: Callable[[str], Any], give: Callable[[Any], npt.NDArray[Any]]) -> Path:
    """Save a model, and check that it is the trained one when loaded again.

    Args:
        model: with `save_pretrained`.
        folder: the parent of the model's folder.
        again: loads it.
        give: computes a model's output for an input.

    Raises:
        DamagedError: the loaded model gives other outputs.
        TaskFailedError: the library could not write the model's card.
    """
    saved = folder / "model"
    remove(saved)
    model.save_pretrained(str(saved))
    if not (saved / CARD).is_file():  # the library logs the problem and continues
        raise TaskFailedError(f"{saved}: the model card was not written, see the worker's log: run the command again")
    ours, theirs = (give(one) for one in (model.eval(), again(str(saved))))
    if ours.shape != theirs.shape or not np.allclose(ours, theirs, 1e-4, 1e-5) or not np.isfinite(ours).all():
        raise DamagedError(f"{saved}: the saved model gives other outputs than the trained one: run the command again")
    return saved


def unloadable(error: Exception, path: str) -> InputError:
    """The error for a folder that no library loads."""
    return InputError(
        f"the model does not load: {type(error).__name__}: {error}", file=path, remedy="Download the model again"
    )


def _seed(config: Config) -> int:
    assert config.train is not None
    return config.seed if config.train.seed is None else config.train.seed


def _last_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint; incomplete ones are deleted."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in found:
        if not (path / _WHOLE).exists():
            shutil.rmtree(path)
    return next((path for path in reversed(found) if path.is_dir()), None)


def _watcher(folder: Path, train: Train, progress: Progress) -> Any:
    from transformers import TrainerCallback

    rows = train.batch_size * train.gradient_accumulation  # a step

    class Watcher(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
        """Reports progress, stops failed runs, and marks complete checkpoints."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress(state.global_step * rows, f"training, step {state.global_step:,} of {state.max_steps:,}")

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
                note = f"training, step {state.global_step:,} of {state.max_steps:,}, loss {logs['loss']:.4f}"
                progress(rows, note)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            place = folder / f"checkpoint-{state.global_step}"
            sync_tree(place)
            (place / _WHOLE).touch()
            sync_folder(place)

    return Watcher()
