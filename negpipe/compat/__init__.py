"""In the place of other miners' functions."""
