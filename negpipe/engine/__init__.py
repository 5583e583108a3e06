"""Stages as values and what runs them: keys, records, state, executors, repair."""
