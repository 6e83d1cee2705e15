"""Two backward passes: by torch.func, which nests in its transforms, and by torch.autograd on detached leaves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Tree

Find = Callable[[Tensor], Tree]
"""Maps the differentiated value to the results of its backward pass."""

Objective = Callable[[Tree, Find, bool], tuple[Tensor, Tree, Tree]]
"""Maps the trainable parameters, a function that runs the backward pass, and whether to detach all other inputs to the
value, the results of the backward pass, and a pytree of auxiliary tensors."""


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
        value, (grads, used), aux = objective(
            trainable, lambda value: _grads(value, trainable, _found(value, trainable, create_graph=True)), False
        )
        return value, (grads, aux)

    found: Any = torch.func.vjp(differentiated, trainable, has_aux=True)
    grads, aux = found[2]
    return grads, used, aux


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

        _, (grads, used), aux = objective(leaves, find, True)
    return grads, used, tree.map(torch.detach, aux)


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
