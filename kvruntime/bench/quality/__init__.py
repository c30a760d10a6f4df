"""``kvruntime eval`` and ``kvruntime compare``: what a cache's answers are worth, beside its bytes."""
