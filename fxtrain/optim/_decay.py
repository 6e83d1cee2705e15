"""Weight decay, which pulls parameters toward zero."""

# pyright: reportIncompatibleMethodOverride=false
# As in optax, states have a field named `count`, which shadows the method of tuples.

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fxtrain.core import Scalar, Tree, check_non_negative
from fxtrain.equivalents import refuse_foreign
from fxtrain.optim._initial_state import start_count
from fxtrain.optim._leafwise import map_with_params
from fxtrain.optim._masking import Mask, masked
from fxtrain.optim._scaling import ScalarOrSchedule
from fxtrain.optim._transform import GradientTransformation, identity, stateless
from fxtrain.schedules import Schedule


class WeightDecaySchedule(NamedTuple):
    """The state of a scheduled weight decay."""

    count: Tensor  # int64 []: updates made


def add_decayed_weights(weight_decay: ScalarOrSchedule = 0.0, mask: Mask | None = None) -> GradientTransformation:
    """Adds a multiple of the parameters to the updates: ``u = g + weight_decay * p``.

    Before an adaptive rescaling this is L2 regularization. Between the rescaling and the learning rate it is the
    decoupled weight decay of AdamW.

    Args:
        weight_decay: A float, a tensor of shape [], or a schedule.
        mask: Which parameters decay: a pytree of bools, or a function ``(path, leaf) -> bool``. Defaults to all.

    Example:
        >>> import torch
        >>> params = {"norm.scale": torch.ones(2), "linear.weight": torch.ones(2, 2)}
        >>> tx = add_decayed_weights(0.1, mask=lambda path, leaf: leaf.ndim > 1)
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> float(updates["norm.scale"][0]), float(updates["linear.weight"][0, 0])
        (1.0, 1.10...)
    """
    refuse_foreign("weight_decay", "a number or a schedule", weight_decay, as_schedule=True)
    tx = _scheduled(weight_decay) if callable(weight_decay) else _constant(weight_decay)
    return tx if mask is None else masked(tx, mask)


def _constant(weight_decay: float | Tensor) -> GradientTransformation:
    check_non_negative(weight_decay=weight_decay)
    if not isinstance(weight_decay, Tensor) and weight_decay == 0:
        return identity()

    def decayed(updates: Tree, params: Tree) -> Tree:
        return _decayed(updates, params, weight_decay)

    return stateless(decayed)


def _scheduled(weight_decay: Schedule) -> GradientTransformation:
    def update(
        updates: Tree, opt_state: WeightDecaySchedule, params: Tree | None = None
    ) -> tuple[Tree, WeightDecaySchedule]:
        decayed = _decayed(updates, params, weight_decay(opt_state.count))
        return decayed, WeightDecaySchedule(opt_state.count + 1)

    def init(params: Tree) -> WeightDecaySchedule:
        return WeightDecaySchedule(start_count(params))

    return GradientTransformation(init, update)


def _decayed(updates: Tree, params: Tree, rate: Scalar) -> Tree:
    return map_with_params(lambda update, param: update + rate * param, "add_decayed_weights", updates, params)
