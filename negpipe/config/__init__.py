"""What a user may set: the schema of the config file, other miners' presets, and reading it."""
