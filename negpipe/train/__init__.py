"""Training on the rows, and whether it helped.

The stages of a config with a section `train`: `held_out` reads the split that the model is judged on, `train`
fine-tunes it on the rows and judges it against what was before. Only `trainer`, `retriever` and `reranker` import
torch, when they run.
"""

from __future__ import annotations

from negpipe.engine.stage import Graph
from negpipe.train import held_out, stage

__all__ = ["with_training"]


def with_training(mining: Graph) -> Graph:
    """The stages that mine, and those that train; what there is to judge by is known before anything is encoded."""
    ingest, *others = mining.values()
    return {each.name: each for each in (ingest, held_out.STAGE, *others, stage.STAGE)}
