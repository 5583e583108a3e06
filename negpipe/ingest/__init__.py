"""The pass over a source, and the joins of its records."""
