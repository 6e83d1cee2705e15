"""Checkpoint: what one costs, of fxtrain and of others."""
