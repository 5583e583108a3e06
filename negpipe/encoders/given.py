"""The identity of models that a caller passes as objects."""

from __future__ import annotations

import hashlib
from typing import Any

_SETTINGS = ("prompts", "default_prompt_name", "max_seq_length", "truncate_dim", "similarity_fn_name")


def identity(model: Any) -> str | None:
    """A digest of a model's weights, modules and settings; None if it does not expose weights.

    A tokenizer is identified by its settings, not by its vocabulary: a documented limitation.
    """
    import torch

    try:
        state = model.state_dict()
    except (AttributeError, TypeError):
        return None
    seen = hashlib.sha256(f"{type(model).__qualname__} {model!r}".encode())
    for name in _SETTINGS:
        seen.update(f"{name}={getattr(model, name, None)!r}".encode())
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            return None
        seen.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        seen.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()
