"""Callbacks that stop, guard, average, measure and log.

Each is a pure function of ``(state, event)``. Callback state lives in ``state.slots``, so every checkpoint includes it.
"""

from fxtrain.callbacks._activations import activation_stats as activation_stats
from fxtrain.callbacks._classes import confusion_matrix as confusion_matrix
from fxtrain.callbacks._classes import curves as curves
from fxtrain.callbacks._epoch_mean import epoch_mean as epoch_mean
from fxtrain.callbacks._gradients import GradFlow as GradFlow
from fxtrain.callbacks._gradients import GradNorms as GradNorms
from fxtrain.callbacks._gradients import grad_flow as grad_flow
from fxtrain.callbacks._gradients import grad_norms as grad_norms
from fxtrain.callbacks._histograms import Histograms as Histograms
from fxtrain.callbacks._histograms import histograms as histograms
from fxtrain.callbacks._monitor import MonitorState as MonitorState
from fxtrain.callbacks._monitor import monitor as monitor
from fxtrain.callbacks._nan_guard import NanGuardState as NanGuardState
from fxtrain.callbacks._nan_guard import first_not_finite as first_not_finite
from fxtrain.callbacks._nan_guard import nan_guard as nan_guard
from fxtrain.callbacks._plateau import ReduceOnPlateauState as ReduceOnPlateauState
from fxtrain.callbacks._plateau import reduce_on_plateau as reduce_on_plateau
from fxtrain.callbacks._plateau import schedule_hyperparam as schedule_hyperparam
from fxtrain.callbacks._predictions import predictions as predictions
from fxtrain.callbacks._requests import evaluate as evaluate
from fxtrain.callbacks._requests import save as save
from fxtrain.callbacks._samples import samples as samples
from fxtrain.callbacks._spike_guard import SpikeGuardState as SpikeGuardState
from fxtrain.callbacks._spike_guard import spike_guard as spike_guard
from fxtrain.callbacks._stopping import EarlyStoppingState as EarlyStoppingState
from fxtrain.callbacks._stopping import TimeLimitState as TimeLimitState
from fxtrain.callbacks._stopping import early_stopping as early_stopping
from fxtrain.callbacks._stopping import target as target
from fxtrain.callbacks._stopping import time_limit as time_limit
from fxtrain.callbacks._textgen import textgen as textgen
from fxtrain.callbacks._throughput import ThroughputState as ThroughputState
from fxtrain.callbacks._throughput import lr_monitor as lr_monitor
from fxtrain.callbacks._throughput import throughput as throughput
from fxtrain.callbacks._watch import watch as watch
from fxtrain.callbacks._weight_averages import AveragedState as AveragedState
from fxtrain.callbacks._weight_averages import averaged as averaged
from fxtrain.callbacks._weight_averages import ema as ema
from fxtrain.callbacks._weight_averages import swa as swa
from fxtrain.callbacks._weights import UpdateRatios as UpdateRatios
from fxtrain.callbacks._weights import WeightStats as WeightStats
from fxtrain.callbacks._weights import update_ratios as update_ratios
from fxtrain.callbacks._weights import weight_stats as weight_stats
