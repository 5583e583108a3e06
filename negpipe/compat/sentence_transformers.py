"""`mine_hard_negatives` with the arguments of sentence-transformers 6, run through the stages.

Guarantees: the same `datasets.Dataset` (rows, order, columns, types) for `top`, scores within rounding;
`random` draws from the same candidates, by seed. The models run in the caller's process, the search in a
subprocess: torch and FAISS are never in the same process, and no script needs a main guard.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from negpipe import graph
from negpipe.compat.dataset import Pairs, unwrapped, write_vectors
from negpipe.config import presets
from negpipe.config.file import load_config
from negpipe.data.arrays import Floats
from negpipe.data.candidates import DENSE, TEACHER
from negpipe.encoders import prompts
from negpipe.encoders.given import identity
from negpipe.stages.rescore import rescore
from negpipe.store import mapped

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from pandas import DataFrame

logger = logging.getLogger(__name__)

Format = Literal["triplet", "n-tuple", "labeled-pair", "labeled-list"]


def mine_hard_negatives(
    dataset: Dataset | IterableDataset | Mapping[str, Any] | Sequence[Mapping[str, Any]] | DataFrame,
    model: Any,
    anchor_column_name: str | None = None,
    positive_column_name: str | None = None,
    corpus: Sequence[str] | None = None,
    cross_encoder: Any = None,
    range_min: int = 0,
    range_max: int | None = None,
    max_score: float | None = None,
    min_score: float | None = None,
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    num_negatives: int = 3,
    sampling_strategy: Literal["random", "top"] = "top",
    query_prompt_name: str | None = None,
    query_prompt: str | None = None,
    corpus_prompt_name: str | None = None,
    corpus_prompt: str | None = None,
    include_positives: bool = False,
    output_format: Format | Literal["n-tuple-scores"] = "triplet",
    output_scores: bool = False,
    batch_size: int = 32,
    faiss_batch_size: int = 16384,
    use_faiss: bool = False,
    use_multi_process: list[str] | bool = False,
    verbose: bool = True,
    cache_folder: str | None = None,
    as_triplets: bool | None = None,
    margin: float | None = None,
    *,
    run_dir: str | Path | None = None,
    seed: int = 42,
) -> Dataset:
    """Add hard negatives to a dataset of (anchor, positive) pairs.

    The arguments up to `margin` are those of `sentence_transformers.util.mine_hard_negatives`; its documentation
    applies. `use_faiss` and `faiss_batch_size` are accepted and change nothing: the search is exact either way.
    `cache_folder` stores vectors by a digest of the model's weights, so that two models never share them.
    `use_multi_process` starts the models' worker processes, which import the caller's script: only this option
    requires a main guard, as there. A zero vector has a cosine of 0 with everything, as there.

    Args:
        dataset: as there; or a stream of rows (read to its end), a dict of lists, a dict of one split, a list of
            dicts, a pandas DataFrame. A list in the positive column contains several positives.
        anchor_column_name: None: the first column. An unknown name is an error, while sentence-transformers uses the
            first column; the same applies to `positive_column_name` and the second column.
        run_dir: the run directory; finished work in it is not repeated. None: a temporary folder, deleted afterwards.
        seed: seed of `sampling_strategy="random"`.

    Raises:
        ValueError: invalid arguments, as there; before a model is used.
        InputError: a vector is not finite; the message contains its text.
    """
    if as_triplets is not None:
        output_format = "triplet" if as_triplets else "n-tuple"
    if include_positives:
        output_format = "n-tuple"
    if output_format == "n-tuple-scores":
        output_format, output_scores = "n-tuple", True
    if margin is not None:
        absolute_margin = margin
    _check_choice("output_format", output_format, get_args(Format))
    _check_choice("sampling_strategy", sampling_strategy, ("top", "random"))
    if faiss_batch_size < 1:
        raise ValueError(f"faiss_batch_size must be at least 1, got {faiss_batch_size}")
    pairs = Pairs.of(dataset, anchor_column_name, positive_column_name, corpus)
    cutoffs = (absolute_margin, relative_margin, max_score, min_score)
    rescored = cross_encoder is not None and any(cutoff is not None for cutoff in cutoffs)
    filtered = any(cutoff is not None for cutoff in cutoffs[:3]) or (rescored and min_score is not None)
    if range_max is None:
        range_max = presets.derived_range_max(range_min, num_negatives, pairs.max_positives, filtered=filtered)
    _check_window(range_min, range_max, num_negatives)
    if getattr(model, "similarity_fn_name", None) in ("euclidean", "manhattan"):
        raise ValueError(f"similarity '{model.similarity_fn_name}': only cosine and dot product are supported")
    _check_prompt_name("query", model, query_prompt_name, query_prompt)
    _check_prompt_name("corpus", model, corpus_prompt_name, corpus_prompt)

    settings = {
        "mining": {
            "compat": "sentence-transformers",
            "range_min": range_min,
            "range_max": range_max,
            "max_score": max_score,
            "min_score": min_score,
            "absolute_margin": absolute_margin,
            "relative_margin": relative_margin,
            "num_negatives": num_negatives,
            "sampling_strategy": sampling_strategy,
            "score": TEACHER if rescored else DENSE,
        },
        "output": {"format": output_format, "include_positives": include_positives, "min_rows": 0},
        "seed": seed,
    }
    pool = use_multi_process if isinstance(use_multi_process, list) else None
    embed = {"batch_size": batch_size, "show_progress_bar": verbose, "normalize_embeddings": True}
    known = identity(model) if cache_folder else None
    vectors = {}
    with _folder(run_dir) as folder:
        # Errors in the arguments are reported before the model has run for hours.
        source = pairs.settings(folder) | settings
        here, apart = (load_config(source | {"executor": {"kind": kind}}) for kind in ("inline", "local"))
        with _pool(model, bool(use_multi_process), pool) as workers:
            for side, texts, prompt, prompt_name in (
                ("document", pairs.documents, corpus_prompt, corpus_prompt_name),
                ("query", pairs.anchors, query_prompt, query_prompt_name),
            ):
                options = {"prompt": prompt, "prompt_name": prompt_name}
                cached = None
                if cache_folder and known:
                    name = hashlib.sha256(json.dumps([known, options, side, texts]).encode()).hexdigest()
                    cached = Path(cache_folder) / f"{side}_embeddings_{name}.npy"
                encode = getattr(model, f"encode_{side}")
                vectors[side] = _vectors(encode, texts, cached, pool=workers, **embed, **options)
        pairs.write(folder, vectors["document"], vectors["query"])
        for stage in ("ingest", "encode", "index"):
            graph.mine(here, only=stage)
        graph.mine(apart, only="search")
        with _pool(cross_encoder, rescored and bool(use_multi_process), pool) as workers:

            def score(texts: Sequence[tuple[str, str]]) -> Floats:
                own = [(unwrapped(query), unwrapped(document)) for query, document in texts]
                found = cross_encoder.predict(own, batch_size=batch_size, convert_to_tensor=True, pool=workers)
                return np.asarray(found.float().cpu().numpy(), np.float32)

            # Without a digest of its weights, a model is never taken for the previous one.
            between = rescore(score, identity(cross_encoder) or uuid.uuid4().hex) if rescored else None
            result = graph.mine(here, rescore=between)
        logger.log(logging.INFO if verbose else logging.DEBUG, "mined: %s", result.stats["triplets"])
        return pairs.dataset(result.triplets, output_format, output_scores)


def _check_prompt_name(side: str, model: Any, name: str | None, prompt: str | None) -> None:
    if name is not None and prompt is None and name not in getattr(model, "prompts", (name,)):
        raise ValueError(f"{side}_prompt_name: {prompts.unknown(name, model.prompts)}")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_window(range_min: int, range_max: int, num_negatives: int) -> None:
    if num_negatives < 1:
        raise ValueError(f"num_negatives must be at least 1, got {num_negatives}")
    if not 0 <= range_min < range_max:
        raise ValueError(f"range_min ({range_min}) must be at least 0 and below range_max ({range_max})")
    if num_negatives > range_max - range_min:
        raise ValueError(f"{num_negatives} negatives do not fit in the ranks {range_min} to {range_max}")


def _vectors(encode: Any, texts: list[str], cached: Path | None, **options: Any) -> Floats:
    """Vectors of texts, (n, d) float32, from the cache if available."""
    if cached is not None and cached.is_file():
        return np.asarray(mapped.npy(cached), np.float32)
    vectors = np.asarray(encode(texts, convert_to_numpy=True, **options), np.float32)
    if cached is not None:
        write_vectors(cached, vectors)
    return vectors


@contextmanager
def _folder(run_dir: str | Path | None) -> Iterator[Path]:
    if run_dir is not None:
        yield Path(run_dir)
        return
    with tempfile.TemporaryDirectory(prefix="negpipe-") as folder:
        yield Path(folder)


@contextmanager
def _pool(model: Any, wanted: bool, devices: list[str] | None) -> Iterator[Any]:
    """The model's worker processes, if requested."""
    if not wanted:
        yield None
        return
    pool = model.start_multi_process_pool(target_devices=devices)
    try:
        yield pool
    finally:
        model.stop_multi_process_pool(pool)
