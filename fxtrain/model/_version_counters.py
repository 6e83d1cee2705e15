"""Detects in-place writes to the inputs of a function."""

from __future__ import annotations

import torch

from fxtrain import tree
from fxtrain._torch_internals.memory import write_count
from fxtrain.core import Tree


def versions(values: Tree) -> list[int]:
    """Returns torch's count of in-place writes to each leaf, or an empty list while Dynamo compiles.

    Tensors made in inference mode have no such count, and get 0.
    """
    if torch.compiler.is_dynamo_compiling():
        return []
    return [0 if leaf.is_inference() else write_count(leaf) for leaf in tree.leaves(values)]


def refuse_in_place_writes(who: str, values: Tree, before: list[int], root: str) -> None:
    """Raises if a leaf was written in place since ``before`` was taken.

    Args:
        who: The function, for errors.
        values: A pytree of tensors.
        before: ``versions(values)`` from before the call.
        root: Name of the pytree, for errors.

    Raises:
        RuntimeError: Names the leaf. The write has happened and is not undone.
    """
    if before == versions(values):
        return
    changed = zip(tree.paths(values, root), before, versions(values), strict=True)
    path = next(path for path, was, now in changed if was != now)
    raise RuntimeError(
        f"expected {who} to leave its state unchanged, got an in-place write to {path}. Compute a new value, and pass "
        "it to state.replace. Register a tensor that a module writes at each call as a buffer."
    )
