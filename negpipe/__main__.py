"""`python -m negpipe`."""

from __future__ import annotations

from negpipe.cli import main

main()
