"""Hyper-parameters as part of the optimizer's memory, where a callback can change them."""

# pyright: reportIncompatibleMethodOverride=false
# `count` is the name of the field, as in optax; that tuples have a method of this name is no loss.

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxtrain.equivalents import refuse_foreign
from fxtrain.optim._leaves import device_of, start_count, widest
from fxtrain.optim._nodes import Path, as_code, children, rebuilt
from fxtrain.optim._transform import GradientTransformation


class Scheduled(NamedTuple):
    """A hyper-parameter that follows a schedule, and so cannot be set."""

    value: Tensor  # []: what the last update used


class InjectHyperparamsState(NamedTuple):
    """The memory of ``inject_hyperparams``."""

    count: Tensor  # int64 []: updates made
    hyperparams: dict[str, Tensor | Scheduled]  # each [], in float32, or float64 if a parameter is
    inner_state: Any  # of the transformation


def inject_hyperparams(
    factory: Callable[..., GradientTransformation], *, static: Iterable[str] = ("mask", "muon_mask", "labels")
) -> Callable[..., GradientTransformation]:
    """``factory``, with the numbers it is called with kept in the memory instead of in the graph.

    A number in the memory can be changed between steps, or inside of one, and costs no new graph: see
    ``set_hyperparams``. What is not given keeps its default and takes no memory.

    Args:
        factory: What makes the transformation, such as ``adamw``.
        static: Names of arguments that are functions and no schedules.

    Returns:
        A factory that takes the same arguments. Floats and tensors of shape [] go into the memory; a schedule is
        evaluated at each update and its value shown there; everything else, whole numbers included, stays static.

    Raises:
        TypeError: If ``factory`` does not take the arguments, or none of them can be injected.
        ValueError: At ``init``, if a decay rate such as ``b2`` is so near 1 that float32, in which the hyper-parameters
            of float32 parameters are kept, changes its distance from 1 by more than a thousandth: 0.999999 would be
            0.99999899.

    Example:
        >>> from fxtrain import optim
        >>> tx = inject_hyperparams(optim.adamw)(learning_rate=3e-4, weight_decay=0.1)
        >>> state = tx.init({"w": torch.zeros(2)})
        >>> sorted(state.hyperparams)
        ['learning_rate', 'weight_decay']
        >>> state = set_hyperparams(state, learning_rate=lambda rate: rate / 10)
        >>> state.hyperparams["learning_rate"]
        tensor(3.0000e-05)
    """
    refuse_foreign("factory", "a function that makes a gradient transformation", factory)
    signature = inspect.signature(factory)
    left = frozenset(static)

    def build(*args: Any, **kwargs: Any) -> GradientTransformation:
        given = _flat(signature, args, kwargs)
        for name, value in given.items():
            if not isinstance(value, type):
                refuse_foreign(name, "a number or a schedule", value, as_schedule=True)
        schedules = {
            name: value
            for name, value in given.items()
            if callable(value) and not isinstance(value, type) and name not in left
        }
        numbers = {name: value for name, value in given.items() if isinstance(value, float | Tensor)}
        rest = {name: value for name, value in given.items() if name not in schedules and name not in numbers}
        if not schedules and not numbers:
            raise TypeError(
                f"inject_hyperparams({getattr(factory, '__name__', factory)}) was given no float, tensor or schedule: "
                "name at least one hyper-parameter, as in learning_rate=3e-4."
            )

        # Its checks of the numbers: once they are tensors, nothing can be said of them.
        factory(**{**given, **{name: of(torch.tensor(0)) for name, of in schedules.items()}})

        def init(params: Any) -> InjectHyperparamsState:
            dtype, device = widest(params), device_of(params)
            count = start_count(params)
            for name, value in numbers.items():
                _refuse_rounded(name, value, dtype)
            hyperparams = {name: _scalar(value, dtype, device) for name, value in numbers.items()}
            scheduled = {name: Scheduled(_scalar(of(count), dtype, device)) for name, of in schedules.items()}
            kept = {**hyperparams, **scheduled}
            return InjectHyperparamsState(count, kept, factory(**rest, **_values(kept)).init(params))

        def update(
            updates: Any, opt_state: InjectHyperparamsState, params: Any = None
        ) -> tuple[Any, InjectHyperparamsState]:
            count, kept, inner_state = opt_state
            now = {name: Scheduled(torch.as_tensor(of(count)).to(_value(kept[name]))) for name, of in schedules.items()}
            kept = {**kept, **now}
            updates, inner_state = factory(**rest, **_values(kept)).update(updates, inner_state, params)
            return updates, InjectHyperparamsState(count + 1, kept, inner_state)

        return GradientTransformation(init, update)

    return build


def set_hyperparams(opt_state: Any, **values: Any) -> Any:
    """The memory with other hyper-parameters, wherever ``inject_hyperparams`` keeps them. Pure.

    Args:
        opt_state: The memory of any transformation, however wrapped.
        values: By name: a number, a tensor of shape [], or a function from the present value to the new one.
            A name that is kept in several places is set in all of them.

    Raises:
        ValueError: If a name is nowhere to be found, or follows a schedule. The message says which names there are.
            Also if a decay rate is too near 1 for float32, see ``inject_hyperparams``.

    Example:
        >>> from fxtrain import optim
        >>> tx = optim.chain(optim.clip_by_global_norm(1.0), optim.inject_hyperparams(optim.sgd)(learning_rate=0.1))
        >>> state = set_hyperparams(tx.init({"w": torch.zeros(2)}), learning_rate=0.01)
        >>> get_hyperparams(state)
        {'learning_rate': tensor(0.0100)}
    """
    states = [state for _, state in _injected(opt_state)]
    for name, value in values.items():
        found = [state.hyperparams[name] for state in states if name in state.hyperparams]
        if any(isinstance(value, Scheduled) for value in found):
            raise ValueError(f"{name} follows a schedule: give inject_hyperparams a number instead, to set it.")
        for kept in found:
            _refuse_rounded(name, value, _value(kept).dtype)
        if found:
            continue
        names = sorted({name for state in states for name in state.hyperparams})
        raise ValueError(
            f"No hyper-parameter {name!r} is kept in this optimizer's memory, and there "
            f"{f'are {names}' if names else 'are none'}: name it in inject_hyperparams(...)(...)."
        )
    return _set(opt_state, values)


def get_hyperparams(opt_state: Any) -> dict[str, Tensor]:
    """The injected hyper-parameters by name, scheduled ones included.

    A name that is kept in several places is led by its path: ``"[0].learning_rate"``.
    """
    found = [
        (path, name, value)
        for path, state in _injected(opt_state)
        for name, value in _values(state.hyperparams).items()
    ]
    names = [name for _, name, _ in found]
    return {name if names.count(name) == 1 else f"{as_code(path)}.{name}": value for path, name, value in found}


def _flat(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name, those gathered by ``**kwargs`` among them."""
    given = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given.update(given.pop(name, {}))
        elif parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            raise TypeError(f"inject_hyperparams needs a factory whose arguments have names, and {name} has none.")
    return given


def _refuse_rounded(name: str, value: Any, dtype: torch.dtype) -> None:
    """Refuses a decay rate whose distance from 1 the dtype cannot hold."""
    if name not in _DECAY_RATES or dtype != torch.float32 or not isinstance(value, float) or not 0.5 < value < 1:
        return
    kept = round(value * 2**24) / 2**24  # a multiple of the spacing of float32 below 1
    if abs(kept - value) > _ROUNDING * (1 - value):
        raise ValueError(
            f"{name}={value!r}: expected a decay rate whose distance from 1 is kept in {dtype}, got one that becomes "
            f"{kept!r}. Keep it out of the optimizer state: "
            f"inject_hyperparams(functools.partial(factory, {name}={value!r}))(...)."
        )


_DECAY_RATES = frozenset({"b1", "b2", "adam_b1", "adam_b2", "alpha", "beta", "decay", "momentum", "rho"})
_ROUNDING = 1e-3  # the largest relative change of 1 - value


def _scalar(value: Any, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    # A tensor of the user's is cloned: no two leaves of a state share memory.
    if isinstance(value, Tensor):
        return value.detach().to(device=device, dtype=dtype, copy=True)
    return torch.tensor(value, dtype=dtype, device=device)


def _changed(was: Tensor, value: Any) -> Tensor:
    new: Any = value(was) if callable(value) else value
    if isinstance(new, Tensor):
        return new.to(was).expand(was.shape).clone()
    return torch.full_like(was, new)


def _value(kept: Tensor | Scheduled) -> Tensor:
    return kept.value if isinstance(kept, Scheduled) else kept


def _values(hyperparams: dict[str, Any]) -> dict[str, Tensor]:
    return {name: _value(kept) for name, kept in hyperparams.items()}


def _set(node: Any, values: dict[str, Any]) -> Any:
    inner = children(node)
    if inner is None:
        return node
    new = rebuilt(node, [_set(child, values) for _, child in inner])
    if not isinstance(new, InjectHyperparamsState):
        return new
    given = {name: _changed(_value(was), values[name]) for name, was in new.hyperparams.items() if name in values}
    return InjectHyperparamsState(new.count, {**new.hyperparams, **given}, new.inner_state)


def _injected(node: Any, path: Path = ()) -> list[tuple[Path, InjectHyperparamsState]]:
    """Each state of ``inject_hyperparams`` with its path, those inside of others too."""
    here = [(path, node)] if isinstance(node, InjectHyperparamsState) else []
    return here + [found for key, child in children(node) or [] for found in _injected(child, (*path, key))]
