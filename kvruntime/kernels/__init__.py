"""Kernels and references that every method shares; nothing here knows a method."""
