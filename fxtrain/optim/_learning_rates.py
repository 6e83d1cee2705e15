"""The learning rates of transformations, read from their states without running an update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from fxtrain.core import Scalar, Tree
from fxtrain.schedules import Schedule

ScalarOrSchedule = float | Tensor | Schedule
"""A float, a tensor of shape [], or a function from the step to one of these."""


class LearningRate(NamedTuple):
    """A learning rate of a transformation, for logs and summaries.

    Args:
        given: The argument of the optimizer: a float, a tensor of shape [], or a schedule.
        value: A pure function from the state of the transformation to the value that the next update uses.
        group: The group of parameters, such as a label of ``partition``. Empty if there is only one.
        follows_step: Whether the value depends only on ``given`` and the number of steps, so that groups with the same
            ``given`` have the same value.

    Example:
        >>> from fxtrain import optim, schedules
        >>> optim.sgd(schedules.cosine(0.1, 100)).learning_rates[0].given
        cosine(0.1, 100)
    """

    given: ScalarOrSchedule
    value: Callable[[Tree], Scalar]
    group: str = ""
    follows_step: bool = True

    def is_like(self, other: LearningRate) -> bool:
        """Returns whether two groups always have the same value."""
        one, two = self.given, other.given
        same = one == two if isinstance(one, float | int) and isinstance(two, float | int) else one is two
        return same and self.follows_step and other.follows_step


LearningRates = tuple[LearningRate, ...]


def inside(rates: LearningRates, state_of: Callable[[Tree], Tree], *, follows_step: bool = True) -> LearningRates:
    """Returns the learning rates of a transformation for another one that wraps it.

    Args:
        rates: The learning rates.
        state_of: From the state of the wrapper to that of the wrapped transformation.
        follows_step: False if the wrapper leaves that state unchanged at some steps.
    """

    def lifted(rate: LearningRate) -> LearningRate:
        def value(opt_state: Tree) -> Scalar:
            return rate.value(state_of(opt_state))

        follows = rate.follows_step and (follows_step or isinstance(rate.given, float | int))
        return rate._replace(value=value, follows_step=follows)

    return tuple(map(lifted, rates))


def inner_state_of(opt_state: Any) -> Tree:
    """Returns the field ``inner_state`` of a wrapper's state."""
    return opt_state.inner_state


def by_group(groups: Mapping[str, LearningRates], *, parallel: bool = True) -> LearningRates:
    """Returns the learning rates of several transformations, named by their groups if there is more than one.

    Args:
        groups: From names to the learning rates, already those of the outer state.
        parallel: Whether each parameter belongs to one group, so that groups with equal learning rates have only one.
    """
    groups = {name: rates for name, rates in groups.items() if rates}
    rates = tuple(rate for group in groups.values() for rate in group)
    if parallel and rates and all(rate.is_like(rates[0]) for rate in rates):
        return (rates[0]._replace(group=""),)
    if len(groups) <= 1:
        return rates
    return tuple(
        rate._replace(group=f"{name}/{rate.group}" if rate.group else name)
        for name, group in groups.items()
        for rate in group
    )
