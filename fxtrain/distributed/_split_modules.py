"""The forward pass of a model whose modules are split by a plan: each rank computes with its part.

A column module has some of the outputs, and a row module some of the inputs. Two functions connect them to the rest of
the model, which all ranks compute alike. Each is the derivative of the other:

    f:  y = x on each rank,         dx = sum_r dy_r         before column modules
    g:  y = sum_r x_r,              dx_r = dy               after row modules
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxtrain import tree
from fxtrain._torch_internals.collectives import all_reduce
from fxtrain._torch_internals.modules import own_parameters
from fxtrain.core import Tree
from fxtrain.core._shard import is_shard, refuse_shards
from fxtrain.distributed._mesh import Mesh
from fxtrain.rng._functional import innermost_functional
from fxtrain.tree import as_name

Wrapper = tuple[nn.Module, Callable[..., Tensor]]
"""A module, and a function ``(forward, input) -> output`` that replaces its method ``forward``."""


class SplitModules:
    """The modules of a state that are split by a plan.

    Args:
        params: Parameters with shards.
        mesh: The ranks of the step.

    Attributes:
        params: The parameters with plain tensors, the parts of this rank.

    Raises:
        TypeError: If the parameters are split otherwise, as by ``fsdp``.
    """

    def __init__(self, params: Tree, mesh: Mesh | None) -> None:
        leaves = tree.leaves(params, is_leaf=is_shard)
        found = {
            as_name(each.path): leaf
            for each, leaf in zip(tree.accessors(params, is_leaf=is_shard), leaves, strict=True)
            if is_shard(leaf)
        }
        ranks = None if mesh is None else mesh.model
        if ranks is None or any(leaf.mesh is not ranks for leaf in found.values()):
            refuse_shards(params, "a forward pass")
        assert ranks is not None
        self.params: Tree = tree.map(lambda leaf: leaf.local if is_shard(leaf) else leaf, params, is_leaf=is_shard)
        self._group: str = ranks.group.group_name
        weights = {name.removesuffix(".weight"): leaf for name, leaf in found.items() if name.endswith(".weight")}
        self._columns = [name for name, leaf in weights.items() if leaf.axis == 0]
        self._rows = [name for name, leaf in weights.items() if leaf.axis == 1]
        self._region = _Region()

    def wrappers(self, modules: Mapping[str, nn.Module]) -> list[Wrapper]:
        """Returns the split modules with their wrappers.

        Args:
            modules: The modules, filled with the parts of this rank, by name.
        """
        self._region = region = _Region()
        columns = [(name, functools.partial(_column, region, name, self._group)) for name in self._columns]
        linear: Mapping[str, Any] = modules
        rows = [(name, functools.partial(_row, region, name, linear[name], self._group)) for name in self._rows]
        return [(modules[name], wrapper) for name, wrapper in [*columns, *rows]]

    def watching(self, modules: Mapping[str, nn.Module]) -> TorchFunctionMode:
        """Returns a context that refuses uses of other parameters between column and row modules.

        Args:
            modules: As for ``wrappers``, which comes first.
        """
        split = {id(leaf) for name in (*self._columns, *self._rows) for leaf in modules[name].parameters()}
        named = {
            id(value): ".".join(filter(None, (name, key)))
            for name, module in modules.items()
            for key, value in own_parameters(module).items()
            if value is not None and id(value) not in split
        }
        return _Watch(self._region, named)

    def checked(self, output: Tree) -> Tree:
        """Returns the output of the forward pass.

        Raises:
            ValueError: If it may consist of the part of a rank, because no row module was called last.
        """
        if self._region.column is not None:
            raise ValueError(
                f"expected the call of a row module after that of the column module {self._region.column!r}, got the "
                "end of the forward pass. Add the module that takes its outputs to the plan as 'row', or leave the "
                "column module out."
            )
        return output


class _Region:
    """The part of a forward pass between column modules and the row module that follows, where tensors are parts.

    Attributes:
        column: The latest column module. None outside.
    """

    def __init__(self) -> None:
        self.column: str | None = None
        self._sites = 0
        self._input: tuple[Tensor, bool, Any] | None = None

    def entered(self, column: str, values: Tensor, group: str) -> Tensor:
        """Returns ``f(values)``, the same one for several column modules with one input, as of queries and keys.

        A column module with another input begins a region, because a recomputation may end inside one.
        """
        self.column, is_recorded = column, torch.is_grad_enabled()
        if self._input is None or self._input[0] is not values or self._input[1] is not is_recorded:
            self._input = values, is_recorded, _Copied.apply(values, group)
            self._sites = _sites()
        return self._input[2]

    def leave(self, row: str) -> None:
        """Ends the region.

        Raises:
            ValueError: If the forward pass has sampled inside.
        """
        column, self.column, self._input = self.column, None, None
        if column is not None and _sites() != self._sites:
            raise ValueError(
                f"expected no random samples between the column module {column!r} and the row module {row!r}, got "
                "some, as of a dropout. All ranks would take the same for other features. Move the dropout behind the "
                "row module, or leave the modules out of the plan."
            )


class _Watch(TorchFunctionMode):
    """Refuses uses of parameters that all ranks have, where tensors are parts.

    Each rank would find the part of the gradient that comes from its features. The average over ranks, which is right
    for parameters elsewhere, would be wrong.

    Args:
        region: The current region.
        named: The names of these parameters by id.
    """

    def __init__(self, region: _Region, named: Mapping[int, str]) -> None:
        super().__init__()
        self._region, self._named = region, named

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        column = self._region.column
        if column is not None and func.__name__ != "__get__":  # which reads a dtype or a device
            for value in (*args, *(kwargs or {}).values()):
                name = self._named.get(id(value))
                if name is not None:
                    raise ValueError(
                        f"expected only parameters that the plan splits after the column module {column!r} and before "
                        f"a row module, got a use of {name}, whose gradient would be that of one rank's part. Use it "
                        "elsewhere, or leave the modules out of the plan."
                    )
        return func(*args, **(kwargs or {}))


def _sites() -> int:
    """Returns the number of sampling calls before this point of the forward pass."""
    mode = innermost_functional()
    return 0 if mode is None else mode.sites


def _column(region: _Region, name: str, group: str, forward: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:  # noqa: A002 -- as in torch
    return forward(region.entered(name, input, group))


def _row(
    region: _Region,
    name: str,
    module: nn.Linear,
    group: str,
    forward: Callable[[Tensor], Tensor],
    input: Tensor,  # noqa: A002 -- as in torch
) -> Tensor:
    region.leave(name)
    if input.shape[-1] != module.weight.shape[1]:
        raise ValueError(
            f"expected {module.weight.shape[1]} of {module.in_features} features as the input of the row module "
            f"{name!r}, got {input.shape[-1]}. Add the module that computes them to the plan as 'column'."
        )
    total: Any = _Summed.apply(F.linear(input, module.weight), group)
    return total if module.bias is None else total + module.bias.to(total.dtype)


class _Copied(torch.autograd.Function):
    """The function f."""

    @staticmethod
    def forward(values: Tensor, group: str) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Summed.apply(grad, ctx.group), None


class _Summed(torch.autograd.Function):
    """The function g."""

    @staticmethod
    def forward(values: Tensor, group: str) -> Tensor:
        return all_reduce([values], group)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Copied.apply(grad, ctx.group), None
