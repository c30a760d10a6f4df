"""Models: what a config.json or a weight file says."""
