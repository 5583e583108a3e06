"""What `mine_hard_negatives` takes for a dataset and a corpus, and how it refuses the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from test_parity import Model

from negpipe import mine_hard_negatives
from negpipe.compat.dataset import Pairs

QUESTIONS = ["How is it repaired?", "Who answers?", "How is it repaired?", " spaced "]
ANSWERS = ["With a patch.", "The porter.", "With a new tube.", ""]
ROWS = list(zip(QUESTIONS, ANSWERS, strict=True))
COLUMNS: dict[str, list[Any]] = {"question": QUESTIONS, "answer": ANSWERS}
RECORDS = [{"question": question, "answer": answer} for question, answer in ROWS]


def streamed() -> IterableDataset:
    """Without features: nobody knows its columns before it is read."""
    return IterableDataset.from_generator(lambda: iter(RECORDS))


SHAPES: dict[str, Callable[[], Any]] = {
    "Dataset": lambda: Dataset.from_dict(COLUMNS),
    "formatted": lambda: Dataset.from_dict(COLUMNS).with_format("numpy"),
    "selected": lambda: Dataset.from_list(RECORDS[::-1]).select(range(3, -1, -1)),
    "IterableDataset": streamed,
    "DatasetDict": lambda: DatasetDict(train=Dataset.from_dict(COLUMNS)),
    "IterableDatasetDict": lambda: IterableDatasetDict(train=streamed()),
    "dict of lists": lambda: COLUMNS,
    "dict of arrays": lambda: {name: np.array(values, object) for name, values in COLUMNS.items()},
    "dict of series": lambda: {name: pd.Series(values) for name, values in COLUMNS.items()},
    "list of dicts": lambda: RECORDS,
    "tuple of dicts": lambda: tuple(RECORDS),
    "DataFrame": lambda: pd.DataFrame(COLUMNS),
    "DataFrame with an index": lambda: pd.DataFrame(COLUMNS, index=[7, 5, 5, 3]),
}


@pytest.mark.cases
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_the_same_pairs(shape: str) -> None:
    pairs = Pairs.of(SHAPES[shape](), None, None)
    assert (pairs.columns, pairs.rows) == (("question", "answer"), ROWS)


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({}, ("id", "question")),
        ({"anchor": "question", "positive": "answer"}, ("question", "answer")),
        ({"anchor": "question"}, ("question", "id")),
        ({"positive": "answer"}, ("id", "answer")),
        ({"positive": "id"}, ("question", "id")),
        ({"positive": "question"}, ("id", "question")),
    ],
)
def test_what_is_not_named_is_a_column_that_is_left(named: dict[str, str], expected: tuple[str, str]) -> None:
    dataset = {"id": ["a", "b", "c", "d"], **COLUMNS}
    assert Pairs.of(dataset, named.get("anchor"), named.get("positive")).columns == expected


@pytest.mark.cases
@pytest.mark.parametrize("wrap", [Dataset.from_dict, pd.DataFrame, dict])
def test_a_list_is_as_many_positives(wrap: Callable[[dict[str, list[Any]]], Any], tmp_path: Path) -> None:
    """Question answering with several right answers: each is a positive of its question, in a column of lists."""
    columns: dict[str, list[Any]] = {"question": ["a", "b"], "answers": [["x", "y"], ["z"]]}
    dataset = wrap(columns)
    assert Pairs.of(dataset, None, None).rows == [("a", "x"), ("a", "y"), ("b", "z")]
    parquet = tmp_path / "rows.parquet"
    pd.DataFrame(columns).to_parquet(parquet)
    assert Pairs.of(pd.read_parquet(parquet), None, None).rows == [("a", "x"), ("a", "y"), ("b", "z")]


@pytest.mark.cases
def test_lists_are_mined_as_sentence_transformers_mines_their_pairs() -> None:
    from sentence_transformers.util import mine_hard_negatives as theirs

    texts = [*"abc", *(f"answer {number}" for number in range(12))]
    vectors = dict(zip(texts, np.random.default_rng(5).standard_normal((15, 8)).astype(np.float32), strict=True))
    model = Model({text: vector / np.linalg.norm(vector) for text, vector in vectors.items()})
    lists = [texts[3:5], texts[5:6], texts[6:9]]
    options: dict[str, Any] = {"corpus": texts[3:], "num_negatives": 2, "verbose": False}
    records = [{"query": anchor, "answers": own} for anchor, own in zip("abc", lists, strict=True)]
    flat = [(anchor, answer) for anchor, answers in zip("abc", lists, strict=True) for answer in answers]
    columns = {"query": [anchor for anchor, _ in flat], "answers": [answer for _, answer in flat]}
    expected = theirs(Dataset.from_dict(columns), model, **options)
    mined = mine_hard_negatives(records, model, **options)
    assert mined.features == expected.features
    assert mined.to_dict() == expected.to_dict()
    assert len(mined) > len(flat)


TEXTS = ["a", "b"]


@pytest.mark.cases
@pytest.mark.parametrize(
    ("arguments", "argument", "advice"),
    [
        # Shapes that could mean several things.
        (
            {"dataset": DatasetDict(train=Dataset.from_dict(COLUMNS), test=Dataset.from_dict(COLUMNS))},
            "dataset",
            "['train']",
        ),
        ({"dataset": ROWS}, "dataset", "a list of dicts"),
        ({"dataset": "org/name"}, "dataset", "datasets.Dataset"),
        ({"dataset": None}, "dataset", "datasets.Dataset"),
        ({"dataset": iter(RECORDS)}, "dataset", "a list of dicts"),
        ({"dataset": {"question": "a", "answer": "b"}}, "dataset", "a list in each column"),
        ({"dataset": {"question": TEXTS, "answer": ["x"]}}, "dataset", "differ in length"),
        ({"dataset": pd.DataFrame([["a", "x", "y"]], columns=["q", "a", "a"])}, "dataset", "a unique name"),
        ({"dataset": []}, "dataset", "rows of an anchor and a positive"),
        ({"dataset": {}}, "dataset", "rows of an anchor and a positive"),
        ({"dataset": pd.DataFrame()}, "dataset", "rows of an anchor and a positive"),
        ({"dataset": {"question": TEXTS}}, "dataset", "two columns"),
        # Names.
        ({"anchor_column_name": "qestion"}, "anchor_column_name", "'question', 'answer'"),
        ({"positive_column_name": "answers"}, "positive_column_name", "'question', 'answer'"),
        ({"anchor_column_name": "answer", "positive_column_name": "answer"}, "positive_column_name", "'question'"),
        # Values.
        ({"dataset": {"question": TEXTS, "answer": ["x", []]}}, "'answer', row 1", "a list of texts"),
        ({"dataset": {"question": TEXTS, "answer": [["x"], ["y", None]]}}, "'answer', row 1", "a text"),
        ({"dataset": {"question": TEXTS, "answer": [["x"], [["y"]]]}}, "'answer', row 1", "a text"),
        ({"dataset": {"question": [["a"], ["b"]], "answer": TEXTS}}, "'question', row 0", "a text"),
        ({"dataset": [{"question": "a", "answer": "x"}, {"question": "b"}]}, "'answer', row 1", "a text"),
        ({"dataset": pd.DataFrame({"question": TEXTS, "answer": ["x", np.nan]})}, "'answer', row 1", "a text"),
        # A corpus that would be taken apart: a text into letters, a frame or a dict into its keys.
        ({"corpus": "x y z"}, "corpus", "a list of texts"),
        ({"corpus": 7}, "corpus", "a list of texts"),
        ({"corpus": {"d1": "x"}}, "corpus", "a list of texts"),
        ({"corpus": pd.DataFrame({"text": TEXTS})}, "corpus", "corpus['text']"),
        ({"corpus": Dataset.from_dict({"text": TEXTS})}, "corpus", "corpus['text']"),
        ({"corpus": ["x", None]}, "corpus", "a text"),
    ],
)
def test_the_argument_is_named_and_what_to_pass(arguments: dict[str, Any], argument: str, advice: str) -> None:
    """Before the model, which there is none of here, is asked for anything."""
    with pytest.raises(ValueError) as caught:
        mine_hard_negatives(**{"dataset": COLUMNS, "model": None, **arguments})
    assert argument in str(caught.value)
    assert advice in str(caught.value)


@pytest.mark.parametrize(
    "corpus", [["x", "y"], ("x", "y"), pd.Series(["x", "y"]), Dataset.from_dict({"text": ["x", "y"]})["text"]]
)
def test_a_corpus_is_any_sequence_of_texts(corpus: Any) -> None:
    assert Pairs.of(COLUMNS, None, None, corpus).corpus == ["x", "y"]
