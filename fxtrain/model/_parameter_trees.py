"""The layout of parameters and buffers: trees of tensors by name, for a pytree of modules and tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from fxtrain import tree
from fxtrain.core import Tree
from fxtrain.model._types import Modules, Out
from fxtrain.tree import MaskedNode


class CallResult(NamedTuple):
    """The result of a model call: the output, and the buffers and frozen parameters after the call.

    Args:
        output: Output of the function.
        buffers: All buffers, after the call.
        written: The frozen parameters that calls write, after the call: a tree like ``buffers``.
    """

    output: Any
    buffers: Any
    written: Any


class ParameterTrees:
    """Splits, merges and flattens trees of parameters and buffers.

    Attributes:
        template: The tree of modules and tensors, with each module replaced by its number and each bare tensor by "".
            Numbers are strings, because Dynamo treats ints as sizes when sizes are dynamic.
        trainable: A pytree of bools like the parameters, True for trainable ones.
    """

    template: Any
    trainable: Any

    def split(self, params: Tree, wrt: str | None = None) -> Tree:
        """Returns the trainable parameters, with an empty node in place of each frozen one.

        Args:
            params: Parameters of this architecture.
            wrt: Key of a dict of modules, to take one entry only. Defaults to all.

        Raises:
            ValueError: If there is no such entry.
        """
        mask = self.trainable
        if wrt is not None:
            entries = self.template if isinstance(self.template, Mapping) else {}
            if wrt not in entries:
                there = f"has the keys {', '.join(map(repr, entries))}" if entries else "is not a dict"
                raise ValueError(f"expected wrt to be a key of a dict of modules, got {wrt!r}. The model {there}.")
            mask, params = mask[wrt], params[wrt]
        return tree.map(lambda keep, leaf: leaf if keep else MaskedNode(), mask, params)

    def merge(self, params: Tree, trainable: Tree, wrt: str | None = None) -> Tree:
        """Returns ``params`` with the trainable ones replaced. Inverse of ``split``."""
        if wrt is None:
            return _merged(self.trainable, params, trainable)
        return {**params, wrt: _merged(self.trainable[wrt], params[wrt], trainable)}

    def with_written(self, params: Tree, written: Tree) -> Tree:
        """Returns ``params`` with the frozen ones that a call wrote, from ``CallResult.written``."""
        flat = {**self._flat(params), **self._flat(written)}
        return self._grouped(flat, self._bare(params))

    def cast_written(self, written: Tree, params: Tree) -> Tree:
        """Casts the frozen parameters that a call wrote to the dtypes of ``params``."""
        flat = self._flat(params)
        moved = {name: value.to(flat[name].dtype) for name, value in self._flat(written).items()}
        return self._grouped(moved)

    def clone_tensors(self, modules: Modules) -> tuple[Tree, Tree]:
        """Returns the parameters and buffers of modules of this architecture, as trees of detached clones."""
        leaves = tree.leaves(modules)
        caller = FunctionRunner([leaf for leaf in leaves if isinstance(leaf, nn.Module)])
        bare = [leaf.detach().clone() for leaf in leaves if isinstance(leaf, Tensor)]
        params = {name: value.detach().clone() for name, value in caller.named_parameters()}
        buffers = {name: value.detach().clone() for name, value in caller.named_buffers()}
        return self._grouped(params, bare), self._grouped(buffers)

    def _flat(self, values: Tree) -> dict[str, Tensor]:
        """Flattens a tree of dicts by name to one dict, whose names start with the module's number."""
        flat: dict[str, Tensor] = {}

        def add(number: str, named: Mapping[str, Tensor]) -> None:
            if number:
                flat.update({f"{number}.{name}": value for name, value in named.items()})

        tree.map(add, self.template, values)
        return flat

    def _bare(self, values: Tree) -> list[Tensor]:
        """Returns the leaves in the places of bare tensors."""
        bare: list[Any] = []
        tree.map(lambda number, leaf: number or bare.append(leaf) or "", self.template, values)
        return bare

    def _grouped(self, flat: Mapping[str, object], bare: Iterable[Tree] | None = None) -> Tree:
        """Inverse of ``_flat``. ``bare`` fills the places of bare tensors. By default, these get empty nodes."""
        others = itertools.repeat({}) if bare is None else iter(bare)

        def group(number: str) -> Tree:
            if not number:
                return next(others)
            prefix = f"{number}."
            return {name[len(prefix) :]: value for name, value in flat.items() if name.startswith(prefix)}

        return tree.map(group, self.template)


class FunctionRunner(nn.Module):
    """Runs a function of modules, as a module itself, so that ``functional_call`` can swap in their tensors."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        for index, module in enumerate(modules):
            self.add_module(str(index), module)

    def forward(
        self, template: Tree, params: Tree, function: Callable[..., Out], args: tuple[object, ...]
    ) -> tuple[Out, dict[str, Tensor]]:
        modules = self._modules
        model = tree.map(lambda number, leaf: modules[number] if number else leaf, template, params)
        output = function(model, *args)
        # Read before functional_call restores them, because a module may assign a new buffer.
        return output, {name: value.detach() for name, value in self.named_buffers()}


def _merged(mask: Tree, params: Tree, trainable: Tree) -> Tree:
    leaves, structure = tree.flatten(params)
    moved = iter(tree.leaves(trainable))
    chosen = [next(moved) if keep else leaf for keep, leaf in zip(tree.leaves(mask), leaves, strict=True)]
    return tree.unflatten(structure, chosen)
