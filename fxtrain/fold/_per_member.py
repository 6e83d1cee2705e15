"""Callbacks of a batch of runs that have a setting for each member, or see all members."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from fxtrain.core import TRACED, Callback, Control, Event, TrainState, Tree, describe, name_of
from fxtrain.fold._compose import Composed
from fxtrain.fold._handler import Handler, OfMembers, handler_of


class Across(OfMembers):
    """A callback that sees all members: ``(stacked state, event) -> (stacked state, control)``."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def over(self, handler: Handler, wrap: Callable[[Handler], Callback]) -> Across:
        return Across(wrap(dataclasses.replace(handler, function=self.function)))

    def __call__(self, state: TrainState, event: Event) -> tuple[TrainState, Control]:
        return self.function(state, event)


class Each(OfMembers):
    """One callback for each member, which differ in their settings."""

    def __init__(self, name: str, handlers: Sequence[Handler]) -> None:
        self.name, self.handlers = name, tuple(handlers)

    def __call__(self, state: TrainState, event: Event) -> tuple[TrainState, Control]:
        self.refuse_one_run(state)
        return state, Control()

    def over(self, handler: Handler, wrap: Callable[[Handler], Callback]) -> Each:
        return Each(self.name, [dataclasses.replace(each, function=wrap(each)) for each in self.handlers])

    def refuse_one_run(self, state: TrainState) -> None:
        """Raises ValueError, because the settings are those of several runs."""
        raise ValueError(
            f"expected the state of {len(self.handlers)} runs for {self.name}, whose settings have a value for each, "
            "got that of one run. Give fit the stacked states, or one value for each setting."
        )

    def check_count(self, count: int) -> None:
        """Raises ValueError unless the settings are those of ``count`` members."""
        if len(self.handlers) != count:
            raise ValueError(
                f"expected one value of each setting of {self.name} for each of {count} members, got "
                f"{len(self.handlers)}. Give tensors of shape [{count}]."
            )


def with_tensors(factory: Callable[..., Handler], args: Sequence[object], settings: Mapping[str, object]) -> Handler:
    """Makes a callback from settings with tensors: of shape [], or with a value for each member."""
    own = [_plain(value) for value in args], {name: _plain(value) for name, value in settings.items()}
    if any(isinstance(value, Tensor) for value in (*own[0], *own[1].values())):
        return per_member_settings(factory, *own)
    return factory(*own[0], **own[1])


def per_member_settings(factory: Callable[..., Any], args: Sequence[object], settings: Mapping[str, object]) -> Handler:
    """Returns the callback of ``fxtrain.ensemble.each``."""
    name = name_of(factory)
    given = {**{f"argument {index}": value for index, value in enumerate(args)}, **settings}
    counts = {key: len(cast("Sequence[object]", value)) for key, value in given.items() if _differs(value)}
    if not counts:
        raise ValueError(
            f"expected a setting of {name} with a value for each member, got none. Give a tensor [members]."
        )
    if len(set(counts.values())) > 1:
        (one, first), (other, second) = list(counts.items())[:2]
        raise ValueError(
            f"expected as many values of each setting of {name}, got {first} of {one} and {second} of {other}. Give "
            "one for each member."
        )
    count = next(iter(counts.values()))
    if count == 0:
        raise ValueError(f"expected one or more values of {next(iter(counts))} for {name}, got none.")
    made: list[Handler] = []
    for index in range(count):
        own = {key: _own(value, index) for key, value in settings.items()}
        callback = factory(*(_own(value, index) for value in args), **own)
        if isinstance(callback, Composed):
            raise TypeError(f"expected {name} to make one callback, got {len(callback)}. Give each to ensemble.each.")
        made.append(handler_of(callback))
    first = made[0]
    for handler in made:
        traced = next((kind for kind in TRACED if kind in handler.events), None)
        if traced is not None:
            raise ValueError(
                f"expected one value of {next(iter(counts))} for {name}, which runs at {traced.__name__} inside the "
                f"compiled step, one graph for all members, got {count}. Give a Python scalar."
            )
        if (handler.events, handler.slot) != (first.events, first.slot):
            raise ValueError(
                f"expected callbacks of {name} with the same events and slot, got {first!r} and {handler!r}. Vary "
                "settings that change neither."
            )
    return _of_each(first, made)


def select_settings(handler: Handler, indices_of: Callable[[int], Sequence[int]]) -> Handler:
    """Returns the callback of some members. One that is the same for all members is returned as it is.

    Args:
        handler: The callback.
        indices_of: Maps the number of members to the indices of the selected ones.
    """
    if not isinstance(handler.function, Each):
        return handler
    each = handler.function.handlers
    return _of_each(handler, [each[index] for index in indices_of(len(each))])


def _of_each(like: Handler, each: Sequence[Handler]) -> Handler:
    first, function = each[0], Each(each[0].name, each)
    init = None if first.init is None else _Inits(first.init, [handler.init for handler in each])
    needs = dataclasses.replace(like.needs, checks=(function.refuse_one_run,))
    return dataclasses.replace(like, function=function, init=init, needs=needs)


class _Inits:
    """The initial content of the slot. A batch of runs takes that of each member from ``each``."""

    def __init__(self, first: Callable[[TrainState], Tree], each: Sequence[Any]) -> None:
        self.first, self.each = first, each

    def __call__(self, state: TrainState) -> Tree:
        return self.first(state)


def _differs(value: object) -> bool:
    if isinstance(value, Tensor):
        if value.ndim > 1:
            raise ValueError(f"expected a setting of shape [] or [members], got {describe(value)}.")
        return value.ndim == 1
    return isinstance(value, list | tuple)


def _own(value: Any, index: int) -> object:
    return _plain(value[index]) if _differs(value) else _plain(value)


def _plain(value: object) -> object:
    return value.item() if isinstance(value, Tensor) and value.ndim == 0 else value
