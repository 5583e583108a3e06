"""Estimates what a run would do and cost."""
