"""Errors for loss functions that do not depend on a trainable parameter, or that run parts of a plain PyTorch loop."""

from __future__ import annotations

import contextlib
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode

from fxtrain import tree
from fxtrain._torch_internals.dynamo import inlined_only
from fxtrain.core._tracebacks import is_of_users, place
from fxtrain.model._captured_values import captured_values
from fxtrain.step._check_function import ContractError, code_of, place_of


@contextlib.contextmanager
def torch_optimizers_refused(function: Callable[..., object]) -> Iterator[None]:
    """Raises if a loss function uses a torch optimizer or gradient scaler, whose state is not part of the TrainState.

    Raises:
        ContractError: On entry if the function reads one by name, and inside before a torch optimizer makes a step.
    """
    code = code_of(function)
    for name, value in captured_values(function):
        kind = type(value).__name__
        if name.startswith("self.") and (code is None or name.removeprefix("self.") not in code.co_names):
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


def _optimizer_refused(function: Callable[..., object], what: str) -> ContractError:
    return ContractError(
        f"expected {place_of(function)} to only compute a loss, got one that {what}. Remove zero_grad(), backward() "
        "and step(): the step computes the gradients and applies the tx given to train_step."
    )


def missing_gradient(
    function: Callable[..., object], wrt: str | None, run: Callable[[Callable[[Tensor], None]], object]
) -> ValueError:
    """Returns the error for a loss without a gradient. It is a mistake, unlike a gradient of zero.

    Args:
        function: The loss function.
        wrt: The trained entry of a dict of modules, or None if all are trained.
        run: Recomputes the loss from parameters that require gradients, and calls its argument with the loss.
    """
    what = "a trainable parameter" if wrt is None else f"a trainable parameter of the entry {wrt!r}"
    return ValueError(
        f"expected a loss that depends on {what}, got one from {place_of(function)} that depends on none, so nothing "
        f"would be trained. {_cause(run) or _general_remedy(function)}"
    )


def _general_remedy(function: Callable[..., object]) -> str:
    modules = [name for name, value in captured_values(function) if isinstance(value, nn.Module)]
    instead = f" instead of {', '.join(modules)}, which it captures" if modules else ""
    return (
        f"Call the model that is passed to the loss function{instead}, outside torch.no_grad() and without .detach() "
        "or .item()."
    )


def _cause(run: Callable[[Callable[[Tensor], None]], object]) -> str:
    found: list[str] = []
    try:
        with _Cuts() as cuts:
            run(lambda loss: found.append(cuts.of(loss)))
    except Exception:
        return ""  # A failed search must not replace the error about the loss.
    return found[0] if found else ""


@inlined_only
class _Cuts(TorchFunctionMode):
    """Follows tensors that depend on a parameter but have no gradient, from the operation that cut them off."""

    def __init__(self) -> None:
        super().__init__()
        # Keeps the tensors alive, so that no id is reused.
        self._alive: list[Any] = []
        self._cuts: dict[int, str] = {}
        self._to_python = ""

    def of(self, loss: Tensor) -> str:
        """Returns the operation that cut the loss off and a fix, or an empty string."""
        return self._cuts.get(id(loss), self._to_python)

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree.leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        before = any(leaf.requires_grad for leaf in inputs)
        output = func(*args, **kwargs)
        outputs = [leaf for leaf in tree.leaves(output) if isinstance(leaf, Tensor)]
        cut = next((self._cuts[id(leaf)] for leaf in inputs if id(leaf) in self._cuts), "")
        if func.__name__ in _TO_PYTHON_VALUE and (before or cut):
            self._to_python = cut or _cut_by(func)
        elif outputs and not any(leaf.requires_grad for leaf in outputs) and (before or cut):
            self._alive += outputs
            cut = cut or _cut_by(func)
            self._cuts |= {id(leaf): cut for leaf in outputs}
        return output


_TO_PYTHON_VALUE = ("item", "tolist", "numpy", "__float__", "__int__", "__array__")
_DETACHING = ("detach", "detach_", "__get__", *_TO_PYTHON_VALUE)


def _cut_by(func: Callable[..., object]) -> str:
    name, line = func.__name__, _line_of_users()
    if torch.is_inference_mode_enabled():
        return f"{name}{line} runs under torch.inference_mode(). Move the forward pass out of it."
    if not torch.is_grad_enabled():
        return f"{name}{line} runs under torch.no_grad(). Move the forward pass out of it."
    if name == "__get__":
        name = f".{getattr(func.__self__, '__name__', 'data')}"
    elif name in _DETACHING:
        name = f".{name}()"
    if name.startswith("."):
        return f"{name}{line} detaches the loss from the parameters. Remove it."
    return f"{name}{line} has no gradient. Compute the loss with a differentiable function."


def _line_of_users() -> str:
    for frame, line in traceback.walk_stack(sys._getframe(1)):
        if is_of_users(frame.f_code.co_filename):
            return f" at {place(frame.f_code.co_filename, line)}"
    return ""
