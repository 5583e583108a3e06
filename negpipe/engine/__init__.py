"""Stages as values, and the code that runs them: keys, records, state, executors, repair."""
