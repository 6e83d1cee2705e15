"""Trains every model of tests/zoo and writes a table of the results: ``python -m benchmarks.zoo``."""
