"""The code that deals with file systems: files that appear complete, folders swapped atomically, locks."""
