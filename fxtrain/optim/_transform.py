"""Gradient transformations: a pair of pure functions, and how they are put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fxtrain import tree
from fxtrain.equivalents import refuse_foreign
from fxtrain.optim._leaves import combine


class GradientTransformation(NamedTuple):
    """A pair of pure functions: the noun of this package.

        opt_state = tx.init(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = apply_updates(params, updates)

    ``update`` keeps the structure, shapes and dtypes of what it is given, whatever dtype it computes in, and those
    of its memory: so transformations chain, and a compiled step compiles once.

    Args:
        init: From parameters (a pytree of floating or complex tensors) to the memory, a pytree of tensors.
        update: From gradients, memory and parameters to updates, which are added to the parameters, and the new
            memory. Parameters may be left out where no transformation needs them.
    """

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]


def refuse_unless_transformation(argument: str, value: Any) -> None:
    """Refuses what is no gradient transformation; for optimizers of torch and optax the message has the equivalent."""
    if isinstance(value, GradientTransformation):
        return
    refuse_foreign(argument, "a gradient transformation", value)
    raise TypeError(
        f"expected {argument} to be a gradient transformation, got {type(value).__name__}. "
        "Make one by a function of fx.optim, such as fx.optim.sgd(0.1)."
    )


class EmptyState(NamedTuple):
    """The memory of a transformation that has none."""


def stateless(update: Callable[[Any, Any], Any]) -> GradientTransformation:
    """The transformation ``(updates, params) -> updates`` without memory.

    Args:
        update: A pure function of the updates and of the parameters, which may be None.

    Example:
        >>> halve = stateless(lambda updates, params: tree.map(lambda u: u / 2, updates))
        >>> halve.update({"w": torch.tensor(4.0)}, halve.init({}))
        ({'w': tensor(2.)}, EmptyState())
    """

    def apply(updates: Any, opt_state: Any, params: Any = None) -> tuple[Any, Any]:
        return update(updates, params), opt_state

    def init(params: Any) -> EmptyState:
        return EmptyState()

    return GradientTransformation(init, apply)


def identity() -> GradientTransformation:
    """Updates as they come."""
    return stateless(lambda updates, params: updates)


def set_to_zero() -> GradientTransformation:
    """Zeros: a parameter that gets them is frozen."""
    return stateless(lambda updates, params: tree.zeros_like(updates))


def chain(*transforms: GradientTransformation) -> GradientTransformation:
    """One transformation after another; each gets the updates of the one before it.

    Args:
        transforms: Any number. The memory is a tuple with one entry for each.

    Raises:
        TypeError: If an argument is no gradient transformation.

    Example:
        >>> from fxtrain import optim
        >>> tx = chain(optim.clip_by_global_norm(1.0), optim.sgd(0.1))
        >>> params = {"w": torch.tensor([3.0, 4.0])}
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> updates["w"]
        tensor([-0.0600, -0.0800])
    """
    for index, transform in enumerate(transforms):
        refuse_unless_transformation(f"argument {index} of chain", transform)

    def init(params: Any) -> tuple[Any, ...]:
        return tuple(transform.init(params) for transform in transforms)

    def update(updates: Any, opt_state: Any, params: Any = None) -> tuple[Any, Any]:
        if len(opt_state) != len(transforms):
            raise ValueError(
                f"A chain of {len(transforms)} transformations got the memory of {len(opt_state)}: "
                "give it what its own init made."
            )
        states: list[Any] = []
        for transform, state in zip(transforms, opt_state, strict=True):
            updates, state = transform.update(updates, state, params)
            states.append(state)
        return updates, tuple(states)

    return GradientTransformation(init, update)


def apply_updates(params: Any, updates: Any) -> Any:
    """``params + updates``, rounded once to the dtypes of the parameters.

    Raises:
        ValueError: If the trees or the shapes of their leaves differ. The message names the path.

    Example:
        >>> apply_updates({"w": torch.tensor(1.0)}, {"w": torch.tensor(-0.5)})
        {'w': tensor(0.5000)}
    """
    return combine(torch.add, "params", params, "updates", updates)
