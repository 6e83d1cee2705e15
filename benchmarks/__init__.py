"""Benchmarks of fxtrain against other libraries and against its own targets."""
