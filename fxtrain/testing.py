"""Checks of the laws of callbacks, for built-in and custom ones.

Each check raises an ``AssertionError`` that names the broken law, the event and the leaf.
"""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.checkpoint import restore, save
from fxtrain.core import KINDS, Callback, Control, Event, TrainState, Tree, same_bits
from fxtrain.fold import attach, compose

__all__ = [
    "assert_equal",
    "check_associativity",
    "check_identity",
    "check_laws",
    "check_monotone",
    "check_purity",
    "check_resume",
    "check_vmap",
    "run",
]


def check_laws(callback: Callback, state: TrainState, events: Sequence[Event]) -> None:
    """Checks all laws of a single callback: purity, identity, monotone control, resume and vmap.

    Args:
        callback: The callback, composed or not.
        state: The initial state. Missing slots of the callback are added.
        events: The events to fold over, in order.

    Raises:
        AssertionError: If a law does not hold.

    Example:
        >>> import torch, fxtrain as fx
        >>> events = [fx.EvalEnd(step=i, metrics={"loss": torch.tensor(1.0 / i)}) for i in range(1, 5)]
        >>> check_laws(fx.callbacks.early_stopping("loss", patience=2), fx.init(torch.nn.Linear(1, 1)), events)
    """
    state = attach(state, callback)
    check_purity(callback, state, events)  # first, because an impure callback breaks the other laws too
    check_identity(callback, state, events)
    check_monotone(callback, state, events)
    check_resume(callback, state, events)
    check_vmap(callback, state, events)


def check_identity(callback: Callback, state: TrainState, events: Sequence[Event]) -> None:
    """Checks that ``compose(compose(), cb)`` and ``compose(cb, compose())`` are equivalent to ``compose(cb)``.

    Args:
        callback: The callback.
        state: The initial state, with the callback's slots.
        events: The events to fold over, in order.

    Example:
        >>> import torch, fxtrain as fx
        >>> callback = fx.compose(fx.callbacks.stop_at("loss", 0.3))
        >>> state = fx.attach(fx.init(torch.nn.Linear(1, 1)), callback)
        >>> events = [fx.EvalEnd(step=i, metrics={"loss": torch.tensor(1.0 / i)}) for i in range(1, 5)]
        >>> check_identity(callback, state, events)
    """
    expected = run(compose(callback), state, events)
    for name, composed in {
        "compose(compose(), callback)": compose(compose(), callback),
        "compose(callback, compose())": compose(callback, compose()),
    }.items():
        assert_equal(run(composed, state, events), expected, f"identity: {name}")


def check_associativity(
    first: Callback, second: Callback, third: Callback, state: TrainState, events: Sequence[Event]
) -> None:
    """Checks that the nesting of callbacks does not matter, only their order.

    Args:
        first: A callback.
        second: The callback after it.
        third: The last callback.
        state: The initial state. Missing slots of the callbacks are added.
        events: The events to fold over, in order.

    Example:
        >>> import torch, fxtrain as fx
        >>> first, second, third = fx.callbacks.stop_at("loss", 0.3), fx.callbacks.nan_guard(), fx.callbacks.save()
        >>> state = fx.attach(fx.init(torch.nn.Linear(1, 1)), [first, second, third])
        >>> check_associativity(first, second, third, state, [fx.EvalEnd(step=1, metrics={"loss": torch.tensor(0.1)})])
    """
    state = attach(state, compose(first, second, third))
    left = run(compose(compose(first, second), third), state, events)
    right = run(compose(first, compose(second, third)), state, events)
    assert_equal(left, right, "associativity")


def check_purity(callback: Callback, state: TrainState, events: Sequence[Event]) -> None:
    """Checks that equal inputs give equal outputs, and that inputs are not modified.

    Args:
        callback: The callback.
        state: The initial state, with the callback's slots.
        events: The events to fold over, in order.

    Example:
        >>> import torch, fxtrain as fx
        >>> callback = fx.compose(fx.callbacks.stop_at("loss", 0.3))
        >>> state = fx.attach(fx.init(torch.nn.Linear(1, 1)), callback)
        >>> events = [fx.EvalEnd(step=i, metrics={"loss": torch.tensor(1.0 / i)}) for i in range(1, 5)]
        >>> check_purity(callback, state, events)
    """
    composed, start, firsts = compose(callback), state, list[tuple[TrainState, Control]]()
    for event in events:
        before, seen = state.copy(), tree.clone(_tensors(event))
        first = composed(state, event)
        second = composed(state, event)
        assert_equal(state, before, f"purity: the input state was modified at {_name(event)}")
        assert_equal(_tensors(event), seen, f"purity: the event {_name(event)} was modified")
        differ = f"returned different results, with {first[1]} and {second[1]}"
        assert_equal(first, second, f"purity: two calls with the same {_name(event)} {differ}")
        firsts.append(first)
        state = first[0]
    # Again from the beginning, because a memory outside the state may change the results of later events only.
    state = start
    for event, first in zip(events, firsts, strict=True):
        second = composed(state, event)
        differ = f"returned different results, with {first[1]} and {second[1]}"
        assert_equal(first, second, f"purity: two runs of the same events until {_name(event)} {differ}")
        state = second[0]


def check_monotone(callback: Callback, state: TrainState, events: Sequence[Event]) -> None:
    """Checks that the callback does not clear the requests of another callback.

    Args:
        callback: The callback.
        state: The initial state, with the callback's slots.
        events: The events to fold over, in order.

    Example:
        >>> import torch, fxtrain as fx
        >>> callback = fx.compose(fx.callbacks.stop_at("loss", 0.3))
        >>> state = fx.attach(fx.init(torch.nn.Linear(1, 1)), callback)
        >>> events = [fx.EvalEnd(step=i, metrics={"loss": torch.tensor(1.0 / i)}) for i in range(1, 5)]
        >>> check_monotone(callback, state, events)
    """

    earlier = Control(stop=True, reason="requested before")
    composed = compose(callback)
    for event in events:
        state, control = composed(state, event)
        joined = earlier | control
        for kind in KINDS:
            lost = set(control.reasons(kind)) - set(joined.reasons(kind))
            assert not lost, f"monotone control: {kind} requests were lost at {_name(event)}, with the reasons {lost}"
        assert "requested before" in joined.reasons("stop"), f"monotone control: a stop was lost at {_name(event)}"


def check_resume(callback: Callback, state: TrainState, events: Sequence[Event]) -> None:
    """Checks that saving and restoring between any two events leaves the result bitwise equal.

    Args:
        callback: The callback.
        state: The initial state, with the callback's slots.
        events: The events to fold over, in order.

    Example:
        >>> import torch, fxtrain as fx
        >>> callback = fx.compose(fx.callbacks.stop_at("loss", 0.3))
        >>> state = fx.attach(fx.init(torch.nn.Linear(1, 1)), callback)
        >>> events = [fx.EvalEnd(step=i, metrics={"loss": torch.tensor(1.0 / i)}) for i in range(1, 5)]
        >>> check_resume(callback, state, events)
    """
    composed = compose(callback)
    whole, controls = run(composed, state, events)
    with tempfile.TemporaryDirectory() as folder:
        for cut in range(len(events) + 1):
            before, _ = run(composed, state, events[:cut])
            path = save(pathlib.Path(folder) / str(cut), before)
            after, rest = run(composed, restore(path, like=state), events[cut:])
            assert_equal((after, rest), (whole, controls[cut:]), f"resume: cut after {cut} events")


def check_vmap(callback: Callback, state: TrainState, events: Sequence[Event]) -> None:
    """Checks that three runs under ``vmap`` give the same results as one by one.

    Args:
        callback: The callback.
        state: The initial state, with the callback's slots.
        events: The events to fold over, in order. Each run sees other values of their floating-point tensors.

    Example:
        >>> import torch, fxtrain as fx
        >>> callback = fx.callbacks.early_stopping("loss", patience=2)
        >>> state = fx.attach(fx.init(torch.nn.Linear(1, 1)), callback)
        >>> events = [fx.EvalEnd(step=i, metrics={"loss": torch.tensor(1.0 / i)}) for i in range(1, 5)]
        >>> check_vmap(callback, state, events)
    """
    composed = compose(callback)
    # Members see the same events with different values, so that their states diverge.
    members = [[_scaled(event, 1.0 + member) for event in events] for member in range(3)]
    alone = [run(composed, state, own) for own in members]
    batched = tree.map(lambda leaf: torch.stack([leaf] * 3), state)
    for time, event in enumerate(events):

        def one(state: TrainState, fields: dict[str, Tree], event: Event = event) -> tuple[TrainState, Control]:
            after, control = composed(state, dataclasses.replace(event, **fields))
            return after, tree.map(torch.as_tensor, control)

        fields = tree.map(lambda *leaves: torch.stack(leaves), *[_tensors(own[time]) for own in members])
        batched, controls = torch.vmap(one)(batched, fields)
        for index, (_, expected) in enumerate(alone):
            got = tree.map(lambda leaf, index=index: leaf[index], controls)
            for kind in KINDS:
                assert got.reasons(kind) == expected[time].reasons(kind), (
                    f"vmap: expected member {index} to request {kind} for the reasons {expected[time].reasons(kind)} "
                    f"at {_name(event)}, got {got.reasons(kind)}"
                )
    for index, (expected, _) in enumerate(alone):
        own = tree.map(lambda leaf, index=index: leaf[index], batched)
        assert_equal(own, expected, f"vmap: member {index}")


def run(callback: Callback, state: TrainState, events: Sequence[Event]) -> tuple[TrainState, list[Control]]:
    """Folds a callback over events. Returns the final state and the control at each event.

    Args:
        callback: The callback, composed or not.
        state: The initial state, with the callback's slots.
        events: The events, in order.

    Example:
        >>> import torch, fxtrain as fx
        >>> callback = fx.compose(lambda state, event: (state, fx.Control(log={"twice": 2 * event.step})))
        >>> _, controls = run(callback, fx.init(torch.nn.Linear(1, 1)), [fx.EpochEnd(step=3), fx.EpochEnd(step=6)])
        >>> [control.log["twice"].value for control in controls]
        [6, 12]
    """
    controls: list[Control] = []
    for event in events:
        state, control = callback(state, event)
        controls.append(control)
    return state, controls


def assert_equal(got: Tree, expected: Tree, what: str) -> None:
    """Checks that two trees are bitwise equal. 0.0 differs from -0.0, and NaN equals NaN.

    Args:
        got: The actual tree.
        expected: The expected tree.
        what: The prefix of the error message.

    Raises:
        AssertionError: The message names the first leaf that differs.

    Example:
        >>> import torch
        >>> assert_equal({"a": torch.tensor(0.0)}, {"a": torch.tensor(-0.0)}, "the run")
        Traceback (most recent call last):
        ...
        AssertionError: the run: expected got['a'] to be -0.0, got 0.0
    """
    got_paths, expected_paths = tree.paths(got, "got"), tree.paths(expected, "got")
    assert got_paths == expected_paths, (
        f"{what}: expected the same leaves, got differences in "
        f"{sorted(set(got_paths) ^ set(expected_paths))[:5] or 'their order'}"
    )
    for path, a, b in zip(got_paths, tree.leaves(got), tree.leaves(expected), strict=True):
        same = _are_same_bits(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        if not same:
            raise AssertionError(f"{what}: expected {path} to be {b}, got {a}")


def _are_same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(same_bits(a, b).all())


def _tensors(event: Event) -> dict[str, Tree]:
    """Returns the fields of an event that hold tensors."""
    fields = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
    return {
        name: dict(value) if hasattr(value, "items") else value
        for name, value in fields.items()
        if (leaves := tree.leaves(value)) and all(isinstance(leaf, Tensor) for leaf in leaves)
    }


def _scaled(event: Event, factor: float) -> Event:
    return dataclasses.replace(
        event,
        **tree.map(lambda leaf: leaf * factor if leaf.is_floating_point() else leaf, _tensors(event)),
    )


def _name(event: Event) -> str:
    return type(event).__name__
