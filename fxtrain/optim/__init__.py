# pyright: reportUnusedImport=false
"""Optimizers and their building blocks, as gradient transformations: pairs of pure functions."""

from fxtrain.optim._accumulated_squares import (
    adadelta,
    adagrad,
    rmsprop,
    scale_by_adadelta,
    scale_by_rms,
    scale_by_rss,
    scale_by_stddev,
)
from fxtrain.optim._adafactor import adafactor, scale_by_factored_rms
from fxtrain.optim._adam import ScaleByAdamState, adam, adamw, scale_by_adam, scale_by_amsgrad
from fxtrain.optim._adam_variants import adamax, lamb, nadam, radam, scale_by_adamax, scale_by_nadam, scale_by_radam
from fxtrain.optim._from_torch import from_torch
from fxtrain.optim._hyperparams import Scheduled, get_hyperparams, inject_hyperparams, learning_rates, set_hyperparams
from fxtrain.optim._learning_rates import LearningRate, ScalarOrSchedule
from fxtrain.optim._masking import active_when, masked, partition, unfreeze
from fxtrain.optim._momentum import EmaState, ema, lion, scale_by_lion, sgd, trace
from fxtrain.optim._muon import muon, orthogonalize, scale_by_muon, scale_by_shape
from fxtrain.optim._partial_update import update_used
from fxtrain.optim._rprop import rprop, scale_by_rprop
from fxtrain.optim._scaling import (
    ScaleByScheduleState,
    add_decayed_weights,
    clip_by_block_rms,
    clip_by_global_norm,
    clip_by_value,
    scale,
    scale_by_learning_rate,
    scale_by_param_block_rms,
    scale_by_schedule,
    scale_by_trust_ratio,
)
from fxtrain.optim._state import PerParameter, per_parameter, start_counts
from fxtrain.optim._transform import GradientTransformation, apply_updates, chain, identity, set_to_zero, stateless
from fxtrain.optim._wrappers import apply_if_finite, every_k, lookahead, split_real_and_imaginary

__all__ = [
    "GradientTransformation",
    "LearningRate",
    "PerParameter",
    "ScalarOrSchedule",
    "active_when",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "add_decayed_weights",
    "apply_if_finite",
    "apply_updates",
    "chain",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clip_by_value",
    "ema",
    "every_k",
    "from_torch",
    "get_hyperparams",
    "identity",
    "inject_hyperparams",
    "lamb",
    "learning_rates",
    "lion",
    "lookahead",
    "masked",
    "muon",
    "nadam",
    "orthogonalize",
    "partition",
    "per_parameter",
    "radam",
    "rmsprop",
    "rprop",
    "scale",
    "scale_by_adadelta",
    "scale_by_adam",
    "scale_by_adamax",
    "scale_by_amsgrad",
    "scale_by_factored_rms",
    "scale_by_learning_rate",
    "scale_by_lion",
    "scale_by_muon",
    "scale_by_nadam",
    "scale_by_param_block_rms",
    "scale_by_radam",
    "scale_by_rms",
    "scale_by_rprop",
    "scale_by_rss",
    "scale_by_schedule",
    "scale_by_shape",
    "scale_by_stddev",
    "scale_by_trust_ratio",
    "set_hyperparams",
    "set_to_zero",
    "sgd",
    "stateless",
    "trace",
    "unfreeze",
]
