"""Steps: pure functions that advance the training state, and the parts to write one by hand."""

from fxtrain.step._evaluate import EvalFunction, eval_step
from fxtrain.step._gradients import Gradient, gradients
from fxtrain.step._microbatches import mean_gradient as mean_gradient
from fxtrain.step._microbatches import microbatches as microbatches
from fxtrain.step._several import Several as Several
from fxtrain.step._step import Step
from fxtrain.step._tap import tap
from fxtrain.step._train import apply_gradients, train_step
from fxtrain.step._weights import weighted
from fxtrain.step._wrap import wrap_step

__all__ = [
    "EvalFunction",
    "Gradient",
    "Step",
    "apply_gradients",
    "eval_step",
    "gradients",
    "tap",
    "train_step",
    "weighted",
    "wrap_step",
]
