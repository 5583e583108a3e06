"""Reading .npy files that may be damaged."""

from __future__ import annotations

import tokenize

BROKEN = (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError)
"""Errors of `numpy.load` for a file that is not a complete .npy file: its header is parsed as Python."""
