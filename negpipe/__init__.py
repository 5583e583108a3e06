"""negpipe: hard negatives for retrieval and reranking models, in restartable stages."""

from __future__ import annotations

__version__ = "0.1.0"
