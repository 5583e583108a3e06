"""Reading .npy files that may be damaged."""

from __future__ import annotations

import tokenize

BROKEN = (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError)
"""What `numpy.load` raises for a file that is no whole .npy file: its header is parsed as Python."""
