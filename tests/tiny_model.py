"""A BERT so small that a test can build it: a real tokenizer and random, seeded weights in a folder.

FlagEmbedding, transformers and Sentence Transformers all load it.
"""

from __future__ import annotations

import json
import string
from pathlib import Path

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_WORDS = ["the", "of", "and", "to", "in", "is", "that", "for", "as", "return", "list", "file", "name", "text", "error"]


def build_tiny_model(
    folder: Path, *, seed: int = 0, dim: int = 32, max_length: int = 128, pooling: str = "mean"
) -> Path:
    """Write the model and return its folder; the same arguments write the same bytes."""
    import torch
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    letters = list(string.ascii_lowercase + string.digits + string.punctuation)
    vocabulary = _SPECIAL + letters + [f"##{letter}" for letter in letters] + _WORDS
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    BertWordPieceTokenizer(str(folder / "vocab.txt")).save(str(folder / "tokenizer.json"))
    tokenizer = BertTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), model_max_length=max_length)
    tokenizer.save_pretrained(folder)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertModel(
            BertConfig(
                vocab_size=len(vocabulary),
                hidden_size=dim,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=2 * dim,
                max_position_embeddings=max_length,
                initializer_range=0.4,  # The usual 0.02 would give every text nearly the same vector.
            )
        )
    model.save_pretrained(folder)

    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (folder / "1_Pooling").mkdir(exist_ok=True)
    names = {"cls": "cls_token", "mean": "mean_tokens"}
    poolings = {f"pooling_mode_{name}": key == pooling for key, name in names.items()}
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": dim, **poolings}), encoding="utf-8"
    )
    return folder
