# pyright: reportUnusedImport=false
"""Optimizers and their building blocks, as gradient transformations: pairs of pure functions."""

from fxtrain.optim._accumulation import every_k
from fxtrain.optim._adadelta import adadelta, scale_by_adadelta
from fxtrain.optim._adafactor import adafactor, scale_by_factored_rms
from fxtrain.optim._adagrad import adagrad, scale_by_rss
from fxtrain.optim._adam import ScaleByAdamState, adam, adamw, scale_by_adam, scale_by_amsgrad
from fxtrain.optim._adamax import adamax, scale_by_adamax
from fxtrain.optim._apply_if_finite import apply_if_finite
from fxtrain.optim._clipping import clip_by_block_rms, clip_by_global_norm, clip_by_value
from fxtrain.optim._complex_values import split_real_and_imaginary
from fxtrain.optim._decay import add_decayed_weights
from fxtrain.optim._freezing import active_when, unfreeze
from fxtrain.optim._from_torch import from_torch
from fxtrain.optim._hyperparams import Scheduled, get_hyperparams, inject_hyperparams, set_hyperparams
from fxtrain.optim._lamb import lamb
from fxtrain.optim._lookahead import lookahead
from fxtrain.optim._masking import masked, partition
from fxtrain.optim._momentum import EmaState, ema, lion, scale_by_lion, sgd, trace
from fxtrain.optim._muon import muon, orthogonalize, scale_by_muon, scale_by_shape
from fxtrain.optim._nadam import nadam, scale_by_nadam
from fxtrain.optim._parameter_scalars import PerParameter, per_parameter, start_counts
from fxtrain.optim._partial_update import update_used
from fxtrain.optim._radam import radam, scale_by_radam
from fxtrain.optim._rmsprop import rmsprop, scale_by_rms, scale_by_stddev
from fxtrain.optim._rprop import rprop, scale_by_rprop
from fxtrain.optim._scaling import (
    ScalarOrSchedule,
    ScaleByScheduleState,
    scale,
    scale_by_learning_rate,
    scale_by_param_block_rms,
    scale_by_schedule,
    scale_by_trust_ratio,
)
from fxtrain.optim._transform import GradientTransformation, apply_updates, chain, identity, set_to_zero, stateless

__all__ = [
    "GradientTransformation",
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
