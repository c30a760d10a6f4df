"""validation: what kvsim predicts beside what the machine says, and the error between them.

One claim a file (memory, peak, speed, quality): each measures and leaves rows.  ``predict`` gives kvsim's figure for
a row from the row alone, ``results`` keeps the rows of a device, ``report`` draws them.
"""
