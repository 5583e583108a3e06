"""Models that encode texts: finding a model (`resolve_model`), and running it (`load`).

Importing this package and resolving a model import neither torch nor a model library.
"""

from negpipe.encoders.batched import OnBatch
from negpipe.encoders.batches import check_tokens
from negpipe.encoders.encode import TextEncoder, libraries, load, provenance
from negpipe.encoders.models import Model, folder_here, parameters, resolve_model
from negpipe.encoders.precision import check_attention, check_precision, has_units, packs
from negpipe.encoders.prompts import Kind
from negpipe.encoders.runtimes import check_installed, is_installed

__all__ = [
    "Kind",
    "Model",
    "OnBatch",
    "TextEncoder",
    "check_attention",
    "check_installed",
    "check_precision",
    "check_tokens",
    "folder_here",
    "has_units",
    "is_installed",
    "libraries",
    "load",
    "packs",
    "parameters",
    "provenance",
    "resolve_model",
]
