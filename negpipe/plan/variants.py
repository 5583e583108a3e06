"""Other ways to compute the same model on this machine: their speed, and the agreement of their results.

Measured on real texts. The choice changes vectors, so it is only suggested, never applied.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from negpipe import encoders
from negpipe.config.encoder import BATCH_SIZE, PRECISIONS, Encoder
from negpipe.data.arrays import Floats
from negpipe.encoders.timing import Timed, time_models
from negpipe.engine import devices
from negpipe.engine.budget import Budget
from negpipe.errors import NegpipeError
from negpipe.plan.sample import Outcome

logger = logging.getLogger(__name__)


NEIGHBOURS = 10
REFERENCE: Mapping[str, Any] = {"runtime": "torch", "precision": "float32"}
"""The reference for the others."""
BATCH_TOKENS = 4096
"""`batch_tokens` of the others on a CPU: measured to be the fastest there."""
WORTH_TIMING = 600
"""Seconds of encoding from which another way, which is recommended if it saves a tenth, saves a minute."""


_Way = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Variant:
    """One way.

    Attributes:
        settings: keys of the section `encoder`.
        configured: whether this is the configured way.
        speed: texts per second of one process.
        agreement: share of each text's 10 nearest other texts that float32 finds too; None: too few texts.
        texts: number of texts it was measured on.
        dimension: of the vectors.
        compared: anchors and documents used for the following, the same for all ways.
        negatives: share of the negatives mined from float32's vectors that are mined from these too; None: unknown.
        ndcg: nDCG@10 of the anchors' positives; None without anchors.
    """

    settings: Mapping[str, Any]
    configured: bool
    speed: float
    agreement: float | None
    texts: int
    dimension: int
    compared: tuple[int, int] = (0, 0)
    negatives: float | None = None
    ndcg: float | None = None


def measured(
    encoder: Encoder,
    path: str,
    texts: Sequence[str],
    budget: Budget,
    anchors: Sequence[tuple[str, int]] = (),
    outcome: Callable[[Floats, Floats], Outcome] | None = None,
    count: float = np.inf,
) -> list[Variant]:
    """The configured way first, then float32 and those for which this machine has units; on a CPU, if the config does
    not set `batch_tokens`, with it. Only the configured way if it encodes everything in `WORTH_TIMING`.

    Args:
        encoder: the settings.
        path: the model's folder.
        texts: a sample of documents; as many are encoded as possible within some seconds.
        budget: threads and the device of a process.
        anchors: texts of anchors, and how many documents contain their positives.
        outcome: computes the outcome of (n, d) vectors of the first documents and (m, d) of the first anchors.
        count: number of texts that a process will encode.

    Raises:
        NegpipeError: the model does not load or encode as configured.
    """
    own = {name: value for name in (*REFERENCE, "batch_tokens", "attention") if (value := getattr(encoder, name))}
    ways = [own, *_others(encoder, own, budget.device)]
    settings = [
        {"attention": None, **way, **({"batch_size": BATCH_SIZE} if "batch_tokens" in way else {})} for way in ways
    ]
    timed: dict[_Way, Timed] = {}
    models = [encoder.model_copy(update=one) for one in settings]
    with closing(time_models(models, path, texts, budget, anchors)) as answers:
        for way in ways:
            first = "" if way["runtime"] == "torch" else ", after exporting the model if it never was"
            logger.info("plan: timing the encoder with %s, for some seconds%s", _shown(way), first)
            answer = next(answers)
            if not isinstance(answer, NegpipeError):
                timed[tuple(way.items())] = answer
                speed = len(answer.vectors) / answer.seconds
                logger.info("plan: %s: %.0f texts/s", _shown(way), speed)
                if way is own and count / speed < WORTH_TIMING:
                    break
            elif way is own:
                raise answer
            else:  # a model may refuse what the machine supports
                logger.warning("plan: %s is not timed: %s", _shown(way), answer)
    reference = next((way for way in timed if REFERENCE.items() <= {*way}), None)
    shared = min(len(one.anchors) for one in timed.values()), min(len(one.vectors) for one in timed.values())
    outcomes: dict[_Way, Outcome] = {}
    if outcome and shared[0] and len(timed) > 1:
        outcomes = {way: outcome(one.vectors[: shared[1]], one.anchors[: shared[0]]) for way, one in timed.items()}
    return [
        Variant(
            dict(way),
            dict(way) == own,
            len(one.vectors) / one.seconds,
            None if reference is None else agreement(one.vectors, timed[reference].vectors),
            len(one.vectors),
            one.vectors.shape[1],
            shared,
            _share(outcomes, way, reference),
            outcomes[way].ndcg if way in outcomes else None,
        )
        for way, one in timed.items()
    ]


def _share(outcomes: Mapping[_Way, Outcome], way: _Way, reference: _Way | None) -> float | None:
    """Share of the reference's negatives that this way has too."""
    if reference is None or reference not in outcomes:
        return None
    usual, own = outcomes[reference].negatives, outcomes[way].negatives
    return len(usual & own) / len(usual) if usual and own is not None else None


def agreement(some: Floats, others: Floats) -> float | None:
    """Share of each vector's 10 nearest by dot product, excluding itself, that are the same in both.

    Args:
        some: (n, d) vectors.
        others: (m, d) of the same texts; the common ones are compared.

    Returns:
        0 to 1; None if there are not many more than 10 texts.
    """
    count = min(len(some), len(others))
    if count <= 2 * NEIGHBOURS:
        return None
    nearest = []
    for vectors in (some[:count], others[:count]):
        scores = vectors @ vectors.T
        np.fill_diagonal(scores, -np.inf)
        nearest.append(np.argpartition(-scores, NEIGHBOURS, axis=1)[:, :NEIGHBOURS])
    same = (nearest[0][:, :, None] == nearest[1][:, None, :]).any(axis=2)
    return float(same.mean())


def _others(encoder: Encoder, own: Mapping[str, Any], device: str) -> Iterator[dict[str, Any]]:
    on_cpu = not devices.is_gpu(device)
    tokens = encoder.batch_tokens
    if tokens is None and on_cpu:
        tokens = max(BATCH_TOKENS, encoder.query_max_length, encoder.passage_max_length)
    exported = encoder.backend == "sentence-transformers" and on_cpu
    for runtime in filter(encoders.is_installed, PRECISIONS if exported else ("torch",)):
        for precision in PRECISIONS[runtime]:
            settings = {"runtime": runtime, "precision": precision} | ({"batch_tokens": tokens} if tokens else {})
            packed = settings | {"attention": "flash_attention_2"}
            may_pack = not on_cpu and encoder.backend == "sentence-transformers" and precision != "float32"
            ways = [settings, *([packed] if may_pack and encoders.packs("flash_attention_2") else [])]
            yield from (way for way in ways if way != own and encoders.has_units(precision, device))


def _shown(way: Mapping[str, Any]) -> str:
    return " ".join(map(str, way.values()))
