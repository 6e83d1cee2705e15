"""Callbacks: pure functions that decide. One idea a file; what each remembers is in its slot of the state."""

from fxtrain.callbacks.averages import epoch_mean as epoch_mean
from fxtrain.callbacks.averaging import AveragedState as AveragedState
from fxtrain.callbacks.averaging import averaged as averaged
from fxtrain.callbacks.averaging import ema as ema
from fxtrain.callbacks.averaging import swa as swa
from fxtrain.callbacks.guards import NanGuardState as NanGuardState
from fxtrain.callbacks.guards import nan_guard as nan_guard
from fxtrain.callbacks.plateau import ReduceOnPlateauState as ReduceOnPlateauState
from fxtrain.callbacks.plateau import reduce_on_plateau as reduce_on_plateau
from fxtrain.callbacks.plateau import schedule_hyperparam as schedule_hyperparam
from fxtrain.callbacks.saving import evaluate as evaluate
from fxtrain.callbacks.saving import save as save
from fxtrain.callbacks.stopping import EarlyStoppingState as EarlyStoppingState
from fxtrain.callbacks.stopping import TimeLimitState as TimeLimitState
from fxtrain.callbacks.stopping import early_stopping as early_stopping
from fxtrain.callbacks.stopping import target as target
from fxtrain.callbacks.stopping import time_limit as time_limit
