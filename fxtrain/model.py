"""The functional model: a module's memory as trees of tensors, and its code as a function of them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fxtrain import rng, tree
from fxtrain.core import Due, TrainState


class Model:
    """The architecture of a state: its modules, without memory. Static, and equal only to itself.

    The modules are copied once, onto the meta device, with their ties; the user's own are left as they were.

    Args:
        modules: A module, or a pytree of modules and tensors.
    """

    def __init__(self, modules: Any) -> None:
        leaves, structure = tree.flatten(modules)
        found = [leaf for leaf in leaves if isinstance(leaf, nn.Module)]
        indices = iter(range(len(found)))
        # The template is the tree with each module's index at its place, and -1 at the place of a bare tensor.
        self.template = tree.unflatten(structure, [next(indices) if isinstance(x, nn.Module) else -1 for x in leaves])
        original = _Caller(found)
        self._names = [name for name, _ in original.named_parameters()]
        self._buffer_names = [name for name, _ in original.named_buffers()]
        trainable = {
            name: _differentiable(value) and value.requires_grad for name, value in original.named_parameters()
        }
        self.trainable = self._grouped(trainable, tree.map(_differentiable, _bare_tensors(modules)))
        self._training = _without_memory(original)
        for module in self._training.children():
            # A module that is in eval mode as a whole was loaded or used, not configured; single parts that are
            # in eval mode, such as frozen batch norms, are meant.
            if not module.training:
                module.train()
        self._evaluating = copy.deepcopy(self._training).eval()

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
            if not self._names and not self._buffer_names and not _has_modules(self.template):
                return function(params, *args), buffers
            tensors = {**self._flat(params), **{k: v.clone() for k, v in self._flat(buffers).items()}}
            caller = self._training if train else self._evaluating
            output, written = functional_call(caller, tensors, (self.template, params, function, args))
        return output, self._grouped(written, tree.map(lambda _: None, _bare_tensors(params)))

    def split(self, params: Any, wrt: str | None = None) -> Any:
        """The trainable parameters, with None in the place of the others: what gradients are taken of."""
        mask, whole = (self.trainable, params) if wrt is None else (self.trainable[wrt], params[wrt])
        return tree.map(lambda keep, leaf: leaf if keep else None, mask, whole)

    def merge(self, params: Any, trainable: Any, wrt: str | None = None) -> Any:
        """``params`` with the trainable ones replaced."""
        if wrt is not None:
            return {**params, wrt: self._merged(self.trainable[wrt], params[wrt], trainable)}
        return self._merged(self.trainable, params, trainable)

    @staticmethod
    def _merged(mask: Any, params: Any, trainable: Any) -> Any:
        leaves, structure = tree.flatten(params)
        moved = iter(tree.leaves(trainable))
        return tree.unflatten(
            structure, [next(moved) if keep else leaf for keep, leaf in zip(tree.leaves(mask), leaves, strict=True)]
        )

    def memory(self, modules: Any) -> tuple[Any, Any]:
        """The parameters and buffers of modules of this architecture: trees of detached clones."""
        caller = _Caller([leaf for leaf in tree.leaves(modules) if isinstance(leaf, nn.Module)])
        bare = tree.map(lambda leaf: leaf.detach().clone(), _bare_tensors(modules))
        params = {name: value.detach().clone() for name, value in caller.named_parameters()}
        buffers = {name: value.detach().clone() for name, value in caller.named_buffers()}
        return self._grouped(params, bare), self._grouped(buffers, tree.map(lambda _: None, bare))

    def _flat(self, values: Any) -> dict[str, Tensor]:
        """From a tree of dicts by name to one dict, whose names start with the module's index."""
        flat: dict[str, Tensor] = {}

        def add(index: int, named: Any) -> None:
            if index >= 0:
                flat.update({f"{index}.{name}": value for name, value in named.items()})

        tree.map(add, self.template, values)
        return flat

    def _grouped(self, flat: Mapping[str, Any], bare: Any) -> Any:
        """From one dict to a tree of dicts by name; ``bare`` fills the places that hold no module."""
        bare_leaves = iter(bare)

        def group(index: int) -> Any:
            if index < 0:
                return next(bare_leaves)
            prefix = f"{index}."
            return {name[len(prefix) :]: value for name, value in flat.items() if name.startswith(prefix)}

        return tree.map(group, self.template)

    def __repr__(self) -> str:
        return f"Model({', '.join(type(module).__name__ for module in self._training.children())})"


def init(
    model: Any,
    tx: Any = None,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> TrainState:
    """The state at step 0 of training ``model`` with ``tx``. The module is left as it was, and is not needed again.

    Args:
        model: A module; or a pytree, such as a dict, of modules and tensors. Parameters that do not require
            gradients are kept as they are, tied ones stay tied. A bare tensor is a parameter.
        tx: A gradient transformation; a dict of them, for the entries of a dict of modules; or None.
        seed: Every random number of the run is a function of it.
        device: Where the state is to live; by default where the model is.
        dtype: What floating parameters are cast to; by default they stay as they are.

    Returns:
        A state that shares no memory with the model.

    Raises:
        TypeError: If a leaf of ``model`` is neither a module nor a tensor, or is not yet materialised.
        ValueError: If the keys of ``tx`` are not those of ``model``.

    Example:
        >>> import torch, fxtrain as fx
        >>> state = fx.init(torch.nn.Linear(3, 2), fx.optim.adamw(1e-3), seed=0)
        >>> sorted(state.params), int(state.step)
        (['bias', 'weight'], 0)
    """
    _refuse_unusable(model)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed={seed!r}: an integer is wanted.")
    architecture = Model(model)
    params, buffers = architecture.memory(model)
    params = tree.map(lambda leaf: leaf.to(device, dtype if leaf.is_floating_point() else None), params)
    buffers = tree.map(lambda leaf: leaf.to(device), buffers)
    where = next((leaf.device for leaf in tree.leaves((params, buffers))), device)
    return TrainState(
        step=torch.tensor(0, device=where),
        params=params,
        buffers=buffers,
        opt_state=_init_optimizer(tx, architecture.split(params)),
        seed=torch.tensor(seed, device=where),
        position=torch.tensor(0, device=where),
        slots={},
        due=Due.start(where),
        model=architecture,
    )


def view(state: TrainState, *, train: bool = False, key: rng.Key | None = None) -> View:
    """The state's model as something to call: any method, any submodule, any parameter; nothing it does is kept.

    Args:
        state: Whose parameters and buffers to use.
        train: Whether the module is in training mode.
        key: Where its random numbers come from; by default from the state's seed and step.

    Example:
        >>> import torch, fxtrain as fx
        >>> state = fx.init(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()))
        >>> model = fx.view(state)
        >>> model(torch.zeros(4, 3)).shape, model[0].weight.shape
        (torch.Size([4, 2]), torch.Size([2, 3]))
    """
    if state.model is None:
        raise ValueError("This state has no model: it was not made by fxtrain.init.")
    key = key if key is not None else rng.key(state.seed, stream=rng.Stream.SAMPLE, step=state.step)
    return View(state, train, key, lambda model: model)


class View:
    """A model with a state's memory; made by ``view``."""

    def __init__(self, state: TrainState, train: bool, key: rng.Key, reach: Callable[[Any], Any]) -> None:
        self._of = (state, train, key)
        self._reach = reach

    def _run(self, function: Callable[[Any], Any]) -> Any:
        state, train, key = self._of
        reach = self._reach
        output, _ = state.model.call(
            state.params, state.buffers, lambda model: function(reach(model)), train=train, key=key
        )
        return output

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(lambda target: target(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._part(lambda target: getattr(target, name))

    def __getitem__(self, key: Any) -> Any:
        return self._part(lambda target: target[key])

    def _part(self, get: Callable[[Any], Any]) -> Any:
        # Only inside the call is the memory in place, so what can be called is reached again when it is called.
        found = self._run(get)
        if not callable(found) and not isinstance(found, Mapping):
            return found
        reach = self._reach
        return View(*self._of, lambda model: get(reach(model)))

    def __repr__(self) -> str:
        return f"View of {self._of[0].model!r} at step {int(self._of[0].step)}"


class _Caller(nn.Module):
    """Runs a function of modules. As it is a module itself, ``functional_call`` can swap in their memory."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        for index, module in enumerate(modules):
            self.add_module(str(index), module)

    def forward(
        self, template: Any, params: Any, function: Callable[..., Any], args: tuple[Any, ...]
    ) -> tuple[Any, dict[str, Tensor]]:
        modules = list(self.children())
        model = tree.map(lambda index, leaf: modules[index] if index >= 0 else leaf, template, params)
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


def _bare_tensors(modules: Any) -> list[Tensor]:
    return [leaf for leaf in tree.leaves(modules) if isinstance(leaf, Tensor)]


def _differentiable(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _has_modules(template: Any) -> bool:
    return any(index >= 0 for index in tree.leaves(template))


def _refuse_unusable(model: Any) -> None:
    for path, leaf in zip(tree.paths(model, "model"), tree.leaves(model), strict=True):
        if not isinstance(leaf, nn.Module | Tensor):
            raise TypeError(f"{path} is a {type(leaf).__name__}: init takes modules, tensors, and pytrees of them.")
        lazy = isinstance(leaf, nn.Module) and any(nn.parameter.is_lazy(p) for p in leaf.parameters())
        if lazy:
            raise TypeError(
                f"{path} has lazy parameters, whose shapes are not known yet: run it once on a batch first."
            )


def _init_optimizer(tx: Any, params: Any) -> Any:
    if tx is None:
        return {}
    if not isinstance(tx, Mapping):
        return tx.init(params)
    if not isinstance(params, Mapping) or set(tx) != set(params):
        came = sorted(params) if isinstance(params, Mapping) else type(params).__name__
        raise ValueError(f"tx has transformations for {sorted(tx)}, and the model has {came}: give one for each.")
    return {name: transformation.init(params[name]) for name, transformation in tx.items()}
