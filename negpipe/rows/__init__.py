"""Training rows, in the layouts of trainers."""
