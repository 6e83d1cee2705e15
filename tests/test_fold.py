"""The fold of callbacks: subscription by annotation, order, associativity, slots and rejected callbacks."""

from __future__ import annotations

import functools
from typing import Any, Union

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problem import adder, events, state_with

import fxtrain as fx
from fxtrain import StepEnd as Aliased
from fxtrain import testing, tree
from fxtrain.core import EVENTS, SESSION, TRACED, TRAJECTORY

EvalOrEpoch = fx.EvalEnd | fx.EpochEnd


def plain(state, event):
    return state, fx.Control()


def by_name(state, event: StepEnd):  # noqa: F821 - looked up among the events, as no such name is imported
    return state, fx.Control()


def dotted(state, event: fx.StepEnd | fxtrain.EvalEnd):  # noqa: F821
    return state, fx.Control()


def by_union(state, event: Union[fx.StepEnd, fx.Rewound]):  # noqa: UP007
    return state, fx.Control()


def by_alias(state, event: Aliased):
    return state, fx.Control()


def by_type_alias(state, event: EvalOrEpoch):
    return state, fx.Control()


def any_event(state, event: Any):
    return state, fx.Control()


def every_event(state, event: fx.Event):
    return state, fx.Control()


def with_option(state, event: fx.EvalEnd, scale=1.0):
    return state, fx.Control()


class Subscriber:
    def __call__(self, state, event: fx.EvalEnd):
        return state, fx.Control()

    def method(self, state, event: fx.EpochEnd):
        return state, fx.Control()


def wrapped(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)

    return inner


def hiding(function):
    def inner(*args, **kwargs):
        return function(*args, **kwargs)

    return inner


@pytest.mark.parametrize(
    ("callback", "events"),
    [
        (plain, TRAJECTORY),
        (any_event, TRAJECTORY),
        (lambda state, event: (state, fx.Control()), TRAJECTORY),
        (by_name, {fx.StepEnd}),
        (dotted, {fx.StepEnd, fx.EvalEnd}),
        (by_union, {fx.StepEnd, fx.Rewound}),
        (by_alias, {fx.StepEnd}),
        (by_type_alias, {fx.EvalEnd, fx.EpochEnd}),
        (every_event, EVENTS),
        (functools.partial(with_option, scale=2.0), {fx.EvalEnd}),
        (Subscriber(), {fx.EvalEnd}),
        (Subscriber().method, {fx.EpochEnd}),
        (wrapped(by_name), {fx.StepEnd}),
        (fx.on((fx.Saved, fx.StepEnd | fx.EvalEnd), plain), {fx.Saved, fx.StepEnd, fx.EvalEnd}),
        (fx.on(fx.Saved, hiding(plain)), {fx.Saved}),
    ],
)
def test_annotation_determines_subscribed_events(callback, events):
    assert set(fx.compose(callback).table) == set(events)


def test_evaluated_annotation_determines_subscribed_events():
    namespace = {"fx": fx}
    exec("def real(state, event: fx.StepEnd | fx.EvalEnd):\n    return state, fx.Control()", namespace)
    assert set(fx.compose(namespace["real"]).table) == {fx.StepEnd, fx.EvalEnd}


def misspelt(state, event: StepEnds):  # noqa: F821
    return state, fx.Control()


def no_event(state, event: int):
    return state, fx.Control()


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (
            misspelt,
            r"misspelt: expected an event type .*, got StepEnds\. Did you mean 'StepEnd'\? .* Microbatch, Gradients",
        ),
        (no_event, "no_event: expected an event type or a union of event types, got int"),
        (hiding(plain), r"inner: expected the parameters \(state, event\), got \(\*args, \*\*kwargs\)"),
        (lambda event: event, r"expected the parameters \(state, event\), got \(event\)"),
        (Subscriber, r"got the class Subscriber\. Make an instance: Subscriber\(\)\."),
        (3, r"expected functions \(state, event\) -> \(state, control\), got 3\."),
    ],
)
def test_callback_with_invalid_signature_is_rejected(callback, message):
    with pytest.raises(TypeError, match=message):
        fx.compose(callback)


class TestFold:
    def test_callback_receives_state_of_preceding_callback(self):
        first, second = adder("a", 1), adder("b", 10)
        state, _ = fx.compose(first, second)(state_with(first, second), events[0])
        assert int(state.slots["a"]) == 2 * (1 + 1) + 1
        assert int(state.slots["b"]) == 2 * (5 + 1) + 10

    @given(st.lists(st.integers(-3, 3), min_size=3, max_size=3))
    def test_composition_is_associative(self, amounts):
        callbacks = [adder(name, amount) for name, amount in zip("abc", amounts, strict=True)]
        testing.check_associativity(*callbacks, fx.init(torch.nn.Linear(1, 1)), events)

    def test_stop_request_does_not_skip_later_callbacks(self):
        seen = []

        def stop(state, event: fx.StepEnd):
            seen.append("stop")
            return state, fx.Control(stop=True, reason="first")

        def later(state, event: fx.StepEnd):
            seen.append("later")
            return state, fx.Control(save=True)

        _, control = fx.compose(stop, later)(state_with(), events[0])
        assert seen == ["stop", "later"]
        assert control.reasons("stop") == ["first"]
        assert control.reasons("save") == ["requested by later"]

    def test_unsubscribed_event_returns_the_same_state_object(self):
        state = state_with()
        assert fx.compose(by_name)(state, fx.EpochEnd(step=1))[0] is state
        assert fx.compose()(state, events[0]) == (state, fx.Control())

    def test_repr_shows_table_of_subscriptions(self):
        best = fx.callbacks.restore_best("loss")
        assert repr(fx.compose(best, fx.callbacks.save(every=3))) == (
            "2 callbacks\n"
            "  StepEnd  save when every(3)\n"
            "  EvalEnd  restore_best\n"
            "  FitEnd   restore_best\n"
            "  slots: 'restore_best'"
        )

    def test_duplicate_slot_name_is_rejected(self):
        with pytest.raises(ValueError, match="expected one callback for the slot 'a', got a and a"):
            fx.compose(adder("a", 1), adder("a", 2))

    @pytest.mark.parametrize(
        ("returned", "came"),
        [(None, "None"), (1, "1"), ((1, 2, 3), r"a tuple of \(1, 2, 3\)"), ("state", "'state'")],
    )
    def test_callback_must_return_state_and_control(self, returned, came):
        def wrong(state, event: fx.StepEnd):
            return returned

        with pytest.raises(TypeError, match=rf"wrong: expected it to return \(state, control\) at StepEnd, got {came}"):
            fx.compose(wrong)(state_with(), events[0])

    @pytest.mark.parametrize(
        ("event", "control", "where"),
        [
            (fx.StepEnd(step=1, metrics={}), fx.Control(skip_batch=True), "Request it at StepBegin"),
            (fx.StepEnd(step=1, metrics={}), fx.Control(skip_update=True), "Request it at Microbatch, Gradients"),
            (fx.EvalEnd(step=1, metrics={}), fx.Control(evaluate=True), "Request it at EpochBegin, StepBegin, StepEnd"),
            (fx.FitEnd(step=1, reason=""), fx.Control(save=True), "Request it at EpochBegin"),
        ],
    )
    def test_request_impossible_at_event_is_rejected(self, event, control, where):
        def asks(state, _):
            return state, control

        with pytest.raises(ValueError, match=rf"asks: expected requests that are possible at \w+, got \w+\. {where}"):
            fx.compose(fx.on(type(event), asks))(state_with(), event)

    def test_session_events_change_only_the_final_state(self):
        def changes(state, _):
            return state.replace(params={}), fx.Control()

        with pytest.raises(ValueError, match=r"changes changed state\.params at FitBegin"):
            fx.compose(fx.on(fx.FitBegin, changes))(state_with(), fx.FitBegin(step=0))

        def zeroes(state, _):
            return state.replace(params=tree.zeros_like(state.params)), fx.Control()

        harvest, _ = fx.compose(fx.on(fx.FitEnd, zeroes))(state_with(), fx.FitEnd(step=0, reason=""))
        assert not any(leaf.any() for leaf in tree.leaves(harvest.params))

    def test_traced_events_change_only_slots(self):
        def changes(state, _):
            return state.replace(params={}), fx.Control()

        event = fx.Gradients(step=torch.tensor(1), loss=torch.tensor(0.0), metrics={}, grads={})
        with pytest.raises(ValueError, match=r"changed state\.params at Gradients: expected writes to slots only"):
            fx.compose(fx.on(fx.Gradients, changes))(state_with(), event)


class TestSlots:
    def test_attach_initializes_missing_slots_and_keeps_others(self):
        state = state_with(adder("a", 1)).with_slot("a", torch.tensor(5)).with_slot("old", torch.tensor(9))
        state = fx.attach(state, [adder("a", 1), adder("b", 1)])
        assert {name: int(memory) for name, memory in state.slots.items()} == {"a": 5, "old": 9, "b": 1}

    def test_attached_slot_shares_no_memory_with_parameters(self):
        average = fx.stateful("ema", lambda state: state.params, lambda state, event, memory: (memory, fx.Control()))
        state = fx.attach(fx.init(torch.nn.Linear(2, 2)), average)
        assert state.slots["ema"]["weight"].data_ptr() != state.params["weight"].data_ptr()

    def test_initial_content_that_is_no_tensor_is_named(self):
        count = fx.stateful("n", lambda state: {"seen": 0}, lambda state, event, content: (content, fx.Control()))
        remedy = r"expected state\.slots\['n'\]\['seen'\] to be a tensor, got 0\. Use torch\.tensor\(0\)\."
        with pytest.raises(TypeError, match=remedy):
            fx.attach(fx.init(torch.nn.Linear(1, 1)), count)

    def test_error_for_missing_slot_suggests_attach(self):
        with pytest.raises(KeyError, match=r"expected the state to have the slot 'a', got none\. Call fxtrain\.attach"):
            fx.compose(adder("a", 1))(fx.init(torch.nn.Linear(1, 1)), events[0])

    def test_update_may_be_subscribed_with_on(self):
        def count(state, event, memory):
            return memory + 1, fx.Control()

        counter = fx.stateful("n", lambda state: torch.tensor(0), fx.on(fx.StepEnd, count))
        assert set(fx.compose(counter).table) == {fx.StepEnd}
        assert int(fx.compose(counter)(state_with(counter), events[0])[0].slots["n"]) == 1

    def test_functions_with_and_without_content_are_not_confused(self):
        def managed(state, event: fx.StepEnd):
            return state, fx.Control()

        def given_content(state, event: fx.StepEnd, content):
            return content, fx.Control()

        def init(state):
            return torch.tensor(0)

        with pytest.raises(TypeError, match=r"use fxtrain\.stateful") as mistaken:
            fx.slotted("best", init, given_content)
        assert str(mistaken.value).startswith(
            "expected the callback of slot 'best' to take (state, event), got given_content, which requires a third"
        )
        for update in (managed, fx.on(fx.StepEnd, managed)):
            with pytest.raises(TypeError, match=r"to take \(state, event, content\), got managed.*fxtrain\.slotted"):
                fx.stateful("best", init, update)

    def test_empty_slot_name_is_rejected(self):
        with pytest.raises(ValueError, match="non-empty string"):
            fx.stateful("", lambda state: torch.tensor(0), lambda state, event, memory: (memory, fx.Control()))


class TestCallbacksByName:
    callbacks = fx.compose(by_name, fx.callbacks.save(every=3), adder("a", 1), plain)

    def test_name_selects_callback(self):
        assert self.callbacks["a"].slot == "a"
        assert "a" in self.callbacks
        assert plain in self.callbacks
        assert "b" not in self.callbacks
        assert any_event not in self.callbacks
        assert [each.name for each in self.callbacks] == ["by_name", "save when every(3)", "a", "plain"]
        assert len(self.callbacks) == 4

    def test_without_leaves_out_callbacks_by_name_or_by_themselves(self):
        assert [each.name for each in self.callbacks.without("a", by_name)] == ["save when every(3)", "plain"]
        assert not self.callbacks.without("a").slots
        assert len(self.callbacks) == 4
        assert len(self.callbacks.without(*self.callbacks)) == 0

    def test_replace_keeps_the_place(self):
        replaced = self.callbacks.replace("save when every(3)", fx.compose(adder("b", 1), adder("c", 1)))
        assert [each.name for each in replaced] == ["by_name", "b", "c", "a", "plain"]
        assert list(replaced.slots) == ["b", "c", "a"]

    def test_unknown_name_is_refused_with_the_nearest(self):
        for call in (
            self.callbacks.without,
            self.callbacks.__getitem__,
            lambda name: self.callbacks.replace(name, plain),
        ):
            with pytest.raises(
                KeyError, match=r"expected one of the callbacks 'by_name', .*, got 'plan'\. Did you mean 'pl"
            ):
                call("plan")
        with pytest.raises(KeyError, match="got any_event"):
            self.callbacks.without(any_event)
        with pytest.raises(KeyError, match=r"expected one of the callbacks \(none\), got 3"):
            fx.compose()[3]

    def test_name_of_several_callbacks_is_refused_with_their_positions(self):
        twice = fx.compose(by_name, plain, by_name)
        with pytest.raises(ValueError, match=r"got 'by_name', which is that of 2\. Compose .* has these at 0, 2"):
            twice.without("by_name")


def test_unannotated_callback_skips_traced_and_session_events():
    assert not set(fx.compose(plain).table) & {*TRACED, *SESSION}


def test_check_laws_detects_impure_callbacks():
    hidden = []

    def impure(state, event: fx.StepEnd, memory):
        hidden.append(1)
        return memory + len(hidden), fx.Control()

    def in_place(state, event: fx.StepEnd, memory):
        return memory.add_(1), fx.Control()

    def unbatchable(state, event: fx.StepEnd, memory):
        return memory + (1 if event.metrics["loss"] > 1.5 else 0), fx.Control()

    init = lambda state: torch.tensor(0)  # noqa: E731
    start = fx.init(torch.nn.Linear(1, 1))
    with pytest.raises(AssertionError, match="purity: two calls with the same StepEnd returned different results"):
        testing.check_laws(fx.stateful("s", init, impure), start, events)
    with pytest.raises(AssertionError, match="purity: the input state was modified at StepEnd"):
        testing.check_purity(fx.stateful("s", init, in_place), state_with(fx.stateful("s", init, in_place)), events)
    with pytest.raises(RuntimeError, match="vmap"):
        testing.check_laws(fx.stateful("s", init, unbatchable), start, events)


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5])
def test_purity_finds_a_memory_outside_the_state(limit):
    seen = []

    def stop_after(state, event: fx.StepEnd):
        seen.append(event.step)
        return state, fx.Control(stop=len(seen) > limit)

    events = [fx.StepEnd(step=step, metrics={"loss": torch.tensor(1.0)}) for step in (1, 2, 3)]
    with pytest.raises(AssertionError, match=r"purity: two (calls|runs) .* returned different results"):
        testing.check_purity(stop_after, fx.init(torch.nn.Linear(1, 1)), events)
