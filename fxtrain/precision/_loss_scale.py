"""Dynamic loss scaling for float16."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Control, Gradients, TrainState, Tree
from fxtrain.core._shard import full_tensor
from fxtrain.fold import Handler, stateful

SLOT = "loss_scale"


@dataclasses.dataclass(frozen=True)
class LossScale:
    """The parameters of dynamic loss scaling.

    The loss is multiplied by the scale, so that small gradients do not underflow in float16, and the gradients are
    divided by it. If a gradient is not finite, the step is skipped and the scale is divided by ``factor``. After
    ``period`` finite steps, the scale is multiplied by ``factor``.

    Args:
        initial: The initial scale.
        factor: The factor by which the scale changes; above 1. A power of two causes no rounding errors.
        period: Number of finite steps before the scale grows.
        floor: The lower bound of the scale.

    Raises:
        ValueError: Unless factor > 1, period >= 1 and 0 < floor <= initial.

    Example:
        >>> LossScale(initial=1024.0).factor
        2.0

    References:
        Micikevicius et al., Mixed Precision Training, 2018.
    """

    initial: float = 2.0**15
    factor: float = 2.0
    period: int = 2000
    floor: float = 1.0

    def __post_init__(self) -> None:
        if not (self.initial > 0 and self.factor > 1 and self.period >= 1 and 0 < self.floor <= self.initial):
            raise ValueError(f"expected factor > 1, period >= 1 and 0 < floor <= initial, got {self}.")


class LossScaleState(NamedTuple):
    """The state of dynamic loss scaling."""

    scale: Tensor  # float32 []
    good_steps: Tensor  # int64 []: finite steps since the scale last changed


def dynamic_loss_scale(scale: LossScale) -> Handler:
    """Returns the traced callback that skips steps whose gradients overflow and adjusts the loss scale.

    ``train_step(precision="fp16")`` adds it. Hand-written steps need it in ``Step(function, callbacks=...)``.

    Example:
        >>> import fxtrain as fx
        >>> state = fx.attach(fx.init(torch.nn.Linear(2, 1)), dynamic_loss_scale(LossScale(initial=1024.0)))
        >>> loss_scale_of(state)
        tensor(1024.)
    """

    def init(state: TrainState) -> LossScaleState:
        return LossScaleState(
            scale=torch.tensor(scale.initial, device=state.step.device),
            good_steps=torch.tensor(0, device=state.step.device),
        )

    def update(state: TrainState, event: Gradients, old: LossScaleState) -> tuple[LossScaleState, Control]:
        finite = finite_leaves(event.grads).all()
        grows = old.good_steps + 1 >= scale.period
        up = torch.where(grows, old.scale * scale.factor, old.scale)
        down = (old.scale / scale.factor).clamp(min=scale.floor)
        new = LossScaleState(
            # An infinite scale would never become finite again.
            scale=torch.where(finite, torch.where(up.isfinite(), up, old.scale), down),
            good_steps=torch.where(finite & ~grows, old.good_steps + 1, 0),
        )
        return new, Control(skip_update=~finite, reason="gradients overflowed at this loss scale")

    return stateful(SLOT, init, update)


def loss_scale_of(state: TrainState) -> Tensor:
    """Returns the current loss scale of a state: float32 [].

    Raises:
        ValueError: If the state has no loss scale.

    Example:
        >>> import fxtrain as fx
        >>> step = fx.train_step(lambda model, batch: model(batch).sum(), fx.optim.sgd(0.1), precision="fp16")
        >>> loss_scale_of(fx.attach(fx.init(torch.nn.Linear(2, 1), fx.optim.sgd(0.1)), step))
        tensor(32768.)
    """
    if SLOT not in state.slots:
        raise ValueError(
            f"expected the loss scale of the precision policy in the slot {SLOT!r}, got a state without it. Create the "
            "hand-written step as Step(function, callbacks=fxtrain.precision.dynamic_loss_scale(policy.loss_scale)), "
            "which attaches the slot and updates the scale."
        )
    return state.slots[SLOT].scale


def finite_leaves(values: Tree) -> Tensor:
    """Whether every element of each leaf is finite: bool [leaves]."""
    finite = [full_tensor(leaf.isfinite().all()) for leaf in tree.leaves(values)]
    return torch.stack(finite) if finite else torch.ones(0, dtype=torch.bool)
