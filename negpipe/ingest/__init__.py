"""One pass over a source, and what must be joined."""
