"""Benchmarks: what fxtrain promises, measured, beside its peers."""
