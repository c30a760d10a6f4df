"""``kvsim calibrate``: a card measured for kvsim's model of time, a part for each runtime that runs on it."""
