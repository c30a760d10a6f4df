"""Other planners, asked the same questions."""
