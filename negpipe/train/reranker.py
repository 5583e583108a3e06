"""Trains a cross-encoder on rows with Sentence Transformers' trainer, and computes its scores.

Guarantees, in addition to those of `trainer`: anchor and document are read together, unchanged (the encoder's
instructions are not prepended), cut to as many tokens as the encoder reads of both, the longer one first; a base
without a head, such as an encoder, gets a new one, determined by the seed; the saved model is loaded again and checked
to give the same score as before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from negpipe.config.encoder import Encoder
from negpipe.config.schema import Config
from negpipe.config.training import DISTILLING
from negpipe.engine import devices
from negpipe.train import trainer
from negpipe.train.trainer import Progress, Trained

_PROBE = (["an anchor"], ["a document to compare scores by"], 1)


def train(
    config: Config,
    rows: Sequence[Path],
    base: str,
    folder: Path,
    *,
    threads: int,
    device: str = devices.CPU,
    progress: Progress,
) -> Trained:
    """Train a reranker.

    Args:
        config: with a section `train`.
        rows: Parquet files of the config's output format.
        base: folder of the model: a cross-encoder, or any transformer, including encoders.
        folder: the folder of checkpoints and unfinished work.
        threads: CPU threads.
        device: see `engine.devices`.
        progress: called at every step.

    Raises:
        InputError: a row has no score to learn, or the model does not load.
        TaskFailedError: loss or gradient is not finite.
    """
    from sentence_transformers import CrossEncoderTrainer
    from sentence_transformers.cross_encoder import losses

    train, encoder = config.train, config.encoder
    assert train is not None
    data = _data(config, rows, folder)
    device = trainer.begin(config, threads, device)
    model = load(encoder, base, threads, device)
    lists = {} if train.loss in (*DISTILLING, "BinaryCrossEntropyLoss") else {"mini_batch_size": train.mini_batch_size}
    model, log, resumed = trainer.fit(
        CrossEncoderTrainer,
        config,
        model,
        data,
        folder,
        device=device,
        progress=progress,
        loss=getattr(losses, train.loss)(model, **lists),
    )
    again = partial(load, encoder, threads=threads, device=device)
    saved = trainer.save(model, folder, again, lambda one: score(one, *_PROBE))
    return Trained(saved, log, model.num_labels, resumed)


def load(encoder: Encoder, path: str, threads: int, device: str = devices.CPU) -> Any:
    """The model as a cross-encoder with one score, in float32, with the encoder's maximum length of both texts.

    Raises:
        InputError: the folder does not load as a model.
    """
    import torch
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder.model_card import CrossEncoderModelCardData

    torch.set_num_threads(threads)
    try:
        model = CrossEncoder(
            path,
            num_labels=1,
            device=devices.own(device),
            trust_remote_code=encoder.trust_remote_code,
            model_kwargs={"dtype": torch.float32},
            local_files_only=True,
            model_card_data=CrossEncoderModelCardData(local_files_only=True, generate_widget_examples=False),
        )
    except Exception as error:  # loaders may raise anything
        raise trainer.unloadable(error, path) from error
    length = encoder.query_max_length + encoder.passage_max_length
    model.max_seq_length = min(length, model.max_seq_length or length)
    return model


def score(model: Any, anchors: Sequence[str], documents: Sequence[str], batch_size: int) -> npt.NDArray[np.float32]:
    """(n,) logits of pairs by a model from `load`: higher is better."""
    import torch

    pairs = list(zip(anchors, documents, strict=True))
    scores: npt.NDArray[np.float32] = model.predict(
        pairs, batch_size=batch_size, show_progress_bar=False, activation_fn=torch.nn.Identity()
    )
    return scores


def _data(config: Config, rows: Sequence[Path], folder: Path) -> Any:
    """The columns that the loss needs: texts, and scores or labels as `label`."""
    assert config.train is not None
    distilling, lists = config.train.loss in DISTILLING, config.output.format == "labeled-list"
    texts = trainer.text_columns(config) if distilling else ["anchor", "positive"]
    labels = trainer.score_columns(config) if distilling else ["labels" if lists else "label"]
    kinds = {name: pa.large_string() for name in texts} | {"label": pa.float32()}
    kinds |= {name: pa.list_(kinds[name]) for name in (["positive", "label"] if lists else ["label"] * distilling)}
    schema = pa.schema(kinds)

    def tables() -> Iterator[pa.Table]:
        for path in rows:
            first, file = 0, pq.ParquetFile(path)
            for batch in file.iter_batches(columns=[*texts, *labels]):
                label = trainer.scores(batch, path, first) if distilling else batch[labels[0]]
                columns = [*(batch[name] for name in texts), label]
                first += batch.num_rows
                yield pa.table([c.cast(field.type) for c, field in zip(columns, schema, strict=True)], schema=schema)

    return trainer.write_rows(folder, schema, tables())
