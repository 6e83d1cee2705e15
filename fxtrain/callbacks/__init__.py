"""Callbacks that stop, guard, average, measure and log.

Each is a pure function of ``(state, event)``. Callback state lives in ``state.slots``, so every checkpoint includes it.
"""

from fxtrain.callbacks._activations import activation_stats
from fxtrain.callbacks._averages import AveragedState as AveragedState
from fxtrain.callbacks._averages import averaged, ema, swa
from fxtrain.callbacks._classes import confusion_matrix, curves
from fxtrain.callbacks._early_stopping import EarlyStoppingState as EarlyStoppingState
from fxtrain.callbacks._early_stopping import early_stopping
from fxtrain.callbacks._epoch_mean import epoch_mean
from fxtrain.callbacks._gradients import GradFlow as GradFlow
from fxtrain.callbacks._gradients import GradNorms as GradNorms
from fxtrain.callbacks._gradients import grad_flow, grad_norms
from fxtrain.callbacks._histograms import Histograms as Histograms
from fxtrain.callbacks._histograms import histograms
from fxtrain.callbacks._limits import TimeLimitState as TimeLimitState
from fxtrain.callbacks._limits import stop_at, stop_on_divergence, time_limit
from fxtrain.callbacks._monitor import MonitorState as MonitorState
from fxtrain.callbacks._monitor import monitor
from fxtrain.callbacks._nan_guard import NanGuardState as NanGuardState
from fxtrain.callbacks._nan_guard import first_not_finite, nan_guard
from fxtrain.callbacks._overfitting import OverfittingState as OverfittingState
from fxtrain.callbacks._overfitting import stop_on_overfitting
from fxtrain.callbacks._plateau import ReduceOnPlateauState as ReduceOnPlateauState
from fxtrain.callbacks._plateau import reduce_on_plateau, schedule_hyperparam
from fxtrain.callbacks._predictions import predictions
from fxtrain.callbacks._requests import evaluate, save
from fxtrain.callbacks._restore_best import RestoreBestState as RestoreBestState
from fxtrain.callbacks._restore_best import restore_best
from fxtrain.callbacks._samples import samples
from fxtrain.callbacks._spike_guard import SpikeGuardState as SpikeGuardState
from fxtrain.callbacks._spike_guard import spike_guard
from fxtrain.callbacks._textgen import textgen
from fxtrain.callbacks._throughput import ThroughputState as ThroughputState
from fxtrain.callbacks._throughput import lr_monitor, throughput
from fxtrain.callbacks._watch import watch
from fxtrain.callbacks._weight_stats import UpdateRatios as UpdateRatios
from fxtrain.callbacks._weight_stats import WeightStats as WeightStats
from fxtrain.callbacks._weight_stats import update_ratios, weight_stats

__all__ = [
    "activation_stats",
    "averaged",
    "confusion_matrix",
    "curves",
    "early_stopping",
    "ema",
    "epoch_mean",
    "evaluate",
    "first_not_finite",
    "grad_flow",
    "grad_norms",
    "histograms",
    "lr_monitor",
    "monitor",
    "nan_guard",
    "predictions",
    "reduce_on_plateau",
    "restore_best",
    "samples",
    "save",
    "schedule_hyperparam",
    "spike_guard",
    "stop_at",
    "stop_on_divergence",
    "stop_on_overfitting",
    "swa",
    "textgen",
    "throughput",
    "time_limit",
    "update_ratios",
    "watch",
    "weight_stats",
]
