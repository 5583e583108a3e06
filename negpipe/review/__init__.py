"""Examines finished runs: audit, calibration, quality, explanations, differences, report."""
