"""The sections that train: what is trained and judged, and what is compared."""

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
"""The losses that learn the scores of rows."""
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
"""The losses that a kind of model has, and the output formats that each takes."""
_BY_KIND: dict[TrainKind, dict[str, Any]] = {
    "retriever": {"loss": "MultipleNegativesRankingLoss", "learning_rate": 2e-5},
    "reranker": {"loss": "LambdaLoss", "learning_rate": 1e-4},
}


def _by_kind(value: Any, known: ValidationInfo) -> Any:
    """A setting that is null, as the kind has it."""
    name, kind = known.field_name, known.data.get("kind")
    return _BY_KIND[kind][name] if value is None and kind and name else value


EVAL_SPLIT = "test"


class Split(Section):
    """Anchors of `data.split` that are held out to judge by, for sets that have no split for it."""

    test: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="With a section train.split: the share of the anchors of data.split that are held out, about, as"
        " groups stay whole; they are mined from and trained on by nobody.",
    )
    by: str = Field(
        "positive",
        min_length=1,
        description="positive: anchors that share a text, their own or a positive's, are on one side. A column of"
        " data.extra.corpus: also those whose positives have the same value there.",
    )
    seed: int = Field(42, ge=0, description="Seed of the division, apart from seed: it is to stay where that changes.")


class Train(Section):
    """How a model is fine-tuned on the rows, and on what it is judged."""

    kind: TrainKind = Field(
        "retriever",
        description="retriever: the encoder. reranker: a model that reads anchor and document at once, and orders what"
        " the encoder finds.",
    )
    base: str | None = Field(
        None,
        description="Model to fine-tune, named as encoder.model is; null: the encoder's own model, to which a reranker"
        " adds a new head.",
    )
    loss: Annotated[Loss, BeforeValidator(_by_kind)] = Field(
        None,
        validate_default=True,
        description="A loss of Sentence Transformers. null: MultipleNegativesRankingLoss, of a reranker LambdaLoss."
        " BinaryCrossEntropyLoss takes output.format labeled-pair, LambdaLoss and ListNetLoss take labeled-list, all"
        " others triplet and n-tuple; MarginMSELoss and DistillKLDivLoss learn the rows' scores.",
    )
    rerank_depth: int = Field(
        50, ge=2, le=100, description="Reranker: the encoder's best documents of an anchor that it orders to be judged."
    )
    negatives: bool = Field(
        True,
        description="false: the rows' negatives are left out and those of the batch alone are learned from, to compare"
        " with.",
    )
    guide: str | None = Field(
        None, description="CachedGISTEmbedLoss: the model that judges negatives; null: the base, as it was."
    )
    epochs: float = Field(1, gt=0, description="Passes over the rows.")
    steps: int | None = Field(None, ge=1, description="Optimizer steps; null: as many as train.epochs takes.")
    batch_size: int = Field(32, ge=2, description="Rows a batch; of a retriever, no text is twice in one.")
    mini_batch_size: int = Field(
        32, ge=1, description="Cached losses: rows a forward pass. Losses of lists: documents a forward pass."
    )
    gradient_accumulation: int = Field(1, ge=1, description="Batches an optimizer step.")
    learning_rate: Annotated[float, BeforeValidator(_by_kind)] = Field(
        None,
        validate_default=True,
        gt=0,
        description="Highest learning rate; it falls linearly to 0. null: 2e-5, of a reranker 1e-4.",
    )
    warmup: float = Field(0.1, ge=0, description="Steps until it is reached; below 1, a share of all steps.")
    seed: int | None = Field(None, ge=0, description="Seed of batches and dropout; null: seed.")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="What the model computes in; weights are kept in float32. bfloat16: for hardware with it.",
    )
    matryoshka: tuple[int, ...] = Field(
        (), description="Widths at which vectors are to be of use too, for example [256, 128, 64]."
    )
    checkpoint_steps: int = Field(500, ge=1, description="Steps from one checkpoint to the next.")
    eval_split: str | None = Field(
        None,
        description="Qrels, or split of pair rows, on which the model is judged; null: test, or the test side of"
        " train.split.",
    )
    split: Split | None = None
    license: str | None = Field(
        None,
        description="Licence that the model's card states, such as apache-2.0; null: the base's, where its own card"
        " states one.",
    )

    @model_validator(mode="after")
    def _of_kind(self) -> Train:
        if self.matryoshka and self.kind == "reranker":
            raise ValueError("matryoshka: a reranker has no vectors: leave it empty")
        if not self.negatives and self.kind == "reranker":
            raise ValueError("negatives: a reranker learns from the rows' negatives alone: leave it true")
        if min(self.matryoshka, default=1) < 1:
            raise ValueError("matryoshka: a width is 1 or more")
        return self

    @model_validator(mode="after")
    def _one_judge(self) -> Train:
        if self.split is not None and self.eval_split is not None:
            raise ValueError(
                f"train.split and eval_split ('{self.eval_split}') both say what the model is judged on: remove one"
            )
        return self

    @property
    def judge(self) -> tuple[str, str]:
        """What the model is judged on, for people, and the setting that says so."""
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


_JUDGED = "which would judge it on other anchors than the rest"
_OF_THE_CELL = "which every cell has of its own"
_NO_ARM = {
    **dict.fromkeys(("data.path", "data.queries", "data.qrels", "data.min_grade"), _JUDGED),
    **dict.fromkeys(("train.eval_split", "train.split"), _JUDGED),
    **dict.fromkeys(("run_dir", "store", "ablate", "output.report"), _OF_THE_CELL),
    **dict.fromkeys(("seed", "train.seed"), "which ablate.seeds are for"),
}


def flat(tree: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Values by dotted key, "mining.range_min"."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        inner = isinstance(value, Mapping) and value
        found |= flat(value, f"{before}{name}.") if inner else {before + name: value}
    return found


class Ablate(Section):
    """Which settings are compared by the models they make."""

    sets: tuple[ArmSet, ...] = Field(
        ("in-batch", "random", "peers", "default"),
        description="Arms that come with negpipe. in-batch: no mined negatives. random: random ones. peers: each"
        " mining.compat. default: negpipe's own rules. calibrated: what calibrate recommends. configured: the config as"
        " it is. windows, margins, negatives, batch_sizes, losses: the config with several values of one setting.",
    )
    arms: dict[str, dict[str, Any]] = Field(
        {},
        description="More arms: a name, and the settings that it changes, such as {rank 10: {mining.range_min: 10}}.",
    )
    seeds: tuple[int, ...] = Field(
        (1, 2, 3), min_length=1, description="Every arm is mined and trained with each, as seed and train.seed."
    )

    @model_validator(mode="after")
    def _some(self) -> Ablate:
        if not self.sets and not self.arms:
            raise ValueError("sets and arms are both empty: name what is to be compared")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one stands there twice")
        for arm, changes in self.arms.items():
            for key in flat(changes):
                if why := next((why for name, why in _NO_ARM.items() if f"{key}.".startswith(f"{name}.")), None):
                    raise ValueError(f"arms: '{arm}' sets {key}, {why}")
        return self
