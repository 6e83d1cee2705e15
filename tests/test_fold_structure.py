"""Callbacks that change the structure of the state are rejected with the path of the changed leaf."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest
import torch
from problem import adder, events, state_with

import fxtrain as fx
from fxtrain import tree


class Count(NamedTuple):
    n: torch.Tensor
    rest: Any


def kept(content, update):
    """A callback whose slot starts as ``content`` and becomes ``update(content)``."""
    return fx.stateful("kept", lambda state: content, fx.on(fx.StepEnd, lambda state, event, old: (update(old), ASKED)))


ASKED = fx.Control()
ONE = Count(torch.tensor(0), {"a": torch.zeros(2), "b": [torch.zeros(3)]})
STRUCTURES = {
    "dtype": (
        lambda old: old._replace(n=old.n.float()),
        r".n at StepEnd: .*an int64 tensor .*\[\].*got a float32 tensor .*\[\]",
    ),
    "shape": (
        lambda old: old._replace(rest={**old.rest, "a": torch.zeros(2, 1)}),
        r".rest['a'] at StepEnd: .*float32 tensor of shape \[2\].*got a float32 tensor of shape \[2, 1\]",
    ),
    "device": (lambda old: old._replace(n=old.n.to("meta")), r".n at StepEnd: .*on cpu, got .*on meta"),
    "one leaf more": (
        lambda old: old._replace(rest={**old.rest, "c": old.n}),
        r".rest['c'] at StepEnd: expected no leaf, got an int64 tensor",
    ),
    "one leaf less": (
        lambda old: old._replace(rest={"a": old.rest["a"]}),
        r".rest['b'][0] at StepEnd: expected a float32 tensor .*got no leaf",
    ),
    "another container": (
        lambda old: old._replace(rest={**old.rest, "b": tuple(old.rest["b"])}),
        r" at StepEnd: expected .*, got .*keep the types of all containers",
    ),
    "a leaf alone": (lambda old: old.n, r".n at StepEnd: .*got no leaf"),
}


class TestStructure:
    """Slots and all other fields keep the structure into which a resume restores."""

    @pytest.mark.parametrize("change", STRUCTURES)
    def test_changed_slot_structure_is_rejected_at_event(self, change):
        update, message = STRUCTURES[change]
        callback = kept(ONE, update)
        where = re.escape("kept changed state.slots['kept']" + message.split(" at StepEnd")[0])
        with pytest.raises(ValueError, match=where + " at StepEnd" + message.split(" at StepEnd")[1]):
            fx.compose(callback)(state_with(callback), events[0])

    def test_update_returning_the_state_is_rejected(self):
        def count(state, event: fx.StepEnd, memory):
            return state.with_slot("n", memory + 1), fx.Control()

        counter = fx.stateful("n", lambda state: torch.tensor(0), count)
        with pytest.raises(
            ValueError, match=r"n changed state\.slots\['n'\] at StepEnd: expected an int64 tensor .* TrainState"
        ):
            fx.compose(counter)(state_with(counter), events[0])

    @pytest.mark.parametrize("returned", [None, torch.tensor(1), (torch.tensor(1),), (torch.tensor(1), None)])
    def test_update_must_return_slot_and_control(self, returned):
        counter = fx.stateful("n", lambda state: torch.tensor(0), fx.on(fx.StepEnd, lambda *_: returned))
        with pytest.raises(
            TypeError, match=r"n: expected its update to return \(content of the slot, control\) at StepEnd"
        ):
            fx.compose(counter)(state_with(counter), events[0])

    @pytest.mark.parametrize("field", ["params", "buffers", "opt_state", "step", "position", "seed"])
    def test_changed_leaf_of_other_field_is_rejected(self, field):
        def halve(state, event: fx.StepEnd):
            changed = tree.map(lambda leaf: leaf[None], getattr(state, field))
            return state.replace(**{field: changed}), fx.Control()

        tx = fx.optim.adam(0.1)
        state = fx.init(torch.nn.BatchNorm1d(2), tx)
        with pytest.raises(
            ValueError, match=rf"halve changed state\.{field}.* at StepEnd: expected an? .* of shape \[\d?\]"
        ):
            fx.compose(halve)(state, events[0])

    def test_slot_added_or_removed_by_callback_is_rejected(self):
        def adds(state, event: fx.StepEnd):
            return state.with_slot("mine", torch.tensor(0)), fx.Control()

        def removes(state, event: fx.StepEnd):
            return state.replace(slots={}), fx.Control()

        with pytest.raises(ValueError, match=r"adds added state\.slots\['mine'\] at StepEnd: .*fxtrain\.stateful"):
            fx.compose(adds)(state_with(), events[0])
        with pytest.raises(ValueError, match=r"removes removed state\.slots\['a'\] at StepEnd"):
            fx.compose(removes)(state_with(adder("a", 1)), events[0])

    def test_changed_model_is_rejected(self):
        tx = fx.optim.sgd(0.1)

        def narrows(state, event: fx.EpochEnd):
            return fx.with_trainable(state, tx, "bias"), fx.Control()

        with pytest.raises(ValueError, match=r"narrows changed state\.model at EpochEnd.*fxtrain\.optim\.unfreeze"):
            fx.compose(narrows)(fx.init(torch.nn.Linear(1, 1), tx), fx.EpochEnd(step=1))

    def test_changed_structure_at_fit_end_is_rejected(self):
        def drops(state, event: fx.FitEnd):
            return state.replace(params={}), fx.Control()

        with pytest.raises(ValueError, match=r"drops changed state\.params\['bias'\] at FitEnd"):
            fx.compose(drops)(state_with(), fx.FitEnd(step=0, reason=""))

    def test_error_names_the_traced_callback(self):
        def grows(state, event: fx.Updated, memory):
            return torch.cat([memory, event.loss[None]]), fx.Control()

        callback = fx.stateful("losses", lambda state: torch.zeros(0), grows)
        tx = fx.optim.sgd(0.1)
        step = fx.train_step(lambda model, batch: model(batch).sum(), tx, callbacks=callback)
        state = fx.attach(fx.init(torch.nn.Linear(1, 1), tx), callback)
        with pytest.raises(ValueError, match=r"losses changed state\.slots\['losses'\] at Updated: .*\[0\].*\[1\]"):
            step(state, torch.ones(1, 1))
        with pytest.raises(ValueError, match=r"losses changed state\.slots\['losses'\] at Updated: .*\[0\].*\[1\]"):
            fx.compile(step)(state, torch.ones(1, 1))

    def test_changed_slot_behind_traced_trigger_is_rejected(self):
        def grows(state, event: fx.Updated, memory):
            return (memory, memory), fx.Control()

        callback = fx.when(fx.every(2), fx.stateful("n", lambda state: torch.tensor(0), grows))
        tx = fx.optim.sgd(0.1)
        step = fx.train_step(lambda model, batch: model(batch).sum(), tx, callbacks=callback)
        with pytest.raises(ValueError, match=r"n changed state\.slots\['n'\]"):
            step(fx.attach(fx.init(torch.nn.Linear(1, 1), tx), callback), torch.ones(1, 1))

    def test_update_with_unchanged_structure_passes(self):
        def update(old):
            return Count(old.n + 1, {"b": [old.rest["b"][0] + 1], "a": old.rest["a"] * 2})

        callback = kept(ONE, update)
        state, _ = fx.compose(callback)(state_with(callback), events[0])
        assert int(state.slots["kept"].n) == 1
