"""Modules that carry the values of a state, for code that takes an ``nn.Module``."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, NamedTuple, TypeVar, overload

from torch import Tensor, nn

from fxtrain import tree
from fxtrain._torch_internals.modules import own_buffers, own_parameters
from fxtrain.core import TrainState, Tree, first_lines
from fxtrain.core._shard import refuse_shards
from fxtrain.model._init import refuse_other_leaves
from fxtrain.model._meta_modules import copied_with
from fxtrain.model._model import model_of
from fxtrain.model._parameter_trees import FunctionRunner

_MAX_LINES = 8

M = TypeVar("M")


@overload
def to_module(state: TrainState, module: None = None, *, train: bool = False) -> Tree: ...


@overload
def to_module(state: TrainState, module: M, *, train: bool = False) -> M: ...


def to_module(state: TrainState, module: Tree = None, *, train: bool = False) -> Tree:
    """Returns a new module with the parameters and buffers of a state.

    Values are copied, so writes to the module do not reach the state. They keep the state's dtypes and devices. Tied
    parameters are tied, frozen ones do not require gradients, and non-persistent buffers are included.

    Args:
        state: A state from ``init``. A view such as ``fx.callbacks.averaged(state)`` gives averaged weights.
        module: A module whose class, attributes and hooks are copied instead of those of the module given to ``init``.
            It needs the same parameters and buffers, and is not modified. For a tree of modules: a tree like it.
        train: Whether the module is in training mode. Submodules that were in eval mode inside a module in training
            mode, such as frozen batch norms, stay in eval mode.

    Returns:
        The module. For a tree of modules and tensors: a tree of new modules and tensors.

    Raises:
        TypeError: If ``module`` is neither a module nor a tree of modules and tensors, or cannot be copied.
        ValueError: If ``module`` has other parameters or buffers, shapes or ties than the state. The message contains
            the paths.

    Example:
        >>> import torch, fxtrain as fx
        >>> state = fx.init(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh()))
        >>> module = fx.to_module(state)
        >>> module.training, bool((module[0].weight == state.params["0.weight"]).all())
        (False, True)
        >>> fx.to_module(state, torch.nn.Sequential(torch.nn.Linear(5, 2), torch.nn.Tanh()))
        Traceback (most recent call last):
        ...
        ValueError: expected module to have the parameters and buffers of the state, got others:
          module.0.weight: expected a parameter of shape [2, 3], got a parameter of shape [2, 5]
        Build it like the module given to fxtrain.init, or leave it out: fxtrain.to_module(state).
    """
    model = model_of(state)
    refuse_shards(state.params, "to_module(state)")
    if state.step.ndim:
        raise ValueError(
            f"expected one state, got a batch of {list(state.step.shape)}. Select one: fxtrain.tree.map(lambda leaf: "
            "leaf[0], states)."
        )
    masks = zip(tree.leaves(state.params), tree.leaves(model.trainable), strict=True)
    trained = {id(leaf) for leaf, mask in masks if mask}

    def copied(filled: Tree) -> Tree:
        originals = _places(filled)
        if module is None:
            return _copied(filled, originals, originals, trained)
        refuse_other_leaves(module, "module")
        places = _places(module)
        _refuse_differences(originals, places)
        return _copied(module, places, originals, trained)

    made = model.call(state.params, state.buffers, copied, train=True).output
    for part in tree.leaves(made):
        if isinstance(part, nn.Module) and not train:
            part.eval()
        elif isinstance(part, nn.Module) and not part.training:
            part.train()
    return made


class _Place(NamedTuple):
    """A module, or one of its parameters or buffers.

    Args:
        kind: ``"module"``, ``"tensor"`` for a bare one, ``"parameter"`` or ``"buffer"``.
        value: The module or tensor.
        first: The first of the paths at which it is.
    """

    kind: str
    value: Any
    first: str


def _places(modules: Tree) -> dict[str, _Place]:
    """Returns the modules of a tree, and the tensors of the tree and its modules, by path."""
    found: list[tuple[str, str, Any]] = []
    for path, leaf in zip(tree.paths(modules, "module"), tree.leaves(modules), strict=True):
        if not isinstance(leaf, nn.Module):
            found.append((path, "tensor", leaf))
            continue
        found.append((path, "module", leaf))
        for name, part in leaf.named_modules(remove_duplicate=False):
            prefix = f"{path}.{name}" if name else path
            for kind, own in (("parameter", own_parameters(part)), ("buffer", own_buffers(part))):
                found += [(f"{prefix}.{key}", kind, value) for key, value in own.items() if value is not None]
    # Sorted, because modules of another class may list the names of a tied tensor in another order.
    first = {id(value): path for path, _, value in sorted(found, key=lambda each: each[0], reverse=True)}
    return {path: _Place(kind, value, first[id(value)]) for path, kind, value in found}


def _copied(sources: Tree, places: Mapping[str, _Place], originals: Mapping[str, _Place], trained: Set[int]) -> Tree:
    """Returns copies of modules with copies of tensors of the same paths.

    Args:
        sources: The modules.
        places: Those of ``sources``.
        originals: Those of the state.
        trained: Ids of the state's trainable parameters.
    """
    replacements: dict[int, Tensor] = {}
    for path, (kind, value, first) in places.items():
        if kind != "module" and path == first:
            given = originals[path].value
            new = given.detach().clone()
            replacements[id(value)] = (
                nn.Parameter(new, requires_grad=id(given) in trained) if kind == "parameter" else new
            )
    leaves, structure = tree.flatten(sources)
    root, _ = copied_with(FunctionRunner([leaf for leaf in leaves if isinstance(leaf, nn.Module)]), replacements)
    modules = iter(root.children())
    return tree.unflatten(
        structure, [next(modules) if isinstance(leaf, nn.Module) else replacements[id(leaf)] for leaf in leaves]
    )


def _refuse_differences(expected: Mapping[str, _Place], found: Mapping[str, _Place]) -> None:
    """Raises if modules differ in structure, shapes or ties."""
    lines = [
        f"  {path}: expected {wanted}, got {got}"
        for path in {**expected, **found}
        if (wanted := _described(path, expected.get(path))) != (got := _described(path, found.get(path)))
    ]
    if lines:
        listed = "\n".join(first_lines(lines, _MAX_LINES))
        raise ValueError(
            f"expected module to have the parameters and buffers of the state, got others:\n{listed}\n"
            "Build it like the module given to fxtrain.init, or leave it out: fxtrain.to_module(state)."
        )


def _described(path: str, place: _Place | None) -> str:
    if place is None:
        return "none"
    if place.kind == "module":
        return "a module"
    tie = "" if place.first == path else f", tied to {place.first}"
    return f"a {place.kind} of shape {list(place.value.shape)}{tie}"
