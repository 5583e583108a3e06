"""Fine-tunes an encoder on rows with Sentence Transformers' trainer.

Guarantees, in addition to those of `trainer`: no text occurs twice in a batch; anchors and documents are cut and
prompted according to the encoder settings; the saved model is loaded again and checked to give the same vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from negpipe.config.encoder import Encoder
from negpipe.config.schema import Config
from negpipe.config.training import DISTILLING
from negpipe.encoders.backends import class_and_pooling
from negpipe.encoders.prompts import KINDS, TASKS, Kind, instructed, instruction
from negpipe.engine.devices import CPU
from negpipe.errors import ConfigError
from negpipe.train import trainer
from negpipe.train.trainer import Progress, Trained

_POOLINGS = {"last_token": "lasttoken"}  # Sentence Transformers' names
_PROBE = "a text to compare vectors by"


def train(
    config: Config,
    rows: Sequence[Path],
    base: str,
    guide: str,
    folder: Path,
    *,
    threads: int,
    device: str = CPU,
    progress: Progress,
) -> Trained:
    """Fine-tune a model.

    Args:
        config: with a section `train`; its encoder is trained.
        rows: Parquet files of the config's output format.
        base: folder of the model.
        guide: folder of the model that guides CachedGISTEmbedLoss.
        folder: the folder of checkpoints and unfinished work.
        threads: CPU threads.
        device: see `engine.devices`.
        progress: called at every step.

    Raises:
        ConfigError: the model has a smaller dimension than `train.matryoshka` asks for.
        InputError: a row has no score to learn, or the model does not load.
        TaskFailedError: loss or gradient is not finite.
    """
    from sentence_transformers import SentenceTransformerTrainer
    from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
    from sentence_transformers.sentence_transformer.training_args import BatchSamplers

    train, encoder = config.train, config.encoder
    assert train is not None
    device = trainer.begin(config, threads, device)
    model = load(encoder, base, device)
    width = int(model.get_embedding_dimension())
    if max(train.matryoshka, default=0) > width:
        raise ConfigError(f"train.matryoshka: vectors of {base} have dimension {width}: set no larger one")
    kinds: dict[str, Kind] = {name: "query" if name == "anchor" else "passage" for name in trainer.text_columns(config)}
    prompts = {kind: instructed(instruction(encoder, base, kind), [])[0] for kind in KINDS}
    model, log, resumed = trainer.fit(
        SentenceTransformerTrainer,
        config,
        model,
        _data(config, rows, kinds, base, folder),
        folder,
        device=device,
        progress=progress,
        loss=_loss(config, model, guide, device),
        data_collator=SentenceTransformerDataCollator(
            preprocess_fn=model.preprocess,
            router_mapping={name: TASKS[kind] for name, kind in kinds.items()},
            prompts={name: prompts[kind] for name, kind in kinds.items() if prompts[kind]},
            max_length={TASKS["query"]: encoder.query_max_length, TASKS["passage"]: encoder.passage_max_length},
        ),
        batch_sampler=BatchSamplers.NO_DUPLICATES,
    )
    for kind in KINDS:
        if prompts[kind]:
            model.prompts[TASKS[kind]] = prompts[kind]

    def vector(one: Any) -> Any:
        return one.encode([_PROBE], prompt="", show_progress_bar=False)

    saved = trainer.save(model, folder, lambda path: _plain(path, device, encoder.trust_remote_code), vector)
    return Trained(saved, log, width, resumed)


def _plain(path: str, device: str, trusted: bool) -> Any:
    """A model configured by its files only."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(path, device=device, local_files_only=True, trust_remote_code=trusted)


def load(encoder: Encoder, path: str, device: str) -> Any:
    """The model in Sentence Transformers, in float32, pooled according to the encoder settings.

    Raises:
        InputError: the folder does not load as a model.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData
    from sentence_transformers.sentence_transformer.modules import Pooling

    # No model file is looked up on the hub, and the card causes no requests.
    card = SentenceTransformerModelCardData(local_files_only=True, generate_widget_examples=False)
    options: dict[str, Any] = {"device": device, "trust_remote_code": encoder.trust_remote_code}
    try:
        model = SentenceTransformer(
            path, model_kwargs={"dtype": torch.float32}, local_files_only=True, model_card_data=card, **options
        )
    except Exception as error:  # loaders may raise anything
        raise trainer.unloadable(error, path) from error
    if encoder.backend == "flagembedding":
        _, pooling = class_and_pooling(encoder, path)
        pooled = Pooling(model[0].get_embedding_dimension(), _POOLINGS.get(pooling, pooling))
        model = SentenceTransformer(modules=[model[0], pooled], model_card_data=card, **options)
    if encoder.model and "://" not in encoder.model and not Path(encoder.model).exists():
        card.base_model = encoder.model
    return model


def as_trained(encoder: Encoder, folder: Path) -> Encoder:
    """The settings that run a trained model like its base.

    Args:
        encoder: the settings of the base.
        folder: the folder of the trained model, which specifies its pooling itself. Only dense vectors are trained and
            saved: models with a special FlagEmbedding class become ordinary encoders or decoders.
    """
    changed = {"model": str(folder), "revision": None, "model_class": None, "pooling": None}
    return encoder.model_copy(update=changed)


def _data(config: Config, rows: Sequence[Path], kinds: dict[str, Kind], base: str, folder: Path) -> Any:
    """The columns that the loss needs."""
    assert config.train is not None
    forms = {kind: instruction(config.encoder, base, kind) for kind in KINDS}
    labels = trainer.score_columns(config) if config.train.loss in DISTILLING else []

    def batches() -> Iterator[pa.Table]:
        for path in rows:
            first, file = 0, pq.ParquetFile(path)
            for batch in file.iter_batches(columns=[*kinds, *labels]):
                columns = {
                    name: pa.array(instructed(forms[kind], batch[name].to_pylist())[1], pa.large_string())
                    for name, kind in kinds.items()
                }
                if labels:
                    columns["label"] = trainer.scores(batch, path, first)
                first += batch.num_rows
                yield pa.table(columns)

    fields = [pa.field(name, pa.large_string()) for name in kinds]
    if labels:
        fields.append(pa.field("label", pa.list_(pa.float32())))
    return trainer.write_rows(folder, pa.schema(fields), batches())


def _loss(config: Config, model: Any, guide: str, device: str) -> Any:
    """The loss, with the similarity that negpipe's scores use."""
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
