"""Mixed precision: the dtypes of parameters, computation and outputs, and dynamic loss scaling for float16."""

from fxtrain.precision._loss_scale import LossScale, dynamic_loss_scale, finite_leaves, loss_scale_of
from fxtrain.precision._policy import HALF, Policy, policy_of

__all__ = ["LossScale", "Policy", "dynamic_loss_scale", "loss_scale_of", "policy_of"]
