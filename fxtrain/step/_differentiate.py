"""Chooses between differentiation by torch.func and by torch.autograd."""

from __future__ import annotations

import traceback
import warnings
from typing import Literal, get_args

import torch

from fxtrain import tree
from fxtrain._torch_internals.dispatch import is_transformed
from fxtrain._torch_internals.tracing import has_symbolic_sizes, is_traced
from fxtrain.core import Tree, check_choice, truncate
from fxtrain.core._tracebacks import places
from fxtrain.model import ValuesNeededError
from fxtrain.model._wrapped_forward import is_forward_wrapped
from fxtrain.step._backward import Objective, by_autograd, by_func
from fxtrain.step._check_function import ContractError
from fxtrain.step._torch_loop import backward_refused

Differentiate = Literal["auto", "func", "autograd"]

_REJECTIONS = (
    "autograd.Function with functorch transforms",
    "functorch transform. This is unsupported",
    "don't yet support saved tensor hooks",
)
"""Parts of the messages with which torch.func rejects a function, independently of values."""

_BACKWARD_ERROR = "backward() called inside a functorch transform"
_CAPTURED_WRITE_ERROR = "would mutate a captured Tensor"
_REENTRANT_ERROR = "use_reentrant=True, torch.utils.checkpoint is incompatible"

# Maximum number of characters of an error that a warning quotes.
_MAX_REASON_LENGTH = 200


class Differentiation:
    """Differentiates one function, and stays with torch.autograd once torch.func has rejected it.

    Args:
        way: ``"auto"``, ``"func"`` or ``"autograd"``.
        who: Name of the function, for warnings and errors.

    Raises:
        ValueError: If ``way`` is none of these.
    """

    def __init__(self, way: Differentiate, who: str) -> None:
        check_choice("differentiate", way, get_args(Differentiate))
        self._way, self._who = way, who
        # Whether a reentrant checkpoint needs a backward pass to all leaves.
        self._to_all_leaves = False

    def __call__(self, objective: Objective, trainable: Tree) -> tuple[Tree, Tree, Tree]:
        """Returns the result of ``by_func`` or ``by_autograd``.

        Args:
            objective: The function to differentiate at ``trainable``.
            trainable: A pytree of floating and complex tensors.

        Raises:
            ValueError: If ``"autograd"`` was chosen inside a transform of torch.func or under outer derivatives.
        """
        dynamo = torch.compiler.is_dynamo_compiling()
        nested = not dynamo and _is_differentiated(trainable)
        if nested and self._way == "autograd":
            raise ValueError(
                f"expected gradients of {self._who} outside torch.func.vmap, torch.func.grad and torch.autograd, got "
                "differentiate='autograd' inside one of them, whose derivatives would be lost. Choose "
                "differentiate='func'."
            )
        if self._way == "func" or nested or dynamo:
            return (by_autograd if self._way == "autograd" else by_func)(objective, trainable)
        # A forward pass compiled by torch.compile cannot run inside torch.func.
        # torch.func converts some sizes to ints, which would specialize a trace with symbolic sizes to one size.
        if self._way == "autograd" or is_forward_wrapped() or (self._way == "auto" and has_symbolic_sizes()):
            return self._by_autograd(objective, trainable)
        try:
            return by_func(objective, trainable)
        except (ValuesNeededError, ContractError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            # torch.autograd would allow the write.
            if _CAPTURED_WRITE_ERROR in str(error):
                raise
            rejection = error
        try:
            found = self._by_autograd(objective, trainable)
        except ContractError:
            raise
        except Exception as error:
            if _BACKWARD_ERROR in str(rejection):
                raise backward_refused(self._who, _where(rejection)) from error
            # The function fails both ways, so it is wrong itself. A rejection by torch.func hides its own error.
            raise (error if _is_rejection(rejection) else rejection) from None
        if not _is_rejection(rejection):
            self._raise_if_transient(rejection, objective, trainable)
        self._way = "autograd"
        warnings.warn(
            f"{self._who} is differentiated by torch.autograd from now on, because torch.func rejected it"
            f"{_where(rejection)}: {_reason(rejection)} The gradients are the same. Pass differentiate='autograd' to "
            "use it from the start.",
            UserWarning,
            stacklevel=2,
        )
        if is_traced():
            raise ValuesNeededError(
                f"expected one forward pass of {self._who} in the trace, got a second one by torch.autograd. Trace it "
                "again."
            )
        return found

    @staticmethod
    def _raise_if_transient(error: Exception, objective: Objective, trainable: Tree) -> None:
        """Raises ``error`` if it was transient, such as a failed read, and not a rejection by torch.func."""
        try:
            by_func(objective, trainable)
        except Exception:
            return
        raise error

    def _by_autograd(self, objective: Objective, trainable: Tree) -> tuple[Tree, Tree, Tree]:
        try:
            return by_autograd(objective, trainable, whole=self._to_all_leaves)
        except RuntimeError as error:
            if self._to_all_leaves or _REENTRANT_ERROR not in str(error):
                raise
        self._to_all_leaves = True
        return by_autograd(objective, trainable, whole=True)


def _is_differentiated(values: Tree) -> bool:
    """Whether a transform of torch.func surrounds this call, or autograd records operations on the values."""
    if is_transformed():
        return True
    return torch.is_grad_enabled() and any(leaf.requires_grad for leaf in tree.leaves(values))


def _is_rejection(error: Exception) -> bool:
    return any(part in str(error) for part in _REJECTIONS)


def _reason(error: Exception) -> str:
    return truncate(" ".join(str(error).split()) or type(error).__name__, _MAX_REASON_LENGTH)


def _where(error: Exception) -> str:
    """Returns the innermost line of the user's code, and that of the library it calls, if any."""
    found = [frame for frame in places(traceback.extract_tb(error.__traceback__)) if frame is not None]
    lines = [f"{frame.filename}:{frame.lineno}" for frame in found]
    return f" at {', through '.join(lines)}" if lines else ""
