"""``kvruntime bench generate``: stock ``model.generate()`` with every cache."""
