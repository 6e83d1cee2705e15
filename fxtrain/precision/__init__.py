"""Mixed precision: the dtypes of parameters, computation and outputs, and dynamic loss scaling for float16."""

from fxtrain.precision._autocast import HALF as HALF
from fxtrain.precision._loss_scale import SLOT as SLOT
from fxtrain.precision._loss_scale import LossScale, dynamic_loss_scale, loss_scale_of
from fxtrain.precision._loss_scale import LossScaleState as LossScaleState
from fxtrain.precision._loss_scale import all_finite as all_finite
from fxtrain.precision._loss_scale import finite_leaves as finite_leaves
from fxtrain.precision._policy import Policy, policy_of

__all__ = ["LossScale", "Policy", "dynamic_loss_scale", "loss_scale_of", "policy_of"]
