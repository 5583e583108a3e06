"""The code that knows what a file system is: files that appear whole, folders swapped at once, locks."""
