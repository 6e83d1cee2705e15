"""The architecture: the code of modules, as a function of their memory."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fxtrain import rng, tree
from fxtrain.core import TrainState
from fxtrain.model.fingerprint import fingerprint
from fxtrain.optim import MaskedNode


class Model:
    """The architecture of a state: its modules, without memory. Static; two are equal where they compute the same.

    The modules are copied once, onto the meta device, with their ties; the user's own are left as they were.

    Args:
        modules: A module, or a pytree of modules and tensors.
    """

    def __init__(self, modules: Any) -> None:
        leaves, structure = tree.flatten(modules)
        found = [leaf for leaf in leaves if isinstance(leaf, nn.Module)]
        names = iter(map(str, range(len(found))))
        # The template is the tree with each module's number at its place, and "" at the place of a bare tensor. It is
        # text, because where sizes are dynamic Dynamo takes numbers for sizes.
        self.template = tree.unflatten(structure, [next(names) if isinstance(x, nn.Module) else "" for x in leaves])
        self.has_modules = bool(found)
        original = _Caller(found)
        self.trainable = self._grouped(
            {name: _is_trainable(value) for name, value in original.named_parameters()},
            [_is_trainable(leaf) for leaf in leaves if isinstance(leaf, Tensor)],
        )
        self._training = _without_memory(original)
        for module in self._training.children():
            # A module that is in eval mode as a whole was loaded or used, not configured; single parts that are
            # in eval mode, such as frozen batch norms, are meant.
            if not module.training:
                module.train()
        self._evaluating = copy.deepcopy(self._training).eval()
        self._fingerprint = fingerprint(self._training)
        self._choose(self.trainable)

    def training_only(self, trainable: Any) -> Model:
        """The same architecture, of which these parameters are trained: a pytree of bools like them."""
        other = copy.copy(self)
        other._choose(trainable)
        return other

    def _choose(self, trainable: Any) -> None:
        masks, structure = tree.flatten(trainable)
        self.trainable = trainable
        self._key = self._fingerprint, tuple(masks), structure, str(self.template)

    def call(
        self,
        params: Any,
        buffers: Any,
        function: Callable[..., Any],
        *args: Any,
        train: bool,
        key: rng.Key | None = None,
    ) -> tuple[Any, Any]:
        """``function(model, *args)``, where ``model`` has these parameters and buffers, and the buffers after it.

        Inside, ``model`` is the module itself, so any method and any submodule can be called. Nothing outside
        changes: buffers are cloned first, and what the call wrote comes back.
        """
        with rng.functional(key) if key is not None else contextlib.nullcontext():
            if not self.has_modules:
                return function(params, *args), buffers
            tensors = {**self._flat(params), **{name: value.clone() for name, value in self._flat(buffers).items()}}
            caller = self._training if train else self._evaluating
            kept = _attributes(caller)
            try:
                output, written = functional_call(caller, tensors, (self.template, params, function, args))
            finally:
                _put_back(kept)
        return output, self._grouped(written, itertools.repeat({}))

    def split(self, params: Any, wrt: str | None = None) -> Any:
        """The trainable parameters, with an empty node in the place of each other: what is differentiated.

        Args:
            params: Of this architecture.
            wrt: The entry to take, of a dict of modules; by default all.

        Raises:
            ValueError: If there is no such entry.
        """
        mask = self.trainable
        if wrt is not None:
            entries = self.template if isinstance(self.template, Mapping) else {}
            if wrt not in entries:
                there = f"has {', '.join(map(repr, entries))}" if entries else "is no dict"
                raise ValueError(f"wrt={wrt!r} names an entry of a dict of modules, and the model {there}.")
            mask, params = mask[wrt], params[wrt]
        return tree.map(lambda keep, leaf: leaf if keep else MaskedNode(), mask, params)

    def merge(self, params: Any, trainable: Any, wrt: str | None = None) -> Any:
        """``params`` with the trainable ones replaced: the inverse of ``split``."""
        if wrt is not None:
            return {**params, wrt: _merged(self.trainable[wrt], params[wrt], trainable)}
        return _merged(self.trainable, params, trainable)

    def memory(self, modules: Any) -> tuple[Any, Any]:
        """The parameters and buffers of modules of this architecture: trees of detached clones."""
        leaves = tree.leaves(modules)
        caller = _Caller([leaf for leaf in leaves if isinstance(leaf, nn.Module)])
        bare = [leaf.detach().clone() for leaf in leaves if isinstance(leaf, Tensor)]
        params = {name: value.detach().clone() for name, value in caller.named_parameters()}
        buffers = {name: value.detach().clone() for name, value in caller.named_buffers()}
        return self._grouped(params, bare), self._grouped(buffers, itertools.repeat({}))

    def _flat(self, values: Any) -> dict[str, Tensor]:
        """From a tree of dicts by name to one dict, whose names start with the module's number."""
        flat: dict[str, Tensor] = {}

        def add(number: str, named: Any) -> None:
            if number:
                flat.update({f"{number}.{name}": value for name, value in named.items()})

        tree.map(add, self.template, values)
        return flat

    def _grouped(self, flat: Mapping[str, Any], bare: Iterable[Any]) -> Any:
        """From one dict to a tree of dicts by name; ``bare`` fills the places that hold no module."""
        others = iter(bare)

        def group(number: str) -> Any:
            if not number:
                return next(others)
            prefix = f"{number}."
            return {name[len(prefix) :]: value for name, value in flat.items() if name.startswith(prefix)}

        return tree.map(group, self.template)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Model) and self._key == other._key)

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"Model({', '.join(type(module).__name__ for module in self._training.children())})"


def model_of(state: TrainState) -> Model:
    """The state's architecture.

    Raises:
        ValueError: If it has none.
    """
    if state.model is None:
        raise ValueError("This state has no model: make it with fxtrain.init(module, tx).")
    return state.model


class _Caller(nn.Module):
    """Runs a function of modules. As it is a module itself, ``functional_call`` can swap in their memory."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        for index, module in enumerate(modules):
            self.add_module(str(index), module)

    def forward(
        self, template: Any, params: Any, function: Callable[..., Any], args: tuple[Any, ...]
    ) -> tuple[Any, dict[str, Tensor]]:
        modules = self._modules
        model = tree.map(lambda number, leaf: modules[number] if number else leaf, template, params)
        output = function(model, *args)
        # Read while they are in place: a module may write a buffer or put another in its stead.
        return output, {name: value.detach() for name, value in self.named_buffers()}


def _without_memory(caller: _Caller) -> _Caller:
    # Seeding deepcopy's memo with meta twins copies the code without copying the weights, and keeps ties.
    memo: dict[int, Any] = {}
    for parameter in caller.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in caller.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    try:
        return copy.deepcopy(caller, memo)
    except Exception as error:
        raise TypeError(
            f"The module cannot be copied ({error}), and init copies its code to leave yours as it was: "
            "remove locks, open files and hooks that close over them from it."
        ) from error


def _attributes(caller: _Caller) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The attributes of all modules, and copies of them. While compiling nothing: a guard for each would cost more."""
    if torch.compiler.is_dynamo_compiling():
        return []
    return [(module.__dict__, module.__dict__.copy()) for module in caller.modules()]


def _put_back(kept: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    # What a forward pass stores on its module would keep tensors of a finished transform alive.
    for now, before in kept:
        now.clear()
        now.update(before)


def _is_trainable(value: Tensor) -> bool:
    frozen = isinstance(value, nn.Parameter) and not value.requires_grad
    return (value.is_floating_point() or value.is_complex()) and not frozen


def _merged(mask: Any, params: Any, trainable: Any) -> Any:
    leaves, structure = tree.flatten(params)
    moved = iter(tree.leaves(trainable))
    chosen = [next(moved) if keep else leaf for keep, leaf in zip(tree.leaves(mask), leaves, strict=True)]
    return tree.unflatten(structure, chosen)
