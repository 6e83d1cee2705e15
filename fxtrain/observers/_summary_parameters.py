"""The parameters and modules of a state, by dotted name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from fxtrain import tree
from fxtrain.core import TrainState, Tree, dtype_name


class Leaf(NamedTuple):
    """A parameter."""

    name: str  # dotted
    tensor: Tensor
    trainable: bool | None  # None if the state has no model


def leaves_of(state: TrainState) -> list[Leaf]:
    """Returns the parameters, in the order of the leaves of ``state.params``."""
    paths = [".".join(map(str, accessor.path)) for accessor in tree.accessors(state.params)]
    tensors: list[Tensor] = tree.leaves(state.params)
    masks = [None] * len(tensors) if state.model is None else tree.leaves(state.model.trainable)
    return [Leaf(*each) for each in zip(paths, tensors, masks, strict=True)]


def modules_of(state: TrainState) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the types of modules by dotted name, in model order, and the first name of tied parameters by each of
    their other names."""
    types: dict[str, str] = {}
    tied: dict[str, str] = {}

    def visit(model: Tree) -> None:
        first: dict[Tensor, str] = {}  # tensors are hashed by identity
        paths = [accessor.path for accessor in tree.accessors(model)]
        for path, part in zip(paths, tree.leaves(model), strict=True):
            if isinstance(part, nn.Module):
                for name, module in part.named_modules():
                    types[_joined(path, name)] = type(module).__name__
                for name, value in part.named_parameters(remove_duplicate=False):
                    known = first.setdefault(value, _joined(path, name))
                    if known != _joined(path, name):
                        tied[_joined(path, name)] = known

    if state.model is not None:
        state.model.call(state.params, state.buffers, visit, train=False)
    return types, tied


def _joined(path: Sequence[object], name: str) -> str:
    return ".".join([*map(str, path), *([name] if name else [])])


def which_trainable(leaves: list[Leaf]) -> str:
    """Returns ``"all"``, ``"some"`` or ``"frozen"``, or an empty string if it is unknown."""
    found = {leaf.trainable for leaf in leaves}
    if None in found or not found:
        return ""
    return "some" if len(found) > 1 else "all" if found == {True} else "frozen"


def dtypes_of(leaves: list[Leaf]) -> str:
    """Returns the names of the distinct dtypes, sorted."""
    return ", ".join(sorted({dtype_name(leaf.tensor.dtype) for leaf in leaves}))


def numel_of(leaves: Iterable[Leaf]) -> int:
    """Returns the number of elements in all leaves."""
    return total_numel(leaf.tensor for leaf in leaves)


def total_numel(tensors: Iterable[Tensor]) -> int:
    """Returns the number of elements in all tensors."""
    return sum(tensor.numel() for tensor in tensors)
