"""kvsim: what a key/value cache costs, before anything runs."""

__version__ = "0.1.0"
