"""The static part of a state: its modules without values, their settings, and the trainable selection."""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Callable
from typing import NoReturn

from torch import Tensor, nn

from fxtrain import tree
from fxtrain._torch_internals.modules import has_gradient_hooks
from fxtrain.core import TrainState, Tree, describe
from fxtrain.core._field_access import missing_field
from fxtrain.model._closures import hook_owners
from fxtrain.model._fingerprint import fingerprint
from fxtrain.model._first_call_checks import hooks_error
from fxtrain.model._meta_modules import MetaModules, in_eval_mode, on_meta_device
from fxtrain.model._model_calls import ModelCalls
from fxtrain.model._parameter_trees import FunctionRunner
from fxtrain.model._types import Modules


class Model(ModelCalls):
    """The static part of a state: its modules, without parameters and buffers.

    Two models are equal if they compute the same function of their parameters and buffers. The modules are copied to
    the meta device, ties included. The user's modules are not modified.

    Args:
        modules: A module, or a pytree of modules and tensors.
    """

    def __init__(self, modules: Modules) -> None:
        leaves, structure = tree.flatten(modules)
        found = [leaf for leaf in leaves if isinstance(leaf, nn.Module)]
        numbers = map(str, itertools.count())
        self.template = tree.unflatten(
            structure, [next(numbers) if isinstance(leaf, nn.Module) else "" for leaf in leaves]
        )
        self.has_modules = bool(found)
        original = FunctionRunner(found)
        params, bare = dict(original.named_parameters()), [leaf for leaf in leaves if isinstance(leaf, Tensor)]

        def grouped(function: Callable[[Tensor], bool]) -> Tree:
            return self._grouped({name: function(value) for name, value in params.items()}, map(function, bare))

        found_at = zip(tree.paths(modules, "model"), leaves, strict=True)
        module_paths = [path for path, leaf in found_at if isinstance(leaf, nn.Module)]
        paths = {str(index): path for index, path in enumerate(module_paths)}
        self._training, owned = on_meta_device(original)
        self._hook_owners = hook_owners(original)
        for module in self._training.children():
            # A whole module in eval mode was probably just loaded or evaluated. A submodule in eval mode, such as a
            # frozen batch norm, is deliberate.
            if not module.training:
                module.train()
        self._evaluating, owned_evaluating = in_eval_mode(self._training)
        self._templates = (
            MetaModules(self._evaluating, owned_evaluating, paths),
            MetaModules(self._training, owned, paths),
        )
        self._slots = self._templates[True].slots
        self._hooked = grouped(has_gradient_hooks)
        self._fingerprint = fingerprint(self._training)
        self._choose(grouped(_is_trainable))

    def training_only(self, trainable: Tree) -> Model:
        """Returns the same model with other trainable parameters.

        Args:
            trainable: Pytree of bools like the parameters.
        """
        other = copy.copy(self)
        other._choose(trainable)
        return other

    def _choose(self, trainable: Tree) -> None:
        masks, structure = tree.flatten(trainable)
        self.trainable = trainable
        hooked = map(operator.and_, masks, tree.leaves(self._hooked))
        self._hooks_at = tuple(itertools.compress(tree.paths(trainable, "state.params"), hooked))
        self._trained = frozenset(name for name, mask in self._flat(trainable).items() if mask)
        self._forget_calls()
        self._key = self._fingerprint, self._hooks_at, tuple(masks), structure, str(self.template)

    def restore(self) -> bool:
        """Restores the modules after code compiled by Dynamo, which writes their attributes directly.

        Returns:
            Whether any attribute had been written.
        """
        written = [template.restore() for template in self._templates]
        return any(written)

    def refuse_hooks(self) -> None:
        """Raises if a trainable parameter has hooks, because they would not run.

        Raises:
            NotImplementedError: Names the parameters.
        """
        if self._hooks_at:
            raise hooks_error(self._hooks_at)

    def __getstate__(self) -> dict[str, object]:
        # The user's functions and objects must not be copied or pickled.
        return {**self.__dict__, "_first": {}, "_hook_owners": ()}

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Model) and self._key == other._key)

    def __hash__(self) -> int:
        return hash(self._key)

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError(f"expected a model with parameters, got a call of state.model, which has none. {_VIEW}")

    def __getattr__(self, name: str) -> NoReturn:
        raise missing_field(self, name, ["trainable"], lambda: _VIEW)

    def __repr__(self) -> str:
        return f"Model({', '.join(type(module).__name__ for module in self._training.children())})"


_VIEW = "Use the model with the parameters of a state: fxtrain.view(state), or fxtrain.to_module(state, module)."


def model_of(state: TrainState) -> Model:
    """Returns the state's model.

    Raises:
        TypeError: If ``state`` is not a TrainState.
        ValueError: If the state has none.
    """
    if not isinstance(state, TrainState):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"expected a TrainState, got {describe(state)}. Make one with fxtrain.init(module, tx), and give it as the "
            "state."
        )
    if state.model is None:
        raise ValueError("expected a state with a model, got one without. Create it with fxtrain.init(module, tx).")
    return state.model


def models_of(state: TrainState) -> tuple[str, ...]:
    """Returns the keys of the models with an own optimizer, if ``init`` was given a dict of these."""
    optimizers, params = state.opt_state, state.params
    if type(optimizers) is not dict or type(params) is not dict or optimizers.keys() != params.keys():
        return ()
    return tuple(params)


def _is_trainable(value: Tensor) -> bool:
    frozen = isinstance(value, nn.Parameter) and not value.requires_grad
    return (value.is_floating_point() or value.is_complex()) and not frozen
