"""``kvruntime bench engine``: whole decode steps."""
