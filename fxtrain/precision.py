"""Precision: which dtype parameters are kept in, computed in and reported in; dynamic loss scaling for float16."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Control, Gradients, TrainState
from fxtrain.fold import Handler, stateful

SLOT = "loss_scale"


@dataclasses.dataclass(frozen=True)
class LossScale:
    """How a dynamic loss scale moves: halved when a gradient overflows, doubled after ``period`` good steps.

    The loss is multiplied by the scale, so that small gradients do not vanish in float16, and the gradients are
    divided by it. A step whose gradients are not finite is skipped.

    Args:
        initial: The first scale.
        factor: By what it is divided and multiplied; above 1.
        period: Good steps before it grows.
        floor: It never falls below this.
    """

    initial: float = 2.0**15
    factor: float = 2.0
    period: int = 2000
    floor: float = 1.0

    def __post_init__(self) -> None:
        if self.initial <= 0 or self.factor <= 1 or self.period < 1 or self.floor <= 0:
            raise ValueError(f"A loss scale needs initial > 0, factor > 1, period >= 1 and floor > 0, and {self} came.")


class LossScaleState(NamedTuple):
    """The memory of a dynamic loss scale."""

    scale: Tensor  # float32 []
    good_steps: Tensor  # int64 []: finite steps since the scale last moved


@dataclasses.dataclass(frozen=True)
class Policy:
    """The dtypes of a step.

    Args:
        param: Of the parameters in the state, and so of gradients and optimizer. Must be what the state has.
        compute: Of matrix products and convolutions, by ``torch.autocast``, which keeps norms, softmax and losses
            in float32. Equal to ``param`` it changes nothing.
        output: Of the loss and the metrics.
        loss_scale: A dynamic loss scale, kept in the state's slot ``"loss_scale"``; None for none.

    Raises:
        TypeError: If a dtype is not floating.
    """

    param: torch.dtype = torch.float32
    compute: torch.dtype = torch.float32
    output: torch.dtype = torch.float32
    loss_scale: LossScale | None = None

    def __post_init__(self) -> None:
        for field in ("param", "compute", "output"):
            dtype = getattr(self, field)
            if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
                raise TypeError(f"Policy({field}={dtype!r}): a floating torch.dtype is wanted, such as torch.bfloat16.")

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """The context that the forward pass runs in."""
        if self.compute == self.param:
            return contextlib.nullcontext()
        # No cache of cast weights: it would hold tensors of one transform's level beyond it.
        return torch.autocast(device.type, dtype=self.compute, cache_enabled=False)

    def check(self, params: Any) -> None:
        """Refuses floating parameters of another dtype than ``param``."""
        for path, leaf in zip(tree.paths(params, "state.params"), tree.leaves(params), strict=True):
            if leaf.is_floating_point() and leaf.dtype != self.param:
                raise TypeError(
                    f"{path} is {leaf.dtype}, and the precision policy keeps parameters in {self.param}: "
                    f"fxtrain.init(..., dtype={self.param}) casts them."
                )


def policy_of(precision: str | Policy | None) -> Policy | None:
    """The policy of a name: ``"bf16"`` or ``"fp16"`` (computed over float32 parameters), or ``"fp32"``.

    Example:
        >>> policy_of("bf16").compute
        torch.bfloat16
    """
    if precision is None or isinstance(precision, Policy):
        return precision
    named = {
        "fp32": Policy(),
        "bf16": Policy(compute=torch.bfloat16),
        "fp16": Policy(compute=torch.float16, loss_scale=LossScale()),
    }
    if precision not in named:
        raise ValueError(f"precision={precision!r}: choose {', '.join(map(repr, named))}, or give an fxtrain.Policy.")
    return named[precision]


def dynamic_loss_scale(scale: LossScale) -> Handler:
    """The traced callback that skips overflowing steps and moves the scale."""

    def init(state: TrainState) -> LossScaleState:
        return LossScaleState(
            scale=torch.tensor(scale.initial, device=state.step.device),
            good_steps=torch.tensor(0, device=state.step.device),
        )

    def update(state: TrainState, event: Gradients, memory: LossScaleState) -> tuple[LossScaleState, Control]:
        finite = all_finite(event.grads)
        grown = memory.good_steps + 1 >= scale.period
        up = torch.where(grown, memory.scale * scale.factor, memory.scale)
        down = (memory.scale / scale.factor).clamp(min=scale.floor)
        moved = LossScaleState(
            # A scale that overflows itself would never come back.
            scale=torch.where(finite, torch.where(up.isfinite(), up, memory.scale), down),
            good_steps=torch.where(finite & ~grown, memory.good_steps + 1, 0),
        )
        return moved, Control(skip_update=~finite, reason="gradients overflowed at this loss scale")

    return stateful(SLOT, init, update)


def all_finite(values: Any) -> Tensor:
    """Whether every element of every leaf is finite: bool []."""
    finite = [leaf.isfinite().all() for leaf in tree.leaves(values)]
    return torch.stack(finite).all() if finite else torch.tensor(True)
