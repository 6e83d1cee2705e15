"""Searches for a batch size and a learning rate, by short runs on copies of a state."""

from fxtrain.finders._batch_size import find_batch_size as find_batch_size
from fxtrain.finders._learning_rate import LearningRates as LearningRates
from fxtrain.finders._learning_rate import lr_finder as lr_finder
