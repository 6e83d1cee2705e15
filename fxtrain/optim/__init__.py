"""Optimizers and their building blocks, as gradient transformations: pairs of pure functions."""

from fxtrain.optim._accumulation import EveryKState as EveryKState
from fxtrain.optim._accumulation import every_k
from fxtrain.optim._adadelta import ScaleByAdaDeltaState as ScaleByAdaDeltaState
from fxtrain.optim._adadelta import adadelta, scale_by_adadelta
from fxtrain.optim._adafactor import FactoredState as FactoredState
from fxtrain.optim._adafactor import adafactor, scale_by_factored_rms
from fxtrain.optim._adagrad import ScaleByRssState as ScaleByRssState
from fxtrain.optim._adagrad import adagrad, scale_by_rss
from fxtrain.optim._adam import ScaleByAdamState as ScaleByAdamState
from fxtrain.optim._adam import ScaleByAmsgradState as ScaleByAmsgradState
from fxtrain.optim._adam import adam, adamw, scale_by_adam, scale_by_amsgrad
from fxtrain.optim._adamax import ScaleByAdamaxState as ScaleByAdamaxState
from fxtrain.optim._adamax import adamax, scale_by_adamax
from fxtrain.optim._apply_if_finite import ApplyIfFiniteState as ApplyIfFiniteState
from fxtrain.optim._apply_if_finite import apply_if_finite
from fxtrain.optim._clipping import clip_by_block_rms, clip_by_global_norm, clip_by_value
from fxtrain.optim._complex_values import split_real_and_imaginary as split_real_and_imaginary
from fxtrain.optim._decay import WeightDecaySchedule as WeightDecaySchedule
from fxtrain.optim._decay import add_decayed_weights
from fxtrain.optim._freezing import ActiveWhenState as ActiveWhenState
from fxtrain.optim._freezing import active_when, unfreeze
from fxtrain.optim._from_torch import from_torch
from fxtrain.optim._hyperparams import InjectHyperparamsState as InjectHyperparamsState
from fxtrain.optim._hyperparams import Scheduled as Scheduled
from fxtrain.optim._hyperparams import get_hyperparams, inject_hyperparams, set_hyperparams
from fxtrain.optim._lamb import lamb
from fxtrain.optim._lookahead import LookaheadState as LookaheadState
from fxtrain.optim._lookahead import lookahead
from fxtrain.optim._masking import MaskedState as MaskedState
from fxtrain.optim._masking import PartitionState as PartitionState
from fxtrain.optim._masking import masked, partition
from fxtrain.optim._momentum import DampenedTraceState as DampenedTraceState
from fxtrain.optim._momentum import EmaState as EmaState
from fxtrain.optim._momentum import ScaleByLionState as ScaleByLionState
from fxtrain.optim._momentum import TraceState as TraceState
from fxtrain.optim._momentum import ema, lion, scale_by_lion, sgd, trace
from fxtrain.optim._muon import ScaleByMuonState as ScaleByMuonState
from fxtrain.optim._muon import muon, orthogonalize, scale_by_muon, scale_by_shape
from fxtrain.optim._nadam import ScaleByNadamState as ScaleByNadamState
from fxtrain.optim._nadam import nadam, scale_by_nadam
from fxtrain.optim._parameter_scalars import PerParameter, per_parameter
from fxtrain.optim._parameter_scalars import start_counts as start_counts
from fxtrain.optim._partial_update import update_used as update_used
from fxtrain.optim._radam import radam, scale_by_radam
from fxtrain.optim._rmsprop import ScaleByRmsState as ScaleByRmsState
from fxtrain.optim._rmsprop import ScaleByRmsWithCountState as ScaleByRmsWithCountState
from fxtrain.optim._rmsprop import ScaleByStddevState as ScaleByStddevState
from fxtrain.optim._rmsprop import ScaleByStddevWithCountState as ScaleByStddevWithCountState
from fxtrain.optim._rmsprop import rmsprop, scale_by_rms, scale_by_stddev
from fxtrain.optim._rprop import ScaleByRpropState as ScaleByRpropState
from fxtrain.optim._rprop import rprop, scale_by_rprop
from fxtrain.optim._scaling import (
    ScalarOrSchedule,
    scale,
    scale_by_learning_rate,
    scale_by_param_block_rms,
    scale_by_schedule,
    scale_by_trust_ratio,
)
from fxtrain.optim._scaling import ScaleByScheduleState as ScaleByScheduleState
from fxtrain.optim._transform import EmptyState as EmptyState
from fxtrain.optim._transform import GradientTransformation, apply_updates, chain, identity, set_to_zero, stateless
from fxtrain.tree import MaskedNode as MaskedNode

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
