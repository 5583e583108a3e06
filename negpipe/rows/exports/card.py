"""The dataset card of a hub export: its rows, their origin, and how to load them."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from negpipe.config.schema import Config
from negpipe.rows.exports.front import configs
from negpipe.rows.exports.job import described

_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))


def write(
    folder: Path,
    config: Config,
    *,
    name: str,
    counts: Mapping[str, int],
    scores: Mapping[str, Mapping[str, Any]],
    encoder: Mapping[str, str],
    columns: list[tuple[str, str]],
) -> None:
    """Write README.md.

    Args:
        name: the argument of `load_dataset`.
        counts: counts by description.
        scores: moments.summary of the scores of each side.
        encoder: facts about the encoder, in words.
        columns: name and type of each.
    """
    rows = counts["rows"]
    front = {
        "configs": configs(folder, {"default": "data/train*.parquet"}),
        "task_categories": ["text-retrieval", "text-ranking"],
        "tags": ["hard-negatives", "sentence-transformers", "negpipe"],
        "size_categories": [next((name for limit, name in _SIZES if rows < limit), "n>10M")],
    }
    settings = yaml.safe_dump(described(config), sort_keys=False, allow_unicode=True)
    text = f"""---
# license: add one that covers the texts
{yaml.safe_dump(front, sort_keys=False)}---

# Hard negatives

Training rows ({config.output.format}) for retrieval and reranking models, mined with negpipe {version("negpipe")}.

```python
from datasets import load_dataset

dataset = load_dataset("{name}", split="train")
```

## Counts

{_table(("", "count"), [(what, f"{count:,}") for what, count in counts.items()])}

## Columns

{_table(("column", "type"), columns)}

## Scores

Similarity of anchor and document under the encoder.

{_table(("", "count", "mean", "std", "min", "max"), [_scores(side, found) for side, found in scores.items()])}

## Encoder

{_table(("", ""), list(encoder.items()))}

## Config

```yaml
{settings}```
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def _scores(side: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    numbers = [f"{found[name]:.4f}" if found["count"] else "" for name in ("mean", "std", "min", "max")]
    return side, f"{found['count']:,}", *numbers


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """Text escaped for HTML and tables."""
    return html.escape(text, quote=False).replace("|", "\\|")
