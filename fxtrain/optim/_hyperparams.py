"""Hyperparameters in the optimizer state, where callbacks can change them, and the learning rates of any optimizer."""

# pyright: reportIncompatibleMethodOverride=false
# As in optax, states have a field named `count`, which shadows the method of tuples.

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Call, Scalar, TrainState, Tree, check_callable, describe, did_you_mean, name_of
from fxtrain.equivalents import refuse_foreign
from fxtrain.optim._leafwise import widest
from fxtrain.optim._learning_rates import LearningRate, LearningRates, by_group, inside
from fxtrain.optim._state import start_count
from fxtrain.optim._transform import GradientTransformation, refuse_unless_transformation
from fxtrain.schedules import Schedule
from fxtrain.schedules._schedule import refuse_unusable_function
from fxtrain.tree import Path, as_code, children, rebuilt


class Scheduled(NamedTuple):
    """A hyperparameter that follows a schedule and therefore cannot be set."""

    value: Tensor  # []: the value used by the last update


class InjectHyperparamsState(NamedTuple):
    """The state of ``inject_hyperparams``."""

    count: Tensor  # int64 []: updates made
    hyperparams: dict[str, Tensor | Scheduled]  # each [], float32, or float64 if a parameter is
    inner_state: Tree  # state of the transformation


def inject_hyperparams(
    factory: Callable[..., GradientTransformation], *, static: Iterable[str] = ("mask", "muon_mask", "labels")
) -> Callable[..., GradientTransformation]:
    """Wraps ``factory`` so that its hyperparameters are part of the optimizer state instead of constants of the graph.

    A hyperparameter in the state can be changed between steps, or inside one, without a retrace: see
    ``set_hyperparams``. Arguments that are not passed keep their defaults and are not stored.

    The learning rate is logged in any case. A callback logs the others:
    ``lambda state, event: (state, fx.Control(log=fx.optim.get_hyperparams(state.opt_state)))``.

    Args:
        factory: A function that returns a transformation, such as ``adamw``.
        static: Names of arguments that are functions but not schedules.

    Returns:
        A factory with the same arguments. Floats and tensors of shape [] become part of the state. Schedules are
        evaluated at each update, and the state holds their last values. All other arguments, including ints, stay
        static.

    Raises:
        TypeError: If ``factory`` does not take the arguments, or none of them can be injected.
        ValueError: At ``init``, if a decay rate such as ``b2`` is too close to 1 for float32, which holds the
            hyperparameters of float32 parameters: its distance from 1 would change by more than a thousandth. For
            example, 0.999999 would become 0.99999899.

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
    if isinstance(factory, GradientTransformation):
        raise TypeError(
            f"expected factory to be a function that makes a gradient transformation, got {factory} already made. Pass "
            "the function, and its arguments to the result, as in inject_hyperparams(optim.sgd)(learning_rate=0.1)."
        )
    check_callable("factory", factory, "that makes a gradient transformation")
    signature = inspect.signature(factory)
    never_schedules = frozenset(static)

    def build(*args: object, **kwargs: object) -> GradientTransformation:
        given = _flat(signature, args, kwargs)
        schedules: dict[str, Schedule] = {}
        unscheduled: dict[str, Scalar] = {}
        static_arguments: dict[str, Any] = {}
        for name, value in given.items():
            if not isinstance(value, type):
                refuse_foreign(name, "a number or a schedule", value, as_schedule=True)
            if callable(value) and not isinstance(value, type) and name not in never_schedules:
                refuse_unusable_function(name, value)
                schedules[name] = cast(Schedule, value)
            elif isinstance(value, float | Tensor):
                unscheduled[name] = value
            else:
                static_arguments[name] = value
        if not schedules and not unscheduled:
            raise TypeError(
                f"expected inject_hyperparams({name_of(factory)}) to get a float, a tensor or a "
                "schedule, got none. Pass at least one hyperparameter, such as learning_rate=3e-4."
            )

        # Runs the factory's checks of its arguments, because later calls pass tensors, whose values it cannot check.
        starts = {name: of(torch.tensor(0)) for name, of in schedules.items()}
        checked = factory(**{**given, **starts})

        def current(opt_state: InjectHyperparamsState) -> dict[str, Tensor | Scheduled]:
            """Returns the hyperparameters of the next update."""
            count, kept, _ = opt_state
            now = {name: Scheduled(torch.as_tensor(of(count)).to(_value(kept[name]))) for name, of in schedules.items()}
            return {**kept, **now}

        def made(hyperparams: dict[str, Tensor | Scheduled]) -> GradientTransformation:
            return factory(**static_arguments, **_values(hyperparams))

        def init(params: Tree) -> InjectHyperparamsState:
            dtype, device = widest(params), tree.device_of(params)
            count = start_count(params)
            for name, value in unscheduled.items():
                _refuse_rounded(name, value, dtype)
            hyperparams = {name: _scalar(value, dtype, device) for name, value in unscheduled.items()}
            scheduled = {name: Scheduled(_scalar(of(count), dtype, device)) for name, of in schedules.items()}
            kept = {**hyperparams, **scheduled}
            return InjectHyperparamsState(count, kept, made(kept).init(params))

        def update(
            updates: Tree, opt_state: InjectHyperparamsState, params: Tree | None = None
        ) -> tuple[Tree, InjectHyperparamsState]:
            kept = current(opt_state)
            updates, inner_state = made(kept).update(updates, opt_state.inner_state, params)
            return updates, InjectHyperparamsState(opt_state.count + 1, kept, inner_state)

        def learning_rate(index: int, of_checked: LearningRate) -> LearningRate:
            def value(opt_state: InjectHyperparamsState) -> Scalar:
                return made(current(opt_state)).learning_rates[index].value(opt_state.inner_state)

            started = (schedules[name] for name, start in starts.items() if start is of_checked.given)
            return of_checked._replace(given=next(started, of_checked.given), value=value, follows_step=False)

        rates = tuple(learning_rate(*each) for each in enumerate(checked.learning_rates))
        call = Call(factory, args, kwargs, name=f"inject_hyperparams({name_of(factory)})")
        return GradientTransformation(init, update, rates, call)

    return build


def set_hyperparams(opt_state: Tree, **values: Scalar | Callable[[Tensor], Scalar]) -> Tree:
    """Returns the optimizer state with new values of hyperparameters from ``inject_hyperparams``.

    Args:
        opt_state: The state of any transformation, with injected hyperparameters at any depth.
        values: By name: a float, a tensor of shape [], or a function from the current value to the new one. A name
            that occurs more than once is set everywhere.

    Raises:
        ValueError: If a name does not exist or follows a schedule, or if a decay rate is too close to 1 for float32;
            see ``inject_hyperparams``.

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
            raise ValueError(
                f"expected {name} to be a constant, got a hyperparameter that follows a schedule. To set it, pass a "
                "float to inject_hyperparams."
            )
        for kept in found:
            _refuse_rounded(name, value, _value(kept).dtype)
        if not found:
            names = sorted({name for state in states for name in state.hyperparams})
            raise ValueError(
                f"expected a hyperparameter in the optimizer state ({', '.join(map(repr, names)) or 'it has none'}), "
                f"got {name!r}.{did_you_mean(name, names)} Inject it: "
                f"fx.optim.inject_hyperparams(factory)({name}=...)."
            )
    return _set(opt_state, values)


def get_hyperparams(opt_state: Tree) -> dict[str, Tensor]:
    """Returns the injected hyperparameters by name, including scheduled ones.

    A name that occurs more than once is prefixed by its path: ``"[0].learning_rate"``.

    Example:
        >>> from fxtrain import optim
        >>> state = inject_hyperparams(optim.sgd)(learning_rate=0.5, momentum=0.9).init({"w": torch.zeros(2)})
        >>> get_hyperparams(state)
        {'learning_rate': tensor(0.5000), 'momentum': tensor(0.9000)}
    """
    found = [
        (path, name, value)
        for path, state in _injected(opt_state)
        for name, value in _values(state.hyperparams).items()
    ]
    names = [name for _, name, _ in found]
    return {name if names.count(name) == 1 else f"{as_code(path)}.{name}": value for path, name, value in found}


def learning_rates(tx: GradientTransformation | Mapping[str, Any], state: TrainState) -> dict[str, Tensor]:
    """Returns the learning rates that the next update uses, with names for logs.

    ``train_step`` adds them to its metrics. A hand-written step adds them before its update:
    ``metrics = {"loss": loss, **fx.optim.learning_rates(tx, state)}``.

    Args:
        tx: The gradient transformation given to ``init``, or a dict of them.
        state: The state before the update.

    Returns:
        From ``"learning_rate"``, or ``"learning_rate/<group>"`` if there is more than one, to a tensor of shape [],
        float32, or float64 if a parameter is. Groups are labels of ``partition``, patterns of ``unfreeze``, positions
        in ``chain`` and keys of ``tx``. Groups with the same schedule and the same step share one learning rate. Empty
        if there is none, as for ``adafactor()`` and ``rprop(0.1)``.

    Raises:
        TypeError: If ``tx`` is not a gradient transformation.
        ValueError: If the state was not initialized with ``tx``.

    Example:
        >>> import fxtrain as fx
        >>> tx = fx.optim.adamw(fx.schedules.linear(0.1, 0.0, transition_steps=10))
        >>> state = fx.init(torch.nn.Linear(1, 1), tx)
        >>> learning_rates(tx, state)
        {'learning_rate': tensor(0.1000)}
    """
    dtype = widest(state.params)

    def scalar(rate: LearningRate) -> Tensor:
        try:
            value = rate.value(state.opt_state)
        except Exception as error:
            raise ValueError(
                f"expected state.opt_state to be the state of {tx!r}, got {describe(state.opt_state)}. Pass the "
                "transformation given to fx.init."
            ) from error
        # A copy, because no two tensors that a step returns may share storage.
        if isinstance(value, Tensor):
            return value.detach().to(state.step.device, dtype, copy=True)
        # Not torch.tensor(...), which would become an input of the graph.
        return torch.full_like(state.step, value, dtype=dtype)

    return {name: scalar(rate) for name, rate in learning_rates_by_name(tx).items()}


def learning_rates_by_name(tx: GradientTransformation | Mapping[str, Any]) -> dict[str, LearningRate]:
    """Returns the learning rates of transformations by their names for logs."""
    return {f"learning_rate/{rate.group}" if rate.group else "learning_rate": rate for rate in _rates(tx)}


def _rates(tx: GradientTransformation | Mapping[str, Any]) -> LearningRates:
    if isinstance(tx, Mapping):
        return by_group({key: inside(_rates(each), lambda state, key=key: state[key]) for key, each in tx.items()})
    refuse_unless_transformation("tx", tx)
    return tx.learning_rates


def _flat(signature: inspect.Signature, args: tuple[object, ...], kwargs: dict[str, object]) -> dict[str, Any]:
    """Returns the arguments by name, including those passed as ``**kwargs``."""
    given = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given.update(given.pop(name, {}))
        elif parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            raise TypeError(
                f"expected a factory whose arguments can be passed by name, got one with {name!r}, which cannot. Wrap "
                "it in a function with named arguments."
            )
    return given


def _refuse_rounded(name: str, value: object, dtype: torch.dtype) -> None:
    """Raises if ``dtype`` cannot hold a decay rate's distance from 1."""
    if name not in _DECAY_RATES or dtype != torch.float32 or not isinstance(value, float) or not 0.5 < value < 1:
        return
    kept = round(value * 2**24) / 2**24  # rounded to the spacing of float32 below 1
    if abs(kept - value) > _ROUNDING * (1 - value):
        raise ValueError(
            f"expected {name} to be a decay rate whose distance from 1 fits {dtype}, got {value!r}, which becomes "
            f"{kept!r}. Keep it out of the optimizer state: "
            f"inject_hyperparams(functools.partial(factory, {name}={value!r}))(...)."
        )


_DECAY_RATES = frozenset({"b1", "b2", "adam_b1", "adam_b2", "alpha", "beta", "decay", "momentum", "rho"})
_ROUNDING = 1e-3  # largest accepted relative change of 1 - value


def _scalar(value: Scalar, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    # The user's tensors are copied, because no two leaves of a state may share storage.
    if isinstance(value, Tensor):
        return value.detach().to(device=device, dtype=dtype, copy=True)
    return torch.tensor(value, dtype=dtype, device=device)


def _changed(was: Tensor, value: Scalar | Callable[[Tensor], Scalar]) -> Tensor:
    new = value(was) if callable(value) else value
    if isinstance(new, Tensor):
        return new.to(was).expand(was.shape).clone()
    return torch.full_like(was, new)


def _value(kept: Tensor | Scheduled) -> Tensor:
    return kept.value if isinstance(kept, Scheduled) else kept


def _values(hyperparams: dict[str, Tensor | Scheduled]) -> dict[str, Tensor]:
    return {name: _value(kept) for name, kept in hyperparams.items()}


def _set(node: Tree, values: Mapping[str, Scalar | Callable[[Tensor], Scalar]]) -> Tree:
    inner = children(node)
    if inner is None:
        return node
    new = rebuilt(node, [_set(child, values) for _, child in inner])
    if not isinstance(new, InjectHyperparamsState):
        return new
    given = {name: _changed(_value(was), values[name]) for name, was in new.hyperparams.items() if name in values}
    return InjectHyperparamsState(new.count, {**new.hyperparams, **given}, new.inner_state)


def _injected(node: Tree, path: Path = ()) -> list[tuple[Path, InjectHyperparamsState]]:
    """Returns each state of ``inject_hyperparams`` with its path, including nested ones."""
    here = [(path, node)] if isinstance(node, InjectHyperparamsState) else []
    return here + [found for key, child in children(node) or [] for found in _injected(child, (*path, key))]
