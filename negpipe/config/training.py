"""The sections for training: what is trained, judged and compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from negpipe.config.section import Section

Loss = Literal[
    "MultipleNegativesRankingLoss",
    "CachedMultipleNegativesRankingLoss",
    "CachedGISTEmbedLoss",
    "MarginMSELoss",
    "DistillKLDivLoss",
    "BinaryCrossEntropyLoss",
    "LambdaLoss",
    "ListNetLoss",
]
DISTILLING: tuple[Loss, ...] = ("MarginMSELoss", "DistillKLDivLoss")
"""Losses that learn the scores of rows."""
TrainKind = Literal["retriever", "reranker"]
_TEXTS, _PAIRS, _LISTS = ("triplet", "n-tuple"), ("labeled-pair",), ("labeled-list",)
TAKES: dict[TrainKind, dict[Loss, tuple[str, ...]]] = {
    "retriever": {
        "MultipleNegativesRankingLoss": _TEXTS,
        "CachedMultipleNegativesRankingLoss": _TEXTS,
        "CachedGISTEmbedLoss": _TEXTS,
        "MarginMSELoss": _TEXTS,
        "DistillKLDivLoss": _TEXTS,
    },
    "reranker": {
        "BinaryCrossEntropyLoss": _PAIRS,
        "LambdaLoss": _LISTS,
        "ListNetLoss": _LISTS,
        "MarginMSELoss": _TEXTS,
    },
}
"""Losses of each kind of model, and the output formats that each accepts."""
_BY_KIND: dict[TrainKind, dict[str, Any]] = {
    "retriever": {"loss": "MultipleNegativesRankingLoss", "learning_rate": 2e-5},
    "reranker": {"loss": "LambdaLoss", "learning_rate": 1e-4},
}


def _by_kind(value: Any, known: ValidationInfo) -> Any:
    """A setting, or the default of the kind if it is null."""
    name, kind = known.field_name, known.data.get("kind")
    return _BY_KIND[kind][name] if value is None and kind and name else value


EVAL_SPLIT = "test"


class Split(Section):
    """Anchors of `data.split` held out for evaluation, for datasets without a split for it."""

    test: float = Field(0.1, gt=0, lt=1)
    """Required in train.split. Approximate share of the anchors of data.split to hold out, as groups are not divided;
    they are neither mined nor trained on."""
    by: str = Field("positive", min_length=1)
    """positive: anchors that share a text, their own or a positive's, are on the same side. A column of
    data.extra.corpus: also anchors whose positives have the same value in it."""
    seed: int = Field(42, ge=0)
    """Seed of the division, independent of the config's seed."""


class Train(Section):
    """Fine-tuning a model on the rows, and judging it."""

    kind: TrainKind = "retriever"
    """retriever: the encoder. reranker: a model that reads anchor and document together and orders the documents that
    the encoder finds."""
    base: str | None = None
    """Model to fine-tune, named like encoder.model; null: the encoder's model, with a new head for a reranker."""
    loss: Annotated[Loss, BeforeValidator(_by_kind)] = Field(None, validate_default=True)
    """A loss of Sentence Transformers. null: MultipleNegativesRankingLoss, or LambdaLoss for a reranker.
    BinaryCrossEntropyLoss requires output.format labeled-pair, LambdaLoss and ListNetLoss labeled-list, all others
    triplet or n-tuple; MarginMSELoss and DistillKLDivLoss learn the rows' scores."""
    rerank_depth: int = Field(50, ge=2, le=100)
    """Reranker: top documents of the encoder per anchor that it orders for evaluation."""
    negatives: bool = True
    """false: train without the rows' negatives, on in-batch negatives only, for comparison."""
    guide: str | None = None
    """CachedGISTEmbedLoss: model that judges negatives; null: the base before training."""
    epochs: float = Field(1, gt=0)
    """Passes over the rows."""
    steps: int | None = Field(None, ge=1)
    """Optimizer steps; null: from train.epochs."""
    batch_size: int = Field(32, ge=2)
    """Rows per batch; for a retriever, no text occurs twice in a batch."""
    mini_batch_size: int = Field(32, ge=1)
    """Cached losses: rows per forward pass. List losses: documents per forward pass."""
    gradient_accumulation: int = Field(1, ge=1)
    """Batches per optimizer step."""
    learning_rate: Annotated[float, BeforeValidator(_by_kind)] = Field(None, validate_default=True, gt=0)
    """Peak learning rate; decays linearly to 0. null: 2e-5, or 1e-4 for a reranker."""
    warmup: float = Field(0.1, ge=0)
    """Warmup steps; below 1, a share of all steps."""
    seed: int | None = Field(None, ge=0)
    """Seed of batches and dropout; null: seed."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the computation; weights stay in float32. bfloat16: for hardware that supports it."""
    matryoshka: tuple[int, ...] = ()
    """Further vector dimensions to train for, for example [256, 128, 64]."""
    checkpoint_steps: int = Field(500, ge=1)
    """Steps between checkpoints."""
    eval_split: str | None = None
    """Split of qrels or pair rows to judge the model on; null: test, or the test side of train.split."""
    split: Split | None = None
    license: str | None = None
    """License in the model card, such as apache-2.0; null: that of the base's card, if any."""

    @model_validator(mode="after")
    def _of_kind(self) -> Train:
        if self.matryoshka and self.kind == "reranker":
            raise ValueError("matryoshka: a reranker has no vectors: remove it")
        if not self.negatives and self.kind == "reranker":
            raise ValueError("negatives: a reranker learns from the rows' negatives only: set it to true")
        if min(self.matryoshka, default=1) < 1:
            raise ValueError("matryoshka: dimensions must be 1 or more")
        return self

    @model_validator(mode="after")
    def _one_judge(self) -> Train:
        if self.split is not None and self.eval_split is not None:
            raise ValueError(f"train.split and eval_split ('{self.eval_split}') are alternatives: remove one")
        return self

    @property
    def judge(self) -> tuple[str, str]:
        """A description of what the model is judged on, and the setting for it."""
        if self.split is not None:
            return "the test side of train.split", "train.split"
        return f"the split '{self.eval_split or EVAL_SPLIT}'", "train.eval_split"


ArmSet = Literal[
    "in-batch",
    "random",
    "peers",
    "default",
    "calibrated",
    "configured",
    "windows",
    "margins",
    "negatives",
    "batch_sizes",
    "losses",
]


_JUDGED = "which would judge it on different anchors than the rest"
_OF_THE_CELL = "which is set separately for every cell"
_NO_ARM = {
    **dict.fromkeys(("data.path", "data.queries", "data.qrels", "data.min_grade"), _JUDGED),
    **dict.fromkeys(("train.eval_split", "train.split"), _JUDGED),
    **dict.fromkeys(("run_dir", "store", "ablate", "output.report"), _OF_THE_CELL),
    **dict.fromkeys(("seed", "train.seed"), "which is set by ablate.seeds"),
}


def flat(tree: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Values by dotted key, "mining.range_min"."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        inner = isinstance(value, Mapping) and value
        found |= flat(value, f"{before}{name}.") if inner else {before + name: value}
    return found


class Ablate(Section):
    """Settings to compare by the models trained with them."""

    sets: tuple[ArmSet, ...] = ("in-batch", "random", "peers", "default")
    """Built-in arms. in-batch: no mined negatives. random: random negatives. peers: each mining.compat. default:
    negpipe's rules. calibrated: the setting recommended by calibrate. configured: the config unchanged. windows,
    margins, negatives, batch_sizes, losses: the config with several values of one setting."""
    arms: dict[str, dict[str, Any]] = Field({})
    """Further arms: names and the settings they change, such as {rank 10: {mining.range_min: 10}}."""
    seeds: tuple[int, ...] = Field((1, 2, 3), min_length=1)
    """Seeds to mine and train every arm with, as seed and train.seed."""

    @model_validator(mode="after")
    def _some(self) -> Ablate:
        if not self.sets and not self.arms:
            raise ValueError("sets and arms are both empty: add arms to compare")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: remove duplicates")
        for arm, changes in self.arms.items():
            for key in flat(changes):
                if why := next((why for name, why in _NO_ARM.items() if f"{key}.".startswith(f"{name}.")), None):
                    raise ValueError(f"arms: '{arm}' sets {key}, {why}")
        return self
