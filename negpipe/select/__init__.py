"""Selects the candidates that become negatives."""
