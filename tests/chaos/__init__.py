"""Faults of many mechanisms in one run, and what it made of them: `python -m tests.chaos`."""
