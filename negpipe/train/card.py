"""The model card: the library's card, with facts from negpipe added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from negpipe import __version__
from negpipe.config.schema import Config, Data
from negpipe.engine.manifest import Manifest
from negpipe.redaction import redacted
from negpipe.sources.places import locate, paths_of

_TYPES = {"nDCG@10": "ndcg_at_10", "MRR@10": "mrr_at_10", "Recall@10": "recall_at_10", "Recall@100": "recall_at_100"}
"""The hub's names of the metrics."""


def written(
    library: Path,
    base: Path,
    config: Config,
    rows: Manifest,
    compared: Sequence[Mapping[str, Any]],
    shared: Mapping[str, int],
) -> str:
    """The text of the card.

    Args:
        library: the card that Sentence Transformers wrote.
        base: the card of the base model; may not exist.
        config: the config of the run.
        rows: the manifest of the training rows.
        compared: every metric before and after, as `Comparison.document`.
        shared: what the held-out split shares with the rows, as `Overlap`.
    """
    from huggingface_hub import EvalResult, ModelCard

    assert config.train is not None
    card = ModelCard.load(library)
    judge = config.train.judge[0]
    reranks, kind = config.train.kind == "reranker", config.train.kind.capitalize()
    card.data.license = config.train.license or _license(base)
    card.data.datasets = _datasets(config.data) or card.data.datasets
    card.data.model_name = getattr(card.data, "model_name", None) or f"{kind} trained on mined negatives"
    card.data.eval_results = [
        EvalResult(
            task_type="text-ranking" if reranks else "information-retrieval",
            task_name="Text Ranking" if reranks else "Information Retrieval",
            dataset_type="held-out",
            dataset_name=f"held-out: {judge}",
            metric_type=_TYPES[one["metric"]],
            metric_name=one["metric"],
            metric_value=one["after"],
        )
        for one in compared
    ]
    table = "\n".join(
        f"| {one['metric']} | {one['before']:.4f} | {one['after']:.4f} |"
        f" {one['after'] - one['before']:+.4f} ({one['low']:+.4f} to {one['high']:+.4f}) | {one['verdict']} |"
        for one in compared
    )
    settings = yaml.safe_dump(redacted(config.model_dump(mode="json", exclude_none=True)), sort_keys=False)
    ranked = "by exact search of the whole corpus"
    if reranks:
        ranked += f": as the encoder orders it, and with its best {config.train.rerank_depth} ordered by this model"
    section = f"""
## Before and after

On {compared[0]["anchors"]:,} queries of {judge}, {ranked}.
Intervals are Student's, paired, 95 %.

| metric | before | after | difference | |
|---|---|---|---|---|
{table}

{shared["anchors_trained_on"]:,} of {shared["anchors"]:,} of these queries, and {shared["positives_trained_on"]:,} of
{shared["positives"]:,} texts of their positives, are trained on too.

## How it was made

negpipe {__version__} mined the {rows.stats["rows"]:,} rows; their fingerprint is `{rows.digest}`.

```yaml
{settings.strip()}
```
"""
    return f"{str(card).rstrip()}\n{section}"


def _license(path: Path) -> str | None:
    """The licence stated in a card; None if missing or unreadable."""
    from huggingface_hub import ModelCard

    try:
        stated = ModelCard.load(path, ignore_metadata_errors=True).data.license if path.is_file() else None
    except (ValueError, yaml.YAMLError):
        return None
    return stated if isinstance(stated, str) else None


def _datasets(data: Data) -> list[str]:
    """Hub datasets that the rows come from."""
    tables = (data.corpus, data.queries, data.qrels)
    named = [data.path, *(table.path for table in tables if table)]
    return sorted({path for one in named if one for path in paths_of(one) if locate(path) == "hub"})
