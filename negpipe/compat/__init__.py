"""Drop-in replacements for the functions of other miners."""
