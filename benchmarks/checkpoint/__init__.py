"""Measures the cost of checkpoints of fxtrain and other libraries."""
