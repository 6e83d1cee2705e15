"""Steps: pure functions that move the state forward, and the pieces to write one by hand."""

from fxtrain.step.evaluate import EvalFunction as EvalFunction
from fxtrain.step.evaluate import eval_step as eval_step
from fxtrain.step.gradients import Gradient as Gradient
from fxtrain.step.gradients import gradients as gradients
from fxtrain.step.microbatches import mean_gradient as mean_gradient
from fxtrain.step.microbatches import microbatches as microbatches
from fxtrain.step.several import Several as Several
from fxtrain.step.step import Step as Step
from fxtrain.step.tap import tap as tap
from fxtrain.step.train import apply_gradients as apply_gradients
from fxtrain.step.train import train_step as train_step
from fxtrain.step.weights import weighted as weighted
from fxtrain.step.wrap import wrap_step as wrap_step
