"""A callable view of a state's model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator

from torch import nn

from fxtrain import rng, tree
from fxtrain.core import TrainState, Tree, describe
from fxtrain.core._shard import holds_shards, refuse_shards
from fxtrain.core._state import refuse_stacked
from fxtrain.model._model import model_of


def view(state: TrainState, *, train: bool = False, key: rng.Key | None = None) -> View:
    """Returns the state's model as a callable, with access to its methods, submodules and parameters.

    Calls do not change the state. They all take the same random samples, which depend on ``key``.

    Args:
        state: State whose parameters and buffers are used.
        train: Whether the module is in training mode.
        key: Key of the random samples. Derived from the state's seed and step by default.

    Raises:
        RuntimeError: When a call writes into a trained parameter in place.

    Example:
        >>> import torch, fxtrain as fx
        >>> state = fx.init(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()))
        >>> model = fx.view(state)
        >>> model(torch.zeros(4, 3)).shape, model[0].weight.shape
        (torch.Size([4, 2]), torch.Size([2, 3]))
    """
    model_of(state)
    if key is not None and not isinstance(key, rng.Key):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"expected key to be a key of fxtrain.rng, got {describe(key)}. Make one: fxtrain.rng.key(seed)."
        )
    if holds_shards(state.params):
        refuse_shards(state.params, "view(state)")
    refuse_stacked(state, "view(state)")
    key = key if key is not None else rng.key(state.seed, stream=rng.Stream.SAMPLE, step=state.step)
    return View(state, train, key, lambda model: model)


class View:
    """A model with the parameters and buffers of a state. Made by ``view``.

    Calls, methods, submodules and items are those of the model. Parameters and buffers read from it are those of the
    state.

    Args:
        state: The state whose parameters and buffers are used.
        train: Whether the module is in training mode.
        key: Key of the random samples of each call.
        reach: Maps the model to the part that is viewed.

    Example:
        >>> import torch, fxtrain as fx
        >>> model = fx.view(fx.init(torch.nn.Linear(2, 1)))
        >>> isinstance(model, View), model.bias.shape
        (True, torch.Size([1]))
    """

    def __init__(self, state: TrainState, train: bool, key: rng.Key, reach: Callable[[Tree], Tree]) -> None:
        self._of = (state, train, key)
        self._reach = reach

    def __call__(self, *args: object, **kwargs: object) -> Tree:
        return self._part(lambda target, args, kwargs: target(*args, **kwargs), _has_modules, args, kwargs)

    def __getattr__(self, name: str) -> Tree:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._part(lambda target: getattr(target, name), lambda part: callable(part) or _has_modules(part))

    def __getitem__(self, key: Hashable) -> Tree:
        return self._part(lambda target: target[key], _has_modules)

    def _part(self, get: Callable[..., Tree], needs_memory: Callable[[Tree], bool], *args: object) -> Tree:
        # Tensors are in place only inside a call, so a module or a method is looked up again when it is called.
        reach = self._reach
        found = self._run(lambda model, *args: get(reach(model), *args), *args)
        return View(*self._of, lambda model: get(reach(model), *args)) if needs_memory(found) else found

    def _run(self, function: Callable[..., Tree], *args: object) -> Tree:
        state, train, key = self._of

        def finished(model: Tree, *args: object) -> Tree:
            output = function(model, *args)
            # A generator would run after the tensors are gone.
            return iter(list(output)) if isinstance(output, Iterator) else output

        finished.__name__ = "a call of the view"
        return state.model.call(state.params, state.buffers, finished, *args, train=train, key=key).output

    def __repr__(self) -> str:
        return f"View of {self._of[0].model!r} at step {int(self._of[0].step)}"


def _has_modules(part: Tree) -> bool:
    return any(isinstance(leaf, nn.Module) for leaf in tree.leaves(part))
