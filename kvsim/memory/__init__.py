"""How many bytes, how many sequences, on which cards."""
