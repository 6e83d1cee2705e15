"""A callback sees each of its events once, whether it was given to the step, to ``fit`` or to both."""

import contextlib

import problem
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fxtrain as fx
from fxtrain import testing

UNCOMPILED, COMPILED, TWO_PER_CALL, WRAPPED = (
    lambda step: step,
    lambda step: fx.compile(step, backend="eager"),
    lambda step: problem.Together(step, 2),
    lambda step: fx.wrap_step(step, contextlib.nullcontext),
)
KINDS = pytest.mark.parametrize(
    "make", [UNCOMPILED, TWO_PER_CALL, WRAPPED], ids=["uncompiled", "two per call", "wrapped"]
)


TX = fx.optim.sgd(0.1)


def small_step(**options):
    return fx.train_step(problem.squares, TX, **options)


def small_start():
    return fx.init(problem.linear(), TX)


def small_data():
    return [problem.SMALL_BATCH * scale for scale in (0.5, 1.0, 2.0)]


def seen_at(*kinds):
    """Returns a callback without a slot that requests to log its event, and the list of events that it saw."""
    seen = []

    def see(state, event):
        seen.append(type(event))
        return state, fx.Control()

    return fx.on(kinds, see), seen


def counter(name="counter", amount=1):
    """Returns a callback on a traced event and on an event of the loop, which do not commute with other counters."""

    def count(state, event: fx.Updated | fx.StepEnd, content):
        others = sum(state.slots[slot] for slot in sorted(state.slots) if slot.startswith("counter"))
        return (2 * others + amount) % 97, fx.Control()

    return fx.stateful(name, lambda state: torch.tensor(1), count)


def fit(make, in_step=(), in_fit=(), steps=6, **options):
    step = make(small_step(callbacks=in_step))
    return fx.fit(small_start(), step, small_data(), callbacks=in_fit, steps=steps, **options)


def assert_same(result, expected):
    testing.assert_equal(result.state, expected.state, "the last state")
    assert set(result.history) == set(expected.history)
    for name in set(expected.history) - {"compile/seconds"}:
        assert result.history[name].values.tolist() == expected.history[name].values.tolist()


@pytest.mark.parametrize("make", [UNCOMPILED, COMPILED, TWO_PER_CALL, WRAPPED])
def test_callback_of_fit_alone_equals_callback_given_to_both(make):
    mean, average = fx.callbacks.epoch_mean("loss"), fx.callbacks.ema(0.9)
    both = fit(make, [mean, average], [mean, average])
    assert len(both.history["epoch/loss"].values) == 2
    assert_same(fit(make, (), [mean, average]), both)
    assert_same(fit(make, [mean, average], ()), both)
    assert_same(fit(make, mean, fx.compose(average, fx.compose(mean))), both)


def test_callback_given_to_both_sees_each_event_once():
    callback, seen = seen_at(fx.Gradients, fx.StepEnd)
    for in_step, in_fit in ((callback, callback), ((), callback), (callback, ())):
        seen.clear()
        fit(UNCOMPILED, in_step, in_fit, steps=2)
        assert seen == [fx.Gradients, fx.StepEnd] * 2


def test_plain_function_and_method_given_to_both_are_folded_once():
    seen = []

    def function(state, event: fx.Updated):
        seen.append("function")
        return state, fx.Control()

    class Owner:
        def method(self, state, event: fx.Updated):
            seen.append("method")
            return state, fx.Control()

    owner = Owner()
    fit(UNCOMPILED, [function, owner.method], [owner.method, function], steps=1)
    assert seen == ["function", "method"]


@KINDS
def test_order_is_that_of_step_then_that_of_fit(make):
    """In the step its own callbacks come first. In the loop those that only the step was given come first."""
    first, second, third = counter("counter 1", 1), counter("counter 2", 5), counter("counter 3", 11)
    expected = fit(make, [first, second, third], [first, second, third])
    assert_same(fit(make, [first], [second, third]), expected)
    assert_same(fit(make, [first, second], [third]), expected)
    assert_same(fit(make, [first, second], [first, second, third]), expected)
    if make is not TWO_PER_CALL:
        reversed_ = fit(make, [], [third, second, first])
        assert int(reversed_.state.slots["counter 3"]) != int(expected.state.slots["counter 3"])


@KINDS
def test_traced_callback_of_fit_stops_run(make):
    def stop(state, event: fx.Gradients):
        return state, fx.Control(stop=event.step == 3, reason="enough")

    result = fit(make, (), stop)
    assert (result.reason, int(result.state.step)) == ("enough", 3)


def test_fit_without_new_traced_callback_uses_graphs_of_given_step():
    mean, graphs = fx.callbacks.epoch_mean("loss"), CompileCounterWithBackend("eager")
    step = fx.compile(small_step(callbacks=mean), backend=graphs)
    for in_fit in ((), mean, fx.callbacks.throughput(tokens=1)):
        fx.fit(small_start(), step, small_data(), callbacks=in_fit, steps=2)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("wrap", [UNCOMPILED, WRAPPED])
def test_second_fit_with_same_callbacks_compiles_nothing(wrap):
    mean, quiet, graphs = fx.callbacks.epoch_mean("loss"), seen_at(fx.StepEnd)[0], CompileCounterWithBackend("eager")
    step = wrap(fx.compile(small_step(), backend=graphs, on_recompile="error"))
    for in_fit in (mean, [quiet, mean], [fx.compose(mean, quiet)], mean):
        result = fx.fit(small_start(), step, small_data(), callbacks=in_fit, steps=2)
        assert result.history["compile/graphs"].values.tolist() == [1]
    assert graphs.frame_count == 1
    fx.fit(small_start(), step, small_data(), steps=2)
    assert graphs.frame_count == 2


def test_compiled_step_forgets_callbacks_that_were_not_used_for_long():
    step = fx.compile(small_step(), backend="eager")
    guards = [fx.compose(fx.callbacks.nan_guard(patience=patience)) for patience in range(1, 9)]
    first = step.with_callbacks(guards[0])
    assert step.with_callbacks(guards[0]) is first
    for guard in guards:
        last = step.with_callbacks(guard)
    assert step.with_callbacks(guards[-1]) is last
    assert step.with_callbacks(guards[0]) is not first


def test_donating_step_with_callbacks_of_fit_donates():
    step = fx.compile(small_step(), backend="eager", donate=True).with_callbacks(fx.callbacks.ema(0.9))
    old = fx.attach(small_start(), step)
    step(old, small_data()[0])
    with pytest.raises(fx.DonatedError):
        old.params.keys()


def test_steps_folds_traced_callback_of_its_own():
    callback = fx.callbacks.epoch_mean("loss")
    events = list(fx.steps(small_start(), small_step(), small_data(), callbacks=callback, epochs=1))
    logged = [name for _, _, control in events for name in control.log]
    assert "epoch/loss" in logged


@pytest.mark.parametrize("resumed", ["step", "fit", "both"])
@KINDS
def test_resumed_run_may_give_callback_elsewhere(tmp_path, make, resumed):
    def part(where, steps, **options):
        average = fx.callbacks.ema(0.9)
        given = {"in_step": average if where != "fit" else (), "in_fit": average if where != "step" else ()}
        return fit(make, **given, steps=steps, checkpointer=fx.checkpointer(tmp_path), **options)

    first = part("fit", 3)
    assert list(fx.checkpointer(tmp_path).steps()) == [3]
    second = part(resumed, 6, resume=True)
    straight = fit(make, (), fx.callbacks.ema(0.9))
    testing.assert_equal(second.state, straight.state, "the resumed run")
    assert set(first.state.slots) == set(second.state.slots)


def test_callback_added_at_resume_is_initialized_from_restored_state(tmp_path):
    part = {"checkpointer": fx.checkpointer(tmp_path)}
    first = fit(UNCOMPILED, (), (), steps=2, **part)
    restored = []
    second = fit(
        UNCOMPILED, fx.callbacks.ema(0.5), (), steps=2, resume=True, observers=problem.recorder(restored), **part
    )
    testing.assert_equal(second.state.params, first.state.params, "the parameters")
    assert next(event for event in restored if isinstance(event, fx.Restored)).missing == ("ema",)
    testing.assert_equal(fx.callbacks.averaged(second.state).params, first.state.params, "the average")


def test_two_callbacks_for_one_slot_in_step_and_fit_are_refused():
    with pytest.raises(ValueError, match=r"one callback for the slot 'ema', got ema of the step .* Make the callback"):
        fit(UNCOMPILED, fx.callbacks.ema(0.9), fx.callbacks.ema(0.9))


class TestHandWrittenStep:
    def test_function_that_folds_nothing_is_refused(self):
        def by_hand(state, batch):
            return state, fx.StepOutput({})

        for step in (by_hand, fx.Step(by_hand), fx.compile(by_hand), fx.wrap_step(by_hand, contextlib.nullcontext)):
            with pytest.raises(ValueError, match="step that fires Updated for ema, got one that fires none"):
                fx.fit(small_start(), step, small_data(), callbacks=fx.callbacks.ema(0.9), steps=1)

    @pytest.mark.parametrize("make", [UNCOMPILED, COMPILED, WRAPPED])
    def test_step_that_cannot_fold_others_is_refused(self, make):
        step = make(fx.Step(small_step().function, fires=[fx.Updated]))
        with pytest.raises(ValueError, match=r"step that folds ema, .* Updated .* fold it in the function and declare"):
            fx.fit(small_start(), step, small_data(), callbacks=fx.callbacks.ema(0.9), steps=1)

    def test_step_compiled_by_torch_must_be_given_its_traced_callbacks(self):
        callback, seen = seen_at(fx.StepEnd, fx.Updated)
        with pytest.raises(ValueError, match=r"compiled by torch.compile\. Give the callback to fxtrain.train_step"):
            fit(torch.compile, (), callback, steps=1)
        fit(lambda step: torch.compile(step, backend="eager"), callback, (), steps=2)
        assert seen.count(fx.StepEnd) == 2

    def test_callback_that_it_folds_is_folded_in_loop_too(self):
        callback, seen = seen_at(fx.Updated, fx.StepEnd)
        folded = small_step(callbacks=callback)
        step = fx.Step(folded.function, callbacks=callback, fires=[fx.Updated])
        for in_fit in (callback, ()):
            seen.clear()
            fx.fit(small_start(), step, small_data(), callbacks=in_fit, steps=1)
            assert seen == [fx.Updated, fx.StepEnd]

    def test_rebuild_adds_callbacks_of_fit(self):
        def build(folded):
            return fx.Step(small_step(callbacks=folded).function, callbacks=folded, fires=[fx.Updated], rebuild=build)

        callback, seen = seen_at(fx.Updated, fx.StepEnd)
        fx.fit(small_start(), build(fx.compose()), small_data(), callbacks=callback, steps=1)
        assert seen == [fx.Updated, fx.StepEnd]


def test_learning_rate_search_uses_callbacks_of_step():
    tx = fx.optim.inject_hyperparams(fx.optim.sgd)(learning_rate=0.1)
    step = fx.train_step(problem.loss_fn, tx, callbacks=fx.callbacks.epoch_mean("loss"))
    found = fx.find_learning_rate(fx.init(problem.module(), tx), step, problem.data(), steps=5)
    assert len(found.rates) == 5
