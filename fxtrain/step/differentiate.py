"""Two ways to differentiate, inside torch.func and by torch.autograd on detached leaves, and their choice."""

from __future__ import annotations

import contextlib
import os
import traceback
import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.model import ValuesNeededError
from fxtrain.model.captured import is_of_users
from fxtrain.rng.tracing import is_traced

Differentiate = Literal["auto", "func", "autograd"]

Objective = Callable[[Any], tuple[Tensor, Any]]
"""From the trainable parameters to the value that is differentiated, and to a pytree of tensors beside it."""

_REFUSALS = (
    "autograd.Function with functorch transforms",
    "functorch transform. This is unsupported",
    "don't yet support saved tensor hooks",
)
"""Parts of the messages by which torch.func refuses a function, whatever its values."""

_LONGEST_REASON = 200  # characters of an error that a warning repeats


class Differentiation:
    """The differentiation of one function, which keeps to torch.autograd once torch.func has refused it.

    Args:
        way: ``"auto"``, ``"func"`` or ``"autograd"``.
        who: The function, for warnings and errors.

    Raises:
        ValueError: If ``way`` is none of these.
    """

    def __init__(self, way: Differentiate, who: str) -> None:
        if way not in get_args(Differentiate):
            raise ValueError(f"expected differentiate='auto', 'func' or 'autograd', got {way!r}.")
        self._way, self._who = way, who

    def __call__(self, objective: Objective, trainable: Any) -> tuple[Any, Any, Any]:
        """As ``by_func`` and ``by_autograd``.

        Raises:
            ValueError: If ``"autograd"`` was chosen inside a transform of torch.func or under outer derivatives.
        """
        dynamo = torch.compiler.is_dynamo_compiling()
        nested = not dynamo and _is_differentiated(trainable)
        if nested and self._way == "autograd":
            raise ValueError(
                f"expected gradients of {self._who} outside of torch.func.vmap, torch.func.grad and torch.autograd, "
                "got differentiate='autograd' inside one of them, whose derivatives would be lost. Choose "
                "differentiate='func'."
            )
        if self._way == "func" or nested or dynamo:
            return (by_autograd if self._way == "autograd" else by_func)(objective, trainable)
        if self._way == "autograd":
            return by_autograd(objective, trainable)
        try:
            return by_func(objective, trainable)
        except (ValuesNeededError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            refusal = error
        try:
            found = by_autograd(objective, trainable)
        except Exception as error:
            # What fails both ways is a mistake of the function's own, which torch.func may have hidden.
            raise (error if _is_refusal(refusal) else refusal) from None
        self._way = "autograd"
        warnings.warn(
            f"{self._who} is differentiated by torch.autograd from now on, as torch.func refuses it{_where(refusal)}: "
            f"{_reason(refusal)} The numbers are the same. Give differentiate='autograd' to choose this from the "
            "start.",
            UserWarning,
            stacklevel=2,
        )
        if is_traced():
            raise ValuesNeededError(f"The trace of {self._who} holds two forward passes. Trace it again.")
        return found


def by_func(objective: Objective, trainable: Any) -> tuple[Any, Any, Any]:
    """Gradients inside ``torch.func``, which nest in its other transforms.

    Args:
        objective: Differentiated at ``trainable``.
        trainable: A pytree of floating and complex tensors.

    Returns:
        The gradients; a pytree like them of Python bools, False where the value does not depend on the parameter; and
        what the objective returned beside its value.
    """
    if torch.compiler.is_dynamo_compiling():  # cannot follow torch.autograd.grad inside a transform
        grads, aux = torch.func.grad(objective, has_aux=True)(trainable)
        return grads, tree.map(lambda _: True, grads), aux
    used: Any = None

    def differentiated(trainable: Any) -> tuple[Tensor, Any]:
        nonlocal used
        value, aux = objective(trainable)
        # torch.func.grad replaces an absent gradient by zeros, and nothing says which were absent. The graph of the
        # backward pass is kept for the transforms and the autograd around this one.
        grads, used = _grads(value, trainable, create_graph=True)
        return value, (grads, aux)

    found: Any = torch.func.vjp(differentiated, trainable, has_aux=True)
    grads, aux = found[2]
    return grads, used, aux


def by_autograd(objective: Objective, trainable: Any) -> tuple[Any, Any, Any]:
    """Gradients by ``torch.autograd.grad``, which takes all that a plain PyTorch loop takes.

    Arguments and results are those of ``by_func``. Nothing outside changes: no tensor gets a ``grad``, and the graph is
    freed.

    Raises:
        ValueError: If a transform of ``torch.func`` surrounds the call, or a graph of autograd leads to the parameters:
            derivatives of the gradients would be lost.
    """
    with torch.enable_grad():
        leaves = tree.map(lambda parameter: parameter.detach().requires_grad_(), trainable)
        value, aux = objective(leaves)
        grads, used = _grads(value, leaves, create_graph=False)
    return grads, used, tree.map(torch.detach, aux)


def outside_inference_mode() -> contextlib.AbstractContextManager[Any]:
    """A context for gradients: in inference mode those of torch 2.11 are zero, without an error."""
    inferring = not torch.compiler.is_dynamo_compiling() and torch.is_inference_mode_enabled()
    return torch.inference_mode(False) if inferring else contextlib.nullcontext()


def ordinary(values: Any) -> Any:
    """The values, with copies of those that inference mode made: autograd saves none of these for a backward pass."""
    if torch.compiler.is_dynamo_compiling() or not any(map(_is_inference, tree.leaves(values))):
        return values
    with torch.inference_mode(False):
        return tree.map(lambda leaf: leaf.clone() if _is_inference(leaf) else leaf, values)


def _is_inference(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_inference()


def _grads(value: Tensor, trainable: Any, *, create_graph: bool) -> tuple[Any, Any]:
    leaves, structure = tree.flatten(trainable)
    found: Any = [None] * len(leaves)
    if value.requires_grad:
        found = torch.autograd.grad(value, leaves, create_graph=create_graph, allow_unused=True)
    grads = [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(found, leaves, strict=True)]
    return tree.unflatten(structure, grads), tree.unflatten(structure, [grad is not None for grad in found])


def _is_differentiated(values: Any) -> bool:
    """Whether a transform of torch.func surrounds this call, or autograd records what is computed from the values."""
    if torch._C._functorch.peek_interpreter_stack() is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return True
    return torch.is_grad_enabled() and any(leaf.requires_grad for leaf in tree.leaves(values))


def _is_refusal(error: Exception) -> bool:
    return any(part in str(error) for part in _REFUSALS)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{text[:_LONGEST_REASON]}..." if len(text) > _LONGEST_REASON else text


def _where(error: Exception) -> str:
    """The line at which the error was raised: the innermost one of users, and the innermost one outside of torch."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
    skipped = (os.path.dirname(torch.__file__) + os.sep, ours)
    outside = [frame for frame in frames if not frame.filename.startswith(skipped)]
    users = [frame for frame in frames if is_of_users(frame.filename)]
    lines = dict.fromkeys(f"{frame.filename}:{frame.lineno}" for frame in (*users[-1:], *outside[-1:]))
    return f" at {', by way of '.join(lines)}" if lines else ""
