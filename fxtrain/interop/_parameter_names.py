"""Names of the parameters of a torch optimizer, whose state dict numbers them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import TrainState, Tree
from fxtrain.interop._read_optimizer import StateDict
from fxtrain.model import model_of


def tensors_by_name(params: Tree) -> dict[str, Tensor]:
    """Returns tensors by name, in the order of ``module.parameters()``."""
    if isinstance(params, Tensor):
        return {"": params}
    if not isinstance(params, Mapping):
        return {name.strip("[]'\""): leaf for name, leaf in zip(tree.paths(params), tree.leaves(params), strict=True)}
    found: dict[str, Tensor] = {}
    for key, part in params.items():
        found |= {f"{key}.{name}" if name else str(key): leaf for name, leaf in tensors_by_name(part).items()}
    return found


def parameter_names(
    state: TrainState,
    optimizer: StateDict,
    names: Sequence[str] | None,
    shapes: Iterable[Mapping[str, Sequence[Tensor]]] = (),
) -> dict[Any, str]:
    """Returns the names of the optimizer's parameters, by their keys in its state dict."""
    groups = optimizer["param_groups"]
    keys = [key for group in groups for key in group["params"]]
    every = tensors_by_name(state.params)
    if all(isinstance(key, str) for key in keys):
        return {key: key for key in keys}
    if names is not None:
        if len(names) != len(keys):
            raise ValueError(f"expected names of {len(keys)} parameters, got {len(names)}.")
        return dict(zip(keys, names, strict=True))
    if all("param_names" in group for group in groups):
        given = [name for group in groups for name in group["param_names"]]
        return dict(zip(keys, given, strict=True))
    trained = tensors_by_name(model_of(state).split(state.params))
    known: dict[Any, tuple[torch.Size, ...]] = {
        key: (param.shape,)
        for group, given in zip(groups, shapes, strict=False)
        for key, param in zip(group["params"], given["params"], strict=True)
    } or {key: like for key, value in optimizer["state"].items() if (like := _shapes(value))}
    orders = [
        order
        for candidates in (every, trained)
        for order in _orders(candidates, [len(group["params"]) for group in groups])
        if len(order) == len(keys)
        and all(
            every[name].shape in known.get(key, (every[name].shape,)) for key, name in zip(keys, order, strict=True)
        )
    ]
    if not orders:
        raise ValueError(
            f"expected the {len(every)} parameters of the model, or its {len(trained)} trainable ones, in the order of "
            f"module.parameters(), got an optimizer of {len(keys)} parameters that differ in number or shape. Pass "
            "their names, in the optimizer's order, as names=."
        )
    if any(order != orders[0] for order in orders):
        one, other = orders[0], next(order for order in orders if order != orders[0])
        differing = next(pair for pair in zip(one, other, strict=True) if pair[0] != pair[1])
        raise ValueError(
            f"expected one parameter order that fits the optimizer's groups, got several: a parameter may be "
            f"{differing[0]!r} or {differing[1]!r}. Pass their names, in the optimizer's order, as names=."
        )
    return dict(zip(keys, orders[0], strict=True))


def _shapes(value: Mapping[str, object]) -> tuple[torch.Size, ...]:
    """Returns the possible shapes of the parameter of an entry, derived from its moments."""
    moments = {key: moment for key, moment in value.items() if isinstance(moment, Tensor)}
    if "row_var" in moments and "col_var" in moments:
        return (torch.Size((*moments["row_var"].shape[:-1], moments["col_var"].shape[-1])),)
    return tuple({moment.shape for key, moment in moments.items() if key not in _SCALAR_ENTRIES})[:1]


_SCALAR_ENTRIES = ("step", "mu", "eta", "mu_product")

# Names of parameters that Trainer does not decay.
_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def _orders(params: Mapping[str, Tensor], sizes: list[int]) -> list[list[str]]:
    """Returns the parameter orders that optimizers use: the module's, or for two groups, decayed parameters first.

    The module's order is left out if groups could swap parameters of equal shape unnoticed.
    """
    names = list(params)
    if len(sizes) == 1:
        return [names]
    found: list[list[str]] = []
    if len(sizes) == 2:
        for is_decayed in (
            lambda name: params[name].ndim > 1,
            lambda name: not _UNDECAYED.search(name.lower()) and params[name].ndim > 1,
        ):
            decayed = [name for name in names if is_decayed(name)]
            if len(decayed) == sizes[0]:
                found.append([*decayed, *(name for name in names if not is_decayed(name))])
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    shapes = [{params[name].shape for name in names[end - size : end]} for size, end in zip(sizes, ends, strict=True)]
    if sum(map(len, shapes)) == len(set().union(*shapes)):
        found.append(names)
    return found
