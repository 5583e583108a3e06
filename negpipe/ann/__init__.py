"""Dense vectors: how they are written, opened, scored in pairs and searched by inner product.

Nothing outside this package reads the bytes of a vector file, so another representation needs the same four parts:
`write_part`, `open_parts`, `score_pairs`, a search. The only package that imports faiss, and only when it is used.
"""

from negpipe.ann import factory, slices
from negpipe.ann.exact import Checkpoint, Found, search_exact
from negpipe.ann.pairs import pair_scores, score_pairs
from negpipe.ann.products import rate
from negpipe.ann.recall import Recall
from negpipe.ann.vectors import Vectors, open_flat, open_parts, write_flat, write_part

__all__ = [
    "Checkpoint",
    "Found",
    "Recall",
    "Vectors",
    "factory",
    "open_flat",
    "open_parts",
    "pair_scores",
    "rate",
    "score_pairs",
    "search_exact",
    "slices",
    "write_flat",
    "write_part",
]
