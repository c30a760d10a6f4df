"""Runs that take a cache to its limits: long, out of memory, killed, in company, beside NaN, in any order of calls."""
