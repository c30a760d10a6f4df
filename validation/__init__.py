"""validation: what kvsim predicts beside what the machine says, and the error between them.

``claims`` has one claim a file (memory, peak, speed, quality): each measures and leaves rows.  Its ``predict`` gives
kvsim's figure for a row from the row alone.  ``recorded`` keeps the rows of a device, ``documents`` draws them.
``latency`` refits the model of time, ``planners`` asks other planners, and ``experiments`` holds what was tried.
"""
