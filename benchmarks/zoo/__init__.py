"""Trains every model of tests/zoo and writes a table of what held: ``python -m benchmarks.zoo``."""
