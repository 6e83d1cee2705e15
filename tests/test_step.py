"""Steps: the checks of hand-written ones, and stopped states, which stay unchanged."""

import functools

import problem
import pytest
import torch
from problem import SMALL_BATCH, linear, squares

import fxtrain as fx
from fxtrain import testing, tree


class TestStep:
    def test_step_and_position_advance_by_one(self):
        @fx.Step
        def strange(state, batch):
            return state.replace(step=state.step - 7, position=state.position + 100), fx.StepOutput({"seen": batch})

        state = fx.init(linear())
        for expected in (1, 2):
            state, output = strange(state, torch.tensor(3.0))
            assert (int(state.step), int(state.position)) == (expected, expected)
        assert float(output.metrics["seen"]) == 3.0
        assert output.control == fx.Control()

    def test_wraps_any_callable_and_keeps_its_name(self):
        def twice(factor, state, batch):
            return state.replace(params=tree.map(lambda p: p * factor, state.params)), fx.StepOutput({})

        class Callable:
            def __call__(self, state, batch):
                return twice(2.0, state, batch)

        state = fx.init(torch.tensor(1.0))
        assert float(fx.Step(functools.partial(twice, 2.0))(state, None)[0].params) == 2.0
        assert repr(fx.Step(functools.partial(twice, 2.0))) == "<step twice, fires nothing>"
        assert float(fx.Step(Callable())(state, None)[0].params) == 2.0

        def doubled(state, batch):
            """Doubles."""
            return twice(2.0, state, batch)

        assert fx.Step(doubled).__doc__ == "Doubles."
        assert repr(fx.train_step(squares, fx.optim.sgd(0.1))) == (
            "<step train_step(squares), fires Microbatch, Gradients, Updated>"
        )

    def test_hand_written_steps_fold_traced_events(self):
        def count(state, event: fx.Gradients, memory):
            return memory + 1, fx.Control(stop=event.loss < 0, reason="below zero", log={"count": memory})

        counter = fx.stateful("counter", lambda state: torch.tensor(0), count)
        find, tx = fx.gradients(lambda model, batch: model(batch).mean()), fx.optim.sgd(10.0)

        def by_hand(state, batch):
            found = find(state, batch)
            event = fx.Gradients(step=state.step + 1, loss=found.loss, metrics=found.metrics, grads=found.grads)
            state, control = counter(state, event)
            state, _ = fx.step.apply_gradients(state, found.grads, tx)
            return state, fx.StepOutput(found.metrics, control)

        step = fx.Step(by_hand, callbacks=counter, fires=[fx.Gradients])
        result = fx.fit(fx.init(linear(), tx), step, [SMALL_BATCH], steps=9, callbacks=counter)
        assert result.reason == "below zero"
        assert int(result.state.slots["counter"]) == int(result.state.step) == 2

    @pytest.mark.parametrize(
        ("returned", "message"),
        [
            (
                lambda state: state,
                r"expected by_hand to return \(state, fxtrain\.StepOutput\(metrics\)\), got a TrainState\.",
            ),
            (lambda state: None, "by_hand to return .*, got None"),
            (lambda state: (state, {"loss": 1.0}), r"a tuple of \(a TrainState, a dict with keys 'loss'\)"),
            (lambda state: (fx.StepOutput({}), state), "a tuple of"),
        ],
    )
    def test_wrong_return_values_are_refused(self, returned, message):
        def by_hand(state, batch):
            return returned(state)

        with pytest.raises(TypeError, match=message):
            fx.Step(by_hand)(fx.init(linear()), None)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda s: {"params": {**s.params, "bias": s.params["bias"].double()}},
                r"got a float64 tensor of shape \[1\] at state\.params\['bias'\], which was a float32 tensor",
            ),
            (
                lambda s: {"params": {**s.params, "weight": s.params["weight"][:, :1]}},
                r"got .*\[1, 1\] at state\.params\['weight'\], which was .*\[1, 2\]",
            ),
            (
                lambda s: {"params": {"weight": s.params["weight"]}},
                r"by_hand to keep .*, got one without state\.params\['bias'\]",
            ),
            (
                lambda s: {"params": {"bias_": s.params["bias"], "weight": s.params["weight"]}},
                r"by_hand to keep .*, got one without state\.params\['bias'\]",
            ),
            (
                lambda s: {"slots": {"new": torch.tensor(0)}},
                r"by_hand to keep .*, got one with state\.slots\['new'\].* Keep new values in a slot of a callback",
            ),
            (lambda s: {"opt_state": []}, "by_hand to keep .* types of all containers in its state"),
            (lambda s: {"model": None}, "by_hand to keep the model"),
        ],
    )
    def test_changed_structure_shape_or_dtype_is_refused_by_path(self, change, message):
        def by_hand(state, batch):
            return state.replace(**change(state)), fx.StepOutput({})

        with pytest.raises(ValueError, match=message):
            fx.Step(by_hand)(fx.init(linear()), None)

    def test_in_place_write_to_the_state_is_refused_by_path(self):
        def by_hand(state, batch):
            state.params["weight"].add_(1.0)
            return state, fx.StepOutput({})

        with pytest.raises(RuntimeError, match=r"by_hand .* got an in-place write to state\.params\['weight'\]"):
            fx.Step(by_hand)(fx.init(linear()), None)

    def test_untraced_events_in_fires_are_refused(self):
        with pytest.raises(ValueError, match=r"fires to contain only Microbatch, Gradients, Updated, got StepEnd"):
            fx.Step(lambda state, batch: None, fires=[fx.StepEnd])


class TestStopped:
    """A stopped state is a fixed point of the step."""

    def test_keeps_every_leaf_bitwise_and_requests_nothing(self):
        def asks(state, event: fx.Updated, memory):
            return memory + 1, fx.Control(stop=event.step >= 2, reason="two", log={"count": memory})

        callback = fx.stateful("asks", lambda state: torch.tensor(0), asks)
        step = problem.step(accumulate=2, callbacks=callback)
        state, batches, controls = fx.attach(problem.start(), callback), problem.data(), []
        for index in range(5):
            before = state
            state, output = step(state, batches[index % 3])
            controls.append(output.control)
            if index >= 2:
                testing.assert_equal(state, before, f"call {index} of a stopped state")
        assert (int(state.step), int(state.slots["asks"]), bool(state.due.stop)) == (2, 2, True)
        assert [control.reasons("stop") for control in controls] == [[], ["two"], [], [], []]
        assert [bool(control.log["count"].when) for control in controls] == [True, True, False, False, False]

    def test_hand_written_step_keeps_a_stopped_state(self):
        step = fx.Step(lambda state, batch: (state.replace(params=state.params / 0.0), fx.StepOutput({})))
        state = fx.init(torch.tensor(1.0))
        state = state.replace(due=state.due._replace(stop=torch.tensor(True)))
        testing.assert_equal(step(state, None)[0], state, "a stopped state")
