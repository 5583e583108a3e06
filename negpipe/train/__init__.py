"""Trains models on the rows and measures whether it helped.

The stages of a config with a section `train`: `held_out` reads the split that the model is judged on, `train`
fine-tunes a model on the rows and compares it with the one before. Only `trainer`, `retriever` and `reranker` import
torch, when they run.
"""

from __future__ import annotations

from negpipe.engine.stage import Graph
from negpipe.train import held_out, stage

__all__ = ["with_training"]


def with_training(mining: Graph) -> Graph:
    """The stages for mining and training; the held-out split is checked before anything is encoded."""
    ingest, *others = mining.values()
    return {each.name: each for each in (ingest, held_out.STAGE, *others, stage.STAGE)}
