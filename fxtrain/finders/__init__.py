"""Searches for a batch size and a learning rate, by short runs on copies of a state."""

from fxtrain.finders._batch_size import find_batch_size
from fxtrain.finders._learning_rate import LearningRates, find_learning_rate

__all__ = ["LearningRates", "find_batch_size", "find_learning_rate"]
