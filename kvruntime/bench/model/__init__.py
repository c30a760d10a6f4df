"""``kvruntime bench``: a model's memory, speed and quality by cache."""
