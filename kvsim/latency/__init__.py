"""How long a step, a prompt and a first token take."""
