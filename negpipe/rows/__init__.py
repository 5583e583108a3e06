"""Training rows, in the layouts that trainers load."""
