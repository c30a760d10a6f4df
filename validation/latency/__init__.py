"""The time model, fitted and tested on measured rows."""
