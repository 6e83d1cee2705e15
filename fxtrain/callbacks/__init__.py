"""Callbacks that stop, guard, average, measure and log.

Each is a pure function of ``(state, event)``. Callback state lives in ``state.slots``, so every checkpoint includes it.
"""

from fxtrain.callbacks._averages import averaged, ema, swa
from fxtrain.callbacks._classification import confusion_matrix, curves
from fxtrain.callbacks._early_stopping import early_stopping, stop_on_overfitting
from fxtrain.callbacks._grad_flow import grad_flow
from fxtrain.callbacks._grad_profile import grad_profile
from fxtrain.callbacks._guards import first_not_finite, nan_guard, spike_guard
from fxtrain.callbacks._histograms import histograms, watch
from fxtrain.callbacks._model_size import model_size
from fxtrain.callbacks._monitor import monitor
from fxtrain.callbacks._per_model import per_model
from fxtrain.callbacks._plateau import reduce_on_plateau, schedule_hyperparam
from fxtrain.callbacks._predictions import predictions
from fxtrain.callbacks._progress import durations, epoch_mean, throughput
from fxtrain.callbacks._requests import evaluate, save, save_best, stop_at, stop_on_divergence, time_limit
from fxtrain.callbacks._restore_best import restore_best
from fxtrain.callbacks._samples import samples
from fxtrain.callbacks._statistics import activation_stats, grad_norms, update_ratios, weight_stats
from fxtrain.callbacks._textgen import textgen
from fxtrain.callbacks._track_best import track_best

__all__ = [
    "activation_stats",
    "averaged",
    "confusion_matrix",
    "curves",
    "durations",
    "early_stopping",
    "ema",
    "epoch_mean",
    "evaluate",
    "first_not_finite",
    "grad_flow",
    "grad_norms",
    "grad_profile",
    "histograms",
    "model_size",
    "monitor",
    "nan_guard",
    "per_model",
    "predictions",
    "reduce_on_plateau",
    "restore_best",
    "samples",
    "save",
    "save_best",
    "schedule_hyperparam",
    "spike_guard",
    "stop_at",
    "stop_on_divergence",
    "stop_on_overfitting",
    "swa",
    "textgen",
    "throughput",
    "time_limit",
    "track_best",
    "update_ratios",
    "watch",
    "weight_stats",
]
