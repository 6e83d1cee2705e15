"""Plans of tensor parallel training: which modules are split among the ranks of a model, and along which axes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fxtrain import tree
from fxtrain._torch_internals.modules import own_parameters
from fxtrain.core import TrainState, matching, name_of
from fxtrain.distributed._layouts import Plan, Split
from fxtrain.tree import as_name

_AXES: dict[str, dict[str, int]] = {"column": {"weight": 0, "bias": 0}, "row": {"weight": 1}}
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def axes_of(plan: Plan, state: TrainState, ranks: int) -> list[tuple[str, torch.Size, int]]:
    """Returns the parameters that a plan splits: the ends of their paths, their shapes, and the axes that are split.

    Args:
        plan: The plan.
        state: A state with whole tensors.
        ranks: Number of ranks that have one model together.

    Raises:
        TypeError: As for ``shard``.
        ValueError: As for ``shard``.
    """
    model: Any = state.model
    modules: dict[str, nn.Module] = {} if model is None else model.named_modules(train=True)
    kinds = _kinds(plan, modules)
    uses = Counter(id(value) for module in modules.values() for value in own_parameters(module).values())
    paths = {as_name(each.path): each.codify("") for each in tree.accessors(state.params)}
    shapes = {path: leaf.shape for path, leaf in zip(tree.paths(state.params), tree.leaves(state.params), strict=True)}
    found: list[tuple[str, torch.Size, int]] = []
    for name, kind in kinds.items():
        _check_module(name, kind, modules)
        for key, axis in _AXES[kind].items():
            own = own_parameters(modules[name])[key]
            if own is None:
                continue
            if uses[id(own)] > 1:
                raise ValueError(
                    f"expected {name}.{key}, which the plan splits, to be the parameter of one module, got one that "
                    "several modules have. Leave these modules out of the plan."
                )
            path = paths[f"{name}.{key}"]
            size = shapes[path][axis]
            if size % ranks:
                raise ValueError(
                    f"expected the size of {name}.{key} along axis {axis} to be a multiple of the {ranks} ranks of a "
                    f"model, got {size}. Leave the module out of the plan, or give mesh another number of ranks."
                )
            found.append((path, shapes[path], axis))
    return found


def _kinds(plan: Plan, modules: Mapping[str, nn.Module]) -> dict[str, Split]:
    """Returns how each module is split, by its name."""
    names, kinds = [name for name in modules if name], dict[str, Split]()
    for pattern, kind in plan.items():
        for index in matching(names, pattern, "module"):
            if kinds.setdefault(names[index], kind) != kind:
                raise ValueError(
                    f"expected each module to be 'column' or 'row', got both for {names[index]!r}. Write patterns that "
                    "match different modules."
                )
    return kinds


def _check_module(name: str, kind: Split, modules: Mapping[str, nn.Module]) -> None:
    module = modules[name]
    if type(module).forward is not nn.Linear.forward or "weight" not in own_parameters(module):
        raise TypeError(
            f"expected modules of class Linear in the plan, got a {name_of(type(module))} as {kind} module {name!r}. "
            "Leave it out, so that all ranks have it."
        )
    parent = modules.get(name.rpartition(".")[0])
    if type(parent).__module__.startswith("torch.nn.") and not isinstance(parent, _CONTAINERS):
        raise TypeError(
            f"expected modules in the plan that are called, got {name!r} of a {name_of(type(parent))}, which may read "
            "its weights without calling it. Write the layer with modules of your own."
        )
