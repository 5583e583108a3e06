"""The config file: its schema, the presets of other miners, and reading it."""
