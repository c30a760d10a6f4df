"""The uncompressed cache."""
