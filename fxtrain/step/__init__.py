"""Steps: pure functions that advance the training state, and the parts to write one by hand."""

from fxtrain.step._eval_step import EvalFunction, eval_step
from fxtrain.step._gradients import Gradient, gradients
from fxtrain.step._loss_results import Weighted, weighted
from fxtrain.step._microbatches import mean_gradient, microbatches
from fxtrain.step._step import ManySteps, Step, take_steps
from fxtrain.step._tap import tap
from fxtrain.step._train_step import train_step
from fxtrain.step._update import apply_gradients, update
from fxtrain.step._wrap_step import WrappedStep, wrap_step

__all__ = [
    "EvalFunction",
    "Gradient",
    "Step",
    "Weighted",
    "WrappedStep",
    "apply_gradients",
    "eval_step",
    "gradients",
    "tap",
    "train_step",
    "update",
    "weighted",
    "wrap_step",
]
