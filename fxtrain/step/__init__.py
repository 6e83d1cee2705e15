"""Steps: pure functions that advance the training state, and the parts to write one by hand."""

from fxtrain.step._evaluate import EvalFunction as EvalFunction
from fxtrain.step._evaluate import eval_step as eval_step
from fxtrain.step._gradients import Gradient as Gradient
from fxtrain.step._gradients import gradients as gradients
from fxtrain.step._microbatches import mean_gradient as mean_gradient
from fxtrain.step._microbatches import microbatches as microbatches
from fxtrain.step._several import Several as Several
from fxtrain.step._step import Step as Step
from fxtrain.step._tap import tap as tap
from fxtrain.step._train import apply_gradients as apply_gradients
from fxtrain.step._train import train_step as train_step
from fxtrain.step._weights import weighted as weighted
from fxtrain.step._wrap import wrap_step as wrap_step
