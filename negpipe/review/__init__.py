"""A finished run, looked at: audit, calibration, quality, explanations, differences, report."""
