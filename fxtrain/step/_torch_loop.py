"""Refuses parts of a plain PyTorch loop in a loss function: optimizers, gradient scalers and ``backward()``."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fxtrain.model._captured_values import captured_values
from fxtrain.step._check_function import ContractError, code_of, place_of


@contextlib.contextmanager
def torch_optimizers_refused(function: Callable[..., object]) -> Iterator[None]:
    """Raises if a loss function uses a torch optimizer or gradient scaler, whose state is not part of the TrainState.

    Raises:
        ContractError: On entry if the function reads one by name, and inside before a torch optimizer makes a step.
    """
    names = _names_used_by(function)
    for name, value in captured_values(function):
        kind = type(value).__name__
        if name.startswith("self.") and name.removeprefix("self.") not in names:
            continue  # An attribute of the method's object that the method does not read.
        if isinstance(value, torch.optim.Optimizer):
            raise _optimizer_refused(function, f"reads the optimizer {name} ({kind})")
        if isinstance(value, torch.amp.GradScaler):
            raise ContractError(
                f"expected {place_of(function)} to only compute a loss, got one that reads the gradient scaler "
                f'{name} ({kind}). Return the loss itself, and give the step precision="fp16".'
            )
    thread = threading.get_ident()

    def refuse(optimizer: torch.optim.Optimizer, *_: object) -> None:
        if threading.get_ident() == thread:
            raise _optimizer_refused(function, f"calls step() of an optimizer ({type(optimizer).__name__})")

    handle = register_optimizer_step_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


def backward_refused(who: str, where: str) -> ContractError:
    """Returns the error for a loss function that has run the backward pass of its own loss.

    Args:
        who: Name of the function.
        where: The line, as `` at file:line``, or an empty string.
    """
    return ContractError(
        f"expected {who} to return a loss that can be differentiated, got one whose backward pass already ran{where}. "
        "Remove loss.backward(): the step computes the gradients and passes them to the optimizer."
    )


def _optimizer_refused(function: Callable[..., object], what: str) -> ContractError:
    return ContractError(
        f"expected {place_of(function)} to only compute a loss, got one that {what}. Remove zero_grad(), backward() "
        "and step(): the step computes the gradients and applies the tx given to train_step."
    )


def _names_used_by(function: object) -> frozenset[str]:
    """Returns the names of the globals and attributes that a function uses."""
    code = code_of(function)
    return frozenset(code.co_names) if code is not None else frozenset()
