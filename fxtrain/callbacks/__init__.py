"""Callbacks: pure functions that decide. One idea a file; what each remembers is in its slot of the state."""

from fxtrain.callbacks.averages import epoch_mean as epoch_mean
from fxtrain.callbacks.guards import NanGuardState as NanGuardState
from fxtrain.callbacks.guards import nan_guard as nan_guard
from fxtrain.callbacks.saving import evaluate as evaluate
from fxtrain.callbacks.saving import save as save
from fxtrain.callbacks.stopping import EarlyStoppingState as EarlyStoppingState
from fxtrain.callbacks.stopping import early_stopping as early_stopping
