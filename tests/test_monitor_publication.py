"""Monitors measure, publish and warn when they should, obey the callback laws, and resume exactly."""

import contextlib
import io
import math
import signal

import problem
import pytest
import torch
from monitored_steps import after_a_step, published, updated
from torch import nn

import fxtrain as fx
from fxtrain import testing, tree
from fxtrain.callbacks import grad_flow, grad_norms, grad_profile, histograms, update_ratios, weight_stats


def everything(every=1):
    return fx.compose(
        grad_norms(layer="*", every=every),
        grad_flow(every=every),
        weight_stats(every=every),
        update_ratios(every=every),
        grad_profile(every=every),
        *[histograms(of, every=every, sample=16) for of in ("grads", "weights", "updates")],
    )


def small():
    """Returns a transformation and a state with two layers, because each layer and rule lengthens a compilation."""
    tx = fx.optim.sgd(0.1)
    return tx, fx.init(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), tx)


SMALL_BATCHES = [problem.SMALL_BATCH * scale for scale in (0.5, 1.0, 2.0)]


class TestWarnings:
    """Texts that name the layers with a norm out of range."""

    def test_large_gradients_are_named(self):
        monitor = grad_norms(warn_above=4.9)
        log = published(monitor, after_a_step(monitor))
        assert log["grad_norm/large"].markdown == "large gradient in second: 10, first: 5"
        above = grad_norms(warn_above=10.0)
        assert "grad_norm/large" not in published(above, after_a_step(above))

    def test_gradient_that_is_not_a_number_is_named(self):
        monitor = grad_norms(warn_above=20.0)
        log = published(monitor, after_a_step(monitor, scale=math.nan))
        assert log["grad_norm/large"].markdown == "large gradient in second: nan"

    def test_vanishing_and_exploding_layers_are_named(self):
        monitor = grad_flow(exploding=9.0, warn=True)
        log = published(monitor, after_a_step(monitor))
        assert log["grad_flow/vanishing_in"].markdown == "vanishing gradient in third: 0"
        assert log["grad_flow/exploding_in"].markdown == "exploding gradient in second: 10"
        assert not any(name.endswith("_in") for name in published(grad_flow(exploding=9.0), after_a_step(monitor)))

    def test_number_of_names_is_bounded(self):
        monitor, tx = grad_norms(warn_above=0.5), fx.optim.sgd(0.1)
        step = fx.train_step(lambda model, batch: sum(i * model[f"w{i}"] for i in range(1, 8)), tx, callbacks=monitor)
        state = fx.attach(fx.init({f"w{i}": torch.tensor(1.0) for i in range(1, 8)}, tx), monitor)
        log = published(monitor, step(state, torch.zeros(1))[0])
        assert log["grad_norm/large"].markdown == "large gradient in w7: 7, w6: 6, w5: 5, w4: 4, w3: 3 and 2 more"

    def test_warning_is_shown_by_the_progress_at_its_step(self):
        file, monitor = io.StringIO(), grad_norms(warn_above=1e-6)
        tx = fx.optim.sgd(0.1)
        step = fx.train_step(lambda model, batch: model["w"].sum() * batch.sum(), tx, callbacks=monitor)
        shown = fx.observers.required(fx.observers.progress(file=file))
        state = fx.init({"w": torch.ones(1)}, tx)
        fx.fit(state, step, [torch.tensor([12.3])], steps=1, callbacks=[monitor], observers=[shown])
        assert "step 1: large gradient in w: 12.3" in file.getvalue().splitlines()

    def test_warnings_obey_the_callback_laws(self):
        monitor = fx.compose(grad_norms(warn_above=1.0), grad_flow(warn=True))
        events = [updated(1, [3.0, 4.0]), fx.StepEnd(step=1, metrics={})]
        testing.check_laws(monitor, fx.init({"w": torch.ones(2)}), events)

    def test_threshold_below_zero_is_rejected(self):
        with pytest.raises(ValueError, match=r"expected warn_above to be .*, got -1\.0"):
            grad_norms(warn_above=-1.0)


class TestPublication:
    def test_stale_measurements_are_not_published(self):
        monitor = grad_norms(every=2, publish=fx.every(1))
        state = after_a_step(monitor, steps=3)
        assert int(state.slots["grad_norm"].step) == 2
        assert not published(monitor, state, step=3)
        assert published(monitor, after_a_step(monitor, steps=2), step=2)

    @pytest.mark.parametrize("make", [grad_norms, weight_stats])
    def test_publication_may_depend_on_the_loss(self, make):
        monitor = fx.compose(make(publish=lambda event: event.metrics["loss"] > 1.0))
        state = after_a_step(monitor)
        logged = [
            monitor(state, fx.StepEnd(step=1, metrics={"loss": torch.tensor(loss)}))[1].log for loss in (0.5, 2.0)
        ]
        shown = [sum(bool(entry.when) for entry in log.values()) for log in logged]
        assert shown[0] == 0
        assert shown[1] > 0

    def test_trigger_gates_the_measurement_in_the_step(self):
        monitor = grad_norms(every=fx.every(2) & fx.after(2))
        assert [int(after_a_step(monitor, steps=n).slots["grad_norm"].step) for n in (2, 3, 4, 5)] == [-1, -1, 4, 4]

    def test_save_has_measurements_of_its_step(self, tmp_path):
        trigger = fx.every(2)
        monitor = grad_flow(publish=trigger)
        step = problem.step(callbacks=monitor)
        folder = fx.checkpointer(tmp_path, keep=10)
        callbacks = fx.compose(monitor, fx.when(trigger, fx.callbacks.save()))
        result = fx.fit(problem.start(), step, problem.data(), steps=6, callbacks=callbacks, checkpointer=folder)
        logged = result.history["grad_flow/gain_mean"]
        assert logged.steps.tolist() == [2, 4, 6]
        for number in (2, 4, 6):
            assert int(folder.restore(result.state, step=number).slots["grad_flow"].step) == number

    @pytest.mark.parametrize("asker", ["callback", "stop", "end", "signal", "error"])
    @pytest.mark.parametrize("make", [grad_norms, grad_flow, grad_profile, weight_stats, update_ratios, histograms])
    def test_save_publishes_measurements_of_its_step_whoever_asked(self, tmp_path, make, asker):
        def ask(state, event: fx.StepEnd):
            if event.step != 3:
                return state, fx.Control()
            if asker == "signal":
                signal.raise_signal(signal.SIGTERM)
            if asker == "error":
                raise RuntimeError("the disk of the data is gone")
            requests = {"callback": {"save": True, "reason": "wanted"}, "stop": {"stop": True, "reason": "enough"}}
            return state, fx.Control(**requests.get(asker, {}))

        monitor, seen = make(every=1, publish=lambda event: False, at_saves=True), {}

        def observe(state, event: fx.SaveBegin, control):
            seen[event.step, event.role] = len(control.log)

        step, folder = problem.step(callbacks=monitor), fx.checkpointer(tmp_path)
        raises = pytest.raises(RuntimeError, match="data is gone") if asker == "error" else contextlib.nullcontext()
        with raises:
            fx.fit(
                problem.start(), step, problem.data(), steps=4, callbacks=ask, checkpointer=folder, observers=observe
            )
        saves = {
            "callback": [(3, "trajectory"), (4, "session")],
            "end": [(4, "session")],
            "error": [(2, "session")],
        }
        assert list(seen) == saves.get(asker, [(3, "session")])
        assert min(seen.values()) > 0

    def test_save_publishes_nothing_twice(self, tmp_path):
        monitor = grad_norms(publish=fx.every(2), at_saves=True)
        step, folder = problem.step(callbacks=monitor), fx.checkpointer(tmp_path, keep=10)
        callbacks = fx.when(3, fx.callbacks.save())
        result = fx.fit(problem.start(), step, problem.data(), steps=6, callbacks=callbacks, checkpointer=folder)
        assert result.history["grad_norm/total"].steps.tolist() == [2, 3, 4, 6]
        resumed = fx.fit(
            problem.start(), step, problem.data(), steps=8, callbacks=callbacks, checkpointer=folder, resume=True
        )
        assert resumed.history["grad_norm/total"].steps.tolist() == [8]

    @pytest.mark.parametrize("compiled", [False, True])
    def test_gated_measurements_match_ungated_ones(self, compiled):
        tx, start = small()

        def states(every, compiled=False):
            monitor = everything(every)
            step = fx.train_step(problem.squares, tx, callbacks=monitor)
            step = fx.compile(step, backend="eager") if compiled else step  # test_everything compiles by Inductor
            state = fx.attach(start, monitor)
            for index in range(5):
                state, _ = step(state, SMALL_BATCHES[index % 3])
                yield state

        for number, (always, gated) in enumerate(zip(states(1), states(2, compiled), strict=True), start=1):
            for name, memory in always.slots.items():
                if number % 2 == 0:
                    assert int(gated.slots[name].step) == number
                    testing.assert_equal(gated.slots[name], memory, name)
            assert int(gated.slots["grad_norm"].step) == (number // 2 * 2 or -1)

    def test_vmapped_measurements_match_single_ones(self):
        monitor = grad_norms(every=2)
        step = problem.step(callbacks=monitor)
        one = fx.attach(problem.start(), monitor)
        alone = one
        many = tree.map(lambda leaf: torch.stack([leaf] * 2), one)
        for batch in problem.data()[:2]:
            alone, _ = step(alone, batch)
            many, _ = torch.vmap(step, (0, None))(many, batch)
        for name, value in many.slots["grad_norm"].values._asdict().items():
            torch.testing.assert_close(value[1], getattr(alone.slots["grad_norm"].values, name))


@pytest.mark.parametrize(
    "make",
    [
        lambda: grad_norms(layer="w"),
        grad_flow,
        lambda: weight_stats(parameter="w"),
        update_ratios,
        lambda: grad_profile(every=2),
        lambda: histograms(every=1, sample=2),
        lambda: histograms("updates", every=2),
    ],
)
def test_monitors_obey_callback_laws(make):
    events = [updated(step, [float(step), -2.0], step == 3) for step in range(1, 5)]
    events.append(fx.StepEnd(step=4, metrics={}))
    testing.check_laws(make(), fx.init({"w": torch.tensor([1.0, -3.0])}), events)


@pytest.mark.parametrize("compiled", [False, True])
def test_resumed_run_matches_uninterrupted_run(compiled, tmp_path):
    monitors = everything(every=2)
    tx, start = small()
    step = fx.train_step(problem.squares, tx, callbacks=monitors)
    step = fx.compile(step, backend="eager") if compiled else step

    def run(steps, **options):
        return fx.fit(start, step, SMALL_BATCHES, steps=steps, callbacks=monitors, **options).state

    whole = run(12)
    for cut in range(1, 12, 4 if compiled else 1):
        folder = fx.checkpointer(tmp_path / str(cut))
        run(cut, checkpointer=folder)
        testing.assert_equal(run(12, checkpointer=folder, resume=True), whole, f"cut after {cut}")


@pytest.mark.usefixtures("fresh_dynamo")
def test_step_with_conditional_monitors_is_one_dynamo_graph():
    tx, start = small()
    monitors = [fx.callbacks.grad_norms(every=2), fx.callbacks.histograms(every=2)]
    step, batch = fx.train_step(problem.squares, tx, callbacks=monitors), problem.SMALL_BATCH
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    wanted = got = fx.attach(start, step)
    for _ in range(2):
        wanted, got = step(wanted, batch)[0], compiled(got, batch)[0]
    assert int(got.slots["grad_norm"].step) == 2
    torch.testing.assert_close(got.slots["grad_norm"].values.layers, wanted.slots["grad_norm"].values.layers)
    torch.testing.assert_close(got.slots["histograms/grads"].values.seen, wanted.slots["histograms/grads"].values.seen)
