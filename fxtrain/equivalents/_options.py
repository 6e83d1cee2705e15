"""The options of the optimizers of ``torch.optim``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypedDict

from torch import Tensor

from fxtrain.core import Scalar


class Options(TypedDict):
    """The arguments of a ``torch.optim`` class, or the options of a parameter group. Each class has some of them."""

    lr: Scalar | Callable[[Tensor], Tensor]  # a schedule only in from_torch
    betas: tuple[Scalar, Scalar]
    eps: Scalar
    weight_decay: Scalar
    decoupled_weight_decay: bool
    maximize: bool
    amsgrad: bool
    momentum: Scalar
    nesterov: bool
    dampening: Scalar
    momentum_decay: Scalar  # NAdam
    alpha: Scalar  # RMSprop, ASGD
    centered: bool  # RMSprop
    lr_decay: Scalar  # Adagrad
    initial_accumulator_value: Scalar  # Adagrad
    rho: Scalar  # Adadelta
    etas: tuple[Scalar, Scalar]  # Rprop
    step_sizes: tuple[Scalar, Scalar]  # Rprop
    lambd: Scalar  # ASGD
    t0: Scalar  # ASGD
    beta2_decay: Scalar  # Adafactor
    d: Scalar  # Adafactor
    adjust_lr_fn: str | None  # Muon
    ns_coefficients: tuple[float, float, float]  # Muon
    ns_steps: int  # Muon


FOR_SPEED = ("foreach", "fused", "capturable", "differentiable")
"""Options of torch's optimizers that do not change what they compute."""


def defaults_of(optimizer: type) -> dict[str, Any]:
    """Returns the options of a class of ``torch.optim``, with their defaults."""
    parameters = inspect.signature(optimizer).parameters
    return {name: value.default for name, value in parameters.items() if name != "params"}
