"""Gradient transformations, their composition, and those made from a rule for one leaf."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, ParamSpec, Protocol

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Call, Tree, describe, name_of, records_call
from fxtrain.equivalents import refuse_foreign, with_known_arguments
from fxtrain.optim._leafwise import combine, map_with_state, widest
from fxtrain.optim._learning_rates import LearningRates, by_group, inside

P = ParamSpec("P")


class UpdateFn(Protocol):
    """The function ``update`` of a transformation: from gradients, state and parameters to updates and new state."""

    def __call__(self, updates: Tree, opt_state: Tree, params: Tree | None = None, /) -> tuple[Tree, Tree]: ...


class GradientTransformation(NamedTuple):
    """A pair of pure functions that turn gradients into updates.

        opt_state = tx.init(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = apply_updates(params, updates)

    ``update`` preserves the structure, shapes and dtypes of gradients and state, whatever dtype it computes in. So
    transformations can be chained, and a compiled step compiles once.

    Args:
        init: From parameters (a pytree of floating-point or complex tensors) to the optimizer state, a pytree of
            tensors.
        update: From gradients, state and parameters to updates, which are added to the parameters, and the new state.
            The parameters may be omitted if no transformation needs them.

        learning_rates: The learning rates, for logs. See ``LearningRate``.
        call: The call that made it, for its ``repr``. Set by the functions of this package.

    Example:
        >>> def update(updates, opt_state, params=None):
        ...     return tree.map(lambda u: -0.1 * u, updates), opt_state + 1
        >>> tx = GradientTransformation(lambda params: torch.tensor(0), update)
        >>> tx.update(torch.tensor(2.0), tx.init(torch.tensor(0.0)))
        (tensor(-0.2000), tensor(1))
    """

    init: Callable[[Tree], Tree]
    update: UpdateFn
    learning_rates: LearningRates = ()
    call: Call | None = None

    def __repr__(self) -> str:
        if self.call is not None:
            return repr(self.call)
        *outer, name = getattr(self.update, "__qualname__", name_of(self.update)).split(".<locals>.")
        # Functions inside of a factory are usually named like this, while the factory has the telling name.
        return f"{outer[-1]}(...)" if outer and name in ("update", "update_fn", "<lambda>") else name


def _with_call(tx: GradientTransformation, call: Call) -> GradientTransformation:
    return tx._replace(call=call)


def described(function: Callable[P, GradientTransformation]) -> Callable[P, GradientTransformation]:
    """Decorates a function that makes transformations, so that they show the call that made them."""
    return records_call(_with_call)(with_known_arguments(function))


def refuse_unless_transformation(argument: str, value: object) -> None:
    """Raises unless ``value`` is a transformation. For torch and optax optimizers the error has the equivalent."""
    if isinstance(value, GradientTransformation):
        return
    refuse_foreign(argument, "a gradient transformation", value)
    raise TypeError(
        f"expected {argument} to be a gradient transformation, got {describe(value)}. Build one with fx.optim, such as "
        "fx.optim.sgd(0.1)."
    )


class EmptyState(NamedTuple):
    """The state of a stateless transformation."""


@described
def stateless(update: Callable[[Tree, Tree | None], Tree]) -> GradientTransformation:
    """Makes a transformation without state from a function ``(updates, params) -> updates``.

    Args:
        update: A pure function of the updates and the parameters, which may be None.

    Example:
        >>> halve = stateless(lambda updates, params: tree.map(lambda u: u / 2, updates))
        >>> halve.update({"w": torch.tensor(4.0)}, halve.init({}))
        ({'w': tensor(2.)}, EmptyState())
    """

    def apply(updates: Tree, opt_state: Tree, params: Tree | None = None) -> tuple[Tree, Tree]:
        return update(updates, params), opt_state

    def init(params: Tree) -> EmptyState:
        return EmptyState()

    return GradientTransformation(init, apply)


@described
def identity() -> GradientTransformation:
    """Returns updates unchanged.

    Example:
        >>> tx = identity()
        >>> grads = torch.tensor([3.0, -200.0])
        >>> tx.update(grads, tx.init(grads), grads)[0]
        tensor([   3., -200.])
    """
    return stateless(lambda updates, params: updates)


@described
def set_to_zero() -> GradientTransformation:
    """Replaces updates by zeros, which freezes the parameters.

    Example:
        >>> tx = set_to_zero()
        >>> grads = torch.tensor([3.0, -200.0])
        >>> tx.update(grads, tx.init(grads), grads)[0]
        tensor([0., 0.])
    """
    return stateless(lambda updates, params: tree.zeros_like(updates))


@described
def chain(*transforms: GradientTransformation) -> GradientTransformation:
    """Applies transformations in order, each to the updates of the previous one.

    Args:
        transforms: Any number of transformations. The state is a tuple with one entry per transformation.

    Raises:
        TypeError: If an argument is not a gradient transformation.
        ValueError: At ``update``, if the state has a different number of entries.

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

    def init(params: Tree) -> tuple[Tree, ...]:
        return tuple(transform.init(params) for transform in transforms)

    def update(updates: Tree, opt_state: Tree, params: Tree | None = None) -> tuple[Tree, Tree]:
        if len(opt_state) != len(transforms):
            raise ValueError(
                f"expected the state of a chain of {len(transforms)} transformations, got {len(opt_state)} states. "
                "Pass the state from this chain's init."
            )
        states: list[Tree] = []
        for transform, state in zip(transforms, opt_state, strict=True):
            updates, state = transform.update(updates, state, params)
            states.append(state)
        return updates, tuple(states)

    learning_rates = {
        str(index): inside(transform.learning_rates, lambda state, index=index: state[index])
        for index, transform in enumerate(transforms)
    }
    return GradientTransformation(init, update, by_group(learning_rates, parallel=False))


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """Returns ``params + updates``, rounded once to the dtypes of the parameters.

    Args:
        params: Pytree of tensors.
        updates: Pytree like ``params``.

    Raises:
        ValueError: If the trees or the shapes of their leaves differ. The message names the path.

    Example:
        >>> apply_updates({"w": torch.tensor(1.0)}, {"w": torch.tensor(-0.5)})
        {'w': tensor(0.5000)}
    """
    return combine(torch.add, "params", params, "updates", updates)


Rule = Callable[..., tuple[Tensor, ...]]
"""Maps an update, its state and its scalars to the new update and state; see ``map_with_state``."""


def from_rule(init: Callable[[Tree], tuple[Tree, ...]], rule: Rule) -> GradientTransformation:
    """Makes a transformation whose state has only trees like the parameters.

    Args:
        init: From the parameters to the state, a named tuple.
        rule: Takes an update and the leaves of the state's fields, and returns new ones.

    Example:
        >>> tx = from_rule(lambda params: EmptyState(), lambda update: (2 * update,))
        >>> tx.update(torch.tensor(3.0), tx.init(torch.tensor(0.0)))
        (tensor(6.), EmptyState())
    """

    def update(updates: Tree, opt_state: Tree, params: Tree | None = None) -> tuple[Tree, Tree]:
        updates, *state = map_with_state(rule, updates, *opt_state)
        return updates, type(opt_state)(*state)

    return GradientTransformation(init, update)


def from_counted_rule(
    init: Callable[[Tree], tuple[Tree, ...]], rule: Rule, numbers: Callable[[Tensor, torch.dtype], Sequence[Tensor]]
) -> GradientTransformation:
    """Makes a transformation whose state begins with the update counts of the parameters.

    Args:
        init: From the parameters to the state, a named tuple: first a ``PerParameter`` of counts, then trees like the
            parameters.
        rule: Takes an update, the leaves of the state's trees and one scalar of each of ``numbers``, and returns the
            new update and leaves.
        numbers: From the counts, which include this update, and a dtype, to vectors with one scalar per parameter.
    """

    def update(updates: Tree, opt_state: Tree, params: Tree | None = None) -> tuple[Tree, Tree]:
        count, *state = opt_state
        count = count + 1
        updates, *state = map_with_state(rule, updates, *state, numbers=numbers(count.values, widest(updates)))
        return updates, type(opt_state)(count, *state)

    return GradientTransformation(init, update)
