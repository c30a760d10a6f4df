"""One claim a file: what is measured, and what is held against it."""
