"""Differentiates by torch.func, which nests in its transforms, or by torch.autograd on detached leaves."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain._torch_internals.dispatch import is_transformed
from fxtrain._torch_internals.tracing import has_symbolic_sizes, is_traced
from fxtrain.core import Tree, check_choice, truncate, warn
from fxtrain.core._graph_marks import marking_pass
from fxtrain.core._tracebacks import place, places
from fxtrain.model import ValuesNeededError
from fxtrain.model._model_calls import is_forward_wrapped
from fxtrain.model._recomputed_regions import CheckpointReached, leaving_checkpoints_to_autograd
from fxtrain.step._check_function import ContractError

Differentiate = Literal["auto", "func", "autograd"]

Find = Callable[[Tensor], Tree]
"""Maps the differentiated value to the results of its backward pass."""

Objective = Callable[[Tree, Find, bool], tuple[Tensor, Tree, Tree]]
"""Maps the trainable parameters, a function that runs the backward pass, and whether to detach all other inputs to the
value, the results of the backward pass, and a pytree of auxiliary tensors."""

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
        # Whether the function has activation checkpoints, which torch.func cannot recompute outside of a trace.
        self._has_checkpoints = False

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
        if nested:
            return by_func(objective, trainable)
        if self._way == "func" or dynamo:
            return _detached((by_autograd if self._way == "autograd" else by_func)(objective, trainable))
        # A forward pass compiled by torch.compile cannot run inside torch.func.
        # torch.func converts some sizes to ints, which would specialize a trace with symbolic sizes to one size.
        if self._way == "autograd" or is_forward_wrapped() or (self._way == "auto" and has_symbolic_sizes()):
            return self._by_autograd(objective, trainable)
        if self._has_checkpoints and not is_traced():
            return self._by_autograd(objective, trainable)
        try:
            with leaving_checkpoints_to_autograd():
                return _detached(by_func(objective, trainable))
        except CheckpointReached:
            self._has_checkpoints = True
            return self._by_autograd(objective, trainable)
        except (ValuesNeededError, ContractError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            # torch.autograd would allow the write.
            if _CAPTURED_WRITE_ERROR in str(error):
                raise
            rejection = error
        try:
            try:
                found = self._by_autograd(objective, trainable)
            except ContractError:
                raise
            except Exception as error:
                if _BACKWARD_ERROR in str(rejection):
                    raise ContractError(
                        f"expected {self._who} to return a loss that can be differentiated, got one whose backward "
                        f"pass already ran{_where(rejection)}. Remove loss.backward(): the step computes the gradients "
                        "and passes them to the optimizer."
                    ) from error
                # The function fails both ways, so it is wrong itself. A rejection by torch.func hides its own error.
                raise (error if _is_rejection(rejection) else rejection) from None
            if not _is_rejection(rejection):
                try:
                    by_func(objective, trainable)
                except Exception:  # torch.func rejects the function each time.
                    pass
                else:  # A transient error, such as a failed read.
                    raise rejection
            self._prefer_autograd(rejection)
            return found
        finally:
            # Its traceback references this frame: in a cycle, all their tensors would stay until a garbage collection.
            del rejection

    def _prefer_autograd(self, rejection: Exception) -> None:
        self._way = "autograd"
        reason = truncate(" ".join(str(rejection).split()) or type(rejection).__name__, _MAX_REASON_LENGTH)
        warn(
            f"{self._who} is differentiated by torch.autograd from now on, because torch.func rejected it"
            f"{_where(rejection)}: {reason} The gradients are the same. Pass differentiate='autograd' to "
            "use it from the start.",
            UserWarning,
        )
        if is_traced():
            raise ValuesNeededError(
                f"expected one forward pass of {self._who} in the trace, got a second one by torch.autograd. Trace it "
                "again."
            )

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
    return is_transformed() or (torch.is_grad_enabled() and any(leaf.requires_grad for leaf in tree.leaves(values)))


def _is_rejection(error: Exception) -> bool:
    return any(part in str(error) for part in _REJECTIONS)


def _where(error: Exception) -> str:
    """Returns the innermost line of the user's code, and that of the library it calls, if any."""
    found = [frame for frame in places(traceback.extract_tb(error.__traceback__)) if frame is not None]
    lines = [place(frame.filename, frame.lineno) for frame in found]
    return f" at {', through '.join(lines)}" if lines else ""


def by_func(objective: Objective, trainable: Tree) -> tuple[Tree, Tree, Tree]:
    """Computes gradients inside ``torch.func``, so that they nest in its other transforms.

    Args:
        objective: The function to differentiate at ``trainable``.
        trainable: A pytree of floating and complex tensors.

    Returns:
        The gradients; a pytree like them of Python bools, False where the value does not depend on the parameter; and
        the objective's auxiliary tensors.
    """
    # Dynamo cannot trace torch.autograd.grad inside a transform.
    if torch.compiler.is_dynamo_compiling():

        def plain(trainable: Tree) -> tuple[Tensor, Tree]:
            value, _, aux = objective(trainable, lambda value: None, False)
            return value, aux

        grads, aux = torch.func.grad(plain, has_aux=True)(trainable)
        return grads, tree.map(lambda _: True, grads), aux
    used: Tree = None

    def differentiated(trainable: Tree) -> tuple[Tensor, Tree]:
        nonlocal used
        # Not torch.func.grad, which replaces missing gradients by zeros without reporting them. Surrounding transforms
        # and autograd need the graph of the backward pass.
        value, (grads, used), aux = _marked(objective)(
            trainable, lambda value: _grads(value, trainable, _found(value, trainable, create_graph=True)), False
        )
        return value, (grads, aux)

    found: Any = torch.func.vjp(differentiated, trainable, has_aux=True)
    grads, aux = found[2]
    return grads, used, aux


def _detached(found: tuple[Tree, Tree, Tree]) -> tuple[Tree, Tree, Tree]:
    """Returns results without the graphs of tensors outside the state that require gradients, such as a teacher's.

    The state after the step would hold the graphs of all steps before.
    """
    grads, used, aux = found

    def detached(leaf: Tensor) -> Tensor:
        return leaf.detach() if leaf.requires_grad else leaf

    return tree.map(detached, grads), used, tree.map(detached, aux)


def by_autograd(objective: Objective, trainable: Tree, *, whole: bool = False) -> tuple[Tree, Tree, Tree]:
    """Computes gradients by ``torch.autograd``, which supports everything that a plain PyTorch loop does.

    Nothing outside changes: no tensor gets a ``grad``, and the graph is freed. No transform of ``torch.func`` and no
    outer derivative may surround the call, because derivatives of the gradients would be lost.

    Args:
        objective: The function to differentiate at ``trainable``.
        trainable: A pytree of floating and complex tensors.
        whole: Whether to use ``torch.autograd.backward``, which reentrant checkpoints need.

    Returns:
        As ``by_func``.
    """
    with torch.enable_grad():
        leaves = tree.map(lambda parameter: parameter.detach().requires_grad_(), trainable)

        def find(value: Tensor) -> Tree:
            if whole:
                _backward(value, leaves)
                found = [None] * len(tree.leaves(leaves))
            else:
                found = _found(value, leaves, create_graph=False)
            # A backward pass inside the loss has accumulated into ``grad``, as in a plain loop.
            earlier = [leaf.grad for leaf in tree.leaves(leaves)]
            return _grads(value, leaves, [_sum(*pair) for pair in zip(earlier, found, strict=True)])

        _, (grads, used), aux = _marked(objective)(leaves, find, True)
    return grads, used, tree.map(torch.detach, aux)


def _marked(objective: Objective) -> Objective:
    """Returns the objective, whose forward and backward pass a trace marks for the passes over its graph."""

    def marked(trainable: Tree, find: Find, apart: bool) -> tuple[Tensor, Tree, Tree]:
        derivative = object()

        def backward(value: Tensor) -> Tree:
            with marking_pass(derivative, is_backward=True):
                return find(value)

        with marking_pass(derivative, is_backward=False):
            return objective(trainable, backward, apart)

    return marked


def rerun(objective: Objective, trainable: Tree, look: Callable[[Tensor], None]) -> None:
    """Recomputes a value by ``torch.autograd``, and passes it to ``look`` before the backward pass."""

    def watched(trainable: Tree, find: Find, apart: bool) -> tuple[Tensor, Tree, Tree]:
        def seen(value: Tensor) -> Tree:
            look(value)
            return find(value)

        return objective(trainable, seen, apart)

    by_autograd(watched, trainable)


def outside_inference_mode() -> contextlib.AbstractContextManager[object]:
    """Returns a context that leaves inference mode, where gradients are zero without an error in torch 2.11."""
    inferring = not torch.compiler.is_dynamo_compiling() and torch.is_inference_mode_enabled()
    return torch.inference_mode(False) if inferring else contextlib.nullcontext()


def ordinary(values: Tree) -> Tree:
    """Returns the values with inference tensors cloned, because autograd cannot save these for a backward pass."""
    if torch.compiler.is_dynamo_compiling() or not any(map(_is_inference, tree.leaves(values))):
        return values
    with torch.inference_mode(False):
        return tree.map(lambda leaf: leaf.clone() if _is_inference(leaf) else leaf, values)


def _is_inference(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_inference()


def _grads(value: Tensor, trainable: Tree, found: Sequence[Tensor | None]) -> tuple[Tree, Tree]:
    leaves, structure = tree.flatten(trainable)
    grads = [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(found, leaves, strict=True)]
    dense = [grad if grad.layout == torch.strided else grad.to_dense() for grad in grads]
    return tree.unflatten(structure, dense), tree.unflatten(structure, [grad is not None for grad in found])


def _found(value: Tensor, trainable: Tree, *, create_graph: bool) -> list[Tensor | None]:
    leaves = tree.leaves(trainable)
    if not value.requires_grad:
        return [None] * len(leaves)
    # The loss may have called requires_grad_(False) on a parameter.
    reached = iter(
        torch.autograd.grad(
            value, [leaf for leaf in leaves if leaf.requires_grad], create_graph=create_graph, allow_unused=True
        )
    )
    return [next(reached) if leaf.requires_grad else None for leaf in leaves]


def _sum(earlier: Tensor | None, grad: Tensor | None) -> Tensor | None:
    if earlier is None or grad is None:
        return grad if earlier is None else earlier
    return earlier + grad


def _backward(value: Tensor, trainable: Tree) -> None:
    """Runs the backward pass to all leaves of the graph, and restores ``grad`` of leaves outside ``trainable``."""
    if not value.requires_grad:
        return
    ours = set(map(id, tree.leaves(trainable)))
    others, seen, todo = [], set[Any](), [value.grad_fn]
    while todo:
        node: Any = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [part for part, _ in node.next_functions]
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in ours:
            others.append((leaf, leaf.grad))
            leaf.grad = None
    try:
        torch.autograd.backward(value)
    finally:
        for leaf, grad in others:
            leaf.grad = grad
