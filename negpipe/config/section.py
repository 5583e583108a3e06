"""The base class of all sections of a config. The docstring under a key describes it to users."""

from __future__ import annotations

import ast
import inspect
from itertools import pairwise

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Keys and values; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def described(cls) -> dict[str, str]:
        """The descriptions by key. Read from the source when asked, as that takes longer than the import."""
        source = ast.parse(inspect.getsource(cls)).body[0]
        assert isinstance(source, ast.ClassDef)
        found = {}
        for key, below in pairwise(source.body):
            match key, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
        return found
