"""Monitors inside the step: exact values, publication, gating, callback laws, and resume."""

import contextlib
import io
import math
import re
import signal
import sys

import problem
import pytest
import torch
from torch import nn

import fxtrain as fx
from fxtrain import testing, tree, writers
from fxtrain.callbacks import (
    activation_stats,
    grad_flow,
    grad_norms,
    grad_profile,
    histograms,
    update_ratios,
    weight_stats,
)

START = {"first": torch.tensor([1.0, 2.0]), "second": torch.tensor([4.0]), "third": torch.tensor([3.0])}
RATE = 0.5


def loss_fn(model, batch):
    return (model["first"] * torch.tensor([3.0, -4.0])).sum() + batch * model["second"].sum() + 0 * model["third"].sum()


def after_a_step(monitor, scale=10.0, steps=1):
    """Returns the state after steps with gradients (3, -4), (scale,) and (0,)."""
    tx = fx.optim.sgd(RATE)
    step = fx.train_step(loss_fn, tx, callbacks=monitor)
    state = fx.attach(fx.init(START, tx), monitor)
    for _ in range(steps):
        state, _ = step(state, torch.tensor(scale))
    return state


def published(monitor, state, step=1):
    event = fx.StepEnd(step=step, metrics={})
    log = fx.compose(monitor)(state, event)[1].log
    return {name: entry.value for name, entry in log.items() if bool(entry.when)}


def updated(step, values, skipped=False):
    """Returns an Updated event of a model with one parameter of shape [2]."""
    loss = torch.tensor(0.0)
    grads = {"w": torch.tensor(values)}
    return fx.Updated(
        step=torch.tensor(step),
        loss=loss,
        metrics={"loss": loss},
        grads=grads,
        updates=tree.map(lambda g: -0.1 * g, grads),
        skipped=torch.tensor(skipped),
    )


class TestGradNorms:
    @pytest.mark.parametrize(
        ("norm", "layers", "total"),
        [
            ("l2", [5, 10, 0], math.sqrt(125)),
            ("l1", [7, 10, 0], 17),
            ("linf", [4, 10, 0], 10),
            ("mean", [3.5, 10, 0], 17 / 4),
        ],
    )
    def test_norms_have_exact_values(self, norm, layers, total):
        monitor = grad_norms(norm=norm, layer="s*")
        log = published(monitor, after_a_step(monitor))
        assert {name: float(value) for name, value in log.items()} == pytest.approx(
            {
                "grad_norm/total": total,
                "grad_norm/max": max(layers),
                "grad_norm/min": 0.0,
                "grad_norm/mean": sum(layers) / 3,
                "grad_norm/second": 10.0,
            }
        )

    def test_layers_follow_module_definition_order(self):
        module = nn.Sequential(*[nn.Linear(2, 2) for _ in range(11)])
        monitor, tx = grad_norms(), fx.optim.sgd(0.1)
        step = fx.train_step(lambda model, batch: model(batch).sum(), tx, callbacks=monitor)
        state = fx.attach(fx.init(module, tx), monitor)
        found = fx.gradients(lambda model, batch: model(batch).sum())(state, torch.ones(1, 2)).grads
        state, _ = step(state, torch.ones(1, 2))
        wanted = [
            torch.cat([found[f"{i}.weight"].flatten(), found[f"{i}.bias"]]).norm() for i in range(11)
        ]  # not in lexicographic order (0, 1, 10, 2, ...)
        torch.testing.assert_close(state.slots["grad_norm"].values.layers, torch.stack(wanted))

    def test_shared_reductions_are_computed_once(self):
        class Squares(torch.overrides.TorchFunctionMode):
            count = 0

            def __torch_function__(self, function, types, args=(), kwargs=None):
                self.count += function is torch.Tensor.square
                return function(*args, **(kwargs or {}))

        both = fx.compose(grad_norms(), grad_flow())
        state = fx.attach(fx.init({"w": torch.ones(2)}), both)
        with Squares() as squares:
            both(state, updated(1, [3.0, 4.0]))
        assert squares.count == 1

    def test_unmatched_layer_pattern_is_rejected(self):
        monitor = grad_norms(layer="no.*")
        with pytest.raises(
            ValueError, match=r"expected 'no\.\*' to match a layer, got no match among first, second, third"
        ):
            published(monitor, after_a_step(monitor))

    def test_invalid_options_are_rejected(self):
        with pytest.raises(ValueError, match="expected norm to be one of 'l2', 'l1', 'linf', 'mean', got 'l3'"):
            grad_norms(norm="l3")
        with pytest.raises(ValueError, match="expected every to be a positive int or a trigger"):
            grad_norms(every=0)


class TestGradFlow:
    def test_gains_and_counts_have_exact_values(self):
        monitor = grad_flow(exploding=9.0, layer="first")
        log = {
            name.partition("/")[2]: float(value) for name, value in published(monitor, after_a_step(monitor)).items()
        }
        # Norms 5, 10 and 0 give the gains 0.5 and infinity. Infinity is excluded from the mean.
        assert log == {
            "gain_mean": 0.5,
            "gain_min": 0.5,
            "gain_max": 0.5,
            "healthy": 1,
            "damping": 0,
            "amplifying": 1,
            "vanishing": 1,
            "exploding": 1,
            "gain/first": 0.5,
        }

    def test_single_layer_has_no_gain(self):
        monitor = grad_flow()
        state = fx.attach(fx.init({"w": torch.ones(2)}), monitor)
        state, _ = fx.compose(monitor)(state, updated(1, [3.0, 4.0]))
        assert float(published(monitor, state)["grad_flow/gain_max"]) == 0.0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"healthy": (2.0, 1.0)}, "two ascending positive gains, got a tuple of (2.0, 1.0)"),
            ({"vanishing": 1.0, "exploding": 0.1}, "got vanishing=1.0 and exploding=0.1"),
        ],
    )
    def test_invalid_options_are_rejected(self, options, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            grad_flow(**options)


class TestWeights:
    def test_weight_stats_have_exact_values(self):
        monitor = weight_stats(parameter="first")
        state = after_a_step(monitor)  # first is (1, 2) - 0.5 (3, -4) = (-0.5, 4)
        log = {name: float(value) for name, value in published(monitor, state).items()}
        assert log["weights/first/mean"] == pytest.approx(1.75)
        assert log["weights/first/std"] == pytest.approx(2.25)
        assert log["weights/first/norm"] == pytest.approx(math.sqrt(16.25))
        assert log["weights/first/max"] == 4.0

    def test_update_ratios_have_exact_values(self):
        monitor = update_ratios(parameter="*", patience=2, worst=2)
        state = after_a_step(monitor, steps=2)
        log = published(monitor, state, step=2)
        first = 2.5 / math.hypot(1 - 3, 2 + 4)
        assert float(log["update_ratio/first"]) == pytest.approx(first, rel=1e-6)
        assert float(log["update_ratio/second"]) == pytest.approx(5 / 6)
        assert int(log["update_ratio/frozen"]) == 1
        assert log["update_ratio/worst"].markdown.splitlines() == ["- `second`: 0.833", f"- `first`: {first:.3g}"]

    def test_skipped_step_does_not_count_as_frozen(self):
        monitor = fx.compose(update_ratios(patience=1))
        state = fx.attach(fx.init({"w": torch.ones(2)}), monitor)
        state, _ = monitor(state, updated(1, [3.0, 4.0], skipped=True))
        assert state.slots["update_ratio"].values.still.tolist() == [0]
        assert state.slots["update_ratio"].values.ratios.tolist() == [0.0]

    @pytest.mark.parametrize("options", [{"patience": 0}, {"frozen_below": -1.0}, {"worst": -1}])
    def test_invalid_options_are_rejected(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            update_ratios(**options)


class TestHistograms:
    def test_counts_cover_a_strided_sample(self):
        values = torch.linspace(-1, 1, 10_000)
        monitor = fx.compose(histograms("weights", every=1, sample=100, smallest=0.1, largest=1.0, per_decade=1))
        state = fx.attach(fx.init({"w": values}), monitor)
        state, _ = monitor(state, updated(1, [0.0, 0.0]))
        seen = values[:10_000:100]
        edges = torch.tensor([-1.0, -0.1, 0.1, 1.0])
        wanted = [int((torch.bucketize(seen, edges) == i).sum()) for i in range(5)]
        assert state.slots["histograms/weights"].values.counts.tolist() == [wanted]
        assert int(state.slots["histograms/weights"].values.seen) == 100

    def test_counts_are_published_as_histogram(self):
        monitor = histograms(every=1, parameter="first")
        log = published(monitor, after_a_step(monitor))
        counts, edges = log["histograms/grads/first"].buckets()
        assert counts.sum() == 2
        assert edges[0] == -100.0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"of": "losses"}, "expected of to be one of"),
            ({"sample": 0}, "expected sample to be a positive int"),
            ({"smallest": 2.0, "largest": 1.0}, "got smallest=2.0 and largest=1.0"),
            ({"per_decade": 0}, "expected per_decade to be a positive int"),
        ],
    )
    def test_invalid_options_are_rejected(self, options, message):
        with pytest.raises(ValueError, match=message):
            histograms(**options)


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


class TestBlocks:
    """The name of a block selects its parameters as one vector."""

    def measured(self, *monitors):
        module = nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), nn.Linear(2, 1))
        tx, callback = fx.optim.sgd(0.1), fx.compose(*monitors)
        step = fx.train_step(lambda model, batch: model(batch).square().sum(), tx, callbacks=callback)
        state = fx.attach(fx.init(module, tx), callback)
        before, batch = state, torch.tensor([[1.0, 2.0]])
        grads = fx.gradients(lambda model, batch: model(batch).square().sum())(state, batch).grads
        state, _ = step(state, batch)
        return before, {k: v for k, v in grads.items() if k.startswith("0.")}, state, published(callback, state)

    @pytest.mark.parametrize(
        ("norm", "of"),
        [
            ("l2", torch.linalg.vector_norm),
            ("l1", lambda v: v.abs().sum()),
            ("linf", lambda v: v.abs().max()),
            ("mean", lambda v: v.abs().mean()),
        ],
    )
    def test_norm_of_a_block_is_that_of_all_its_gradients(self, norm, of):
        _, grads, _, log = self.measured(grad_norms(norm=norm, layer=["0", "0.*"]))
        torch.testing.assert_close(log["grad_norm/0"], of(torch.cat([g.flatten() for g in grads.values()])))
        assert {"grad_norm/0.0", "grad_norm/0.1"} <= set(log)
        assert "grad_norm/1" not in log

    def test_statistics_of_a_block_are_those_of_all_its_parameters(self):
        before, grads, state, log = self.measured(
            weight_stats(parameter="0"), update_ratios(parameter="0"), histograms("weights", every=1, parameter="0")
        )
        whole = torch.cat([state.params[name].flatten() for name in grads])
        wanted = {"norm": whole.norm(), "mean": whole.mean(), "std": whole.std(correction=0), "max": whole.abs().max()}
        for statistic, value in wanted.items():
            torch.testing.assert_close(log[f"weights/0/{statistic}"], value)
        moved = whole - torch.cat([before.params[name].flatten() for name in grads])
        torch.testing.assert_close(log["update_ratio/0"], moved.norm() / whole.norm())
        assert int(log["histograms/weights/0"].counts.sum()) == whole.numel()

    def test_gain_of_a_block_is_the_product_of_its_gains(self):
        *_, log = self.measured(grad_flow(layer=["0", "0.*"]))
        torch.testing.assert_close(log["grad_flow/gain/0"], log["grad_flow/gain/0.0"] * log["grad_flow/gain/0.1"])

    def test_pattern_selects_blocks_where_no_layer_matches(self):
        *_, log = self.measured(grad_norms(layer="[0]"))
        assert "grad_norm/0" in log

    def test_compiled_step_measures_blocks(self):
        monitors = fx.compose(update_ratios(parameter="0"), histograms(every=2, parameter="0"))
        tx = fx.optim.sgd(0.1)
        module = nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), nn.Linear(2, 1))
        step = fx.train_step(lambda model, batch: model(batch).square().sum(), tx, callbacks=monitors)
        state, batch = fx.attach(fx.init(module, tx), monitors), torch.ones(1, 2)
        wanted, _ = step(state, batch)
        found, _ = fx.compile(step, backend="eager")(state.copy(), batch)
        testing.assert_equal(found.slots, wanted.slots, "compiled")


class TestGradProfile:
    """The picture of the gradients over depth."""

    def test_mean_and_max_of_layers_and_blocks_have_exact_values(self):
        values = after_a_step(grad_profile(every=1)).slots["grad_profile"].values
        assert [value.tolist() for value in values] == [[3.5, 10.0, 0.0], [4.0, 10.0, 0.0]]
        values = after_a_step(grad_profile(every=1, layer=["third", "f*"])).slots["grad_profile"].values
        assert values.max.tolist() == [4.0, 0.0]  # in order of depth

    def test_picture_is_published_and_drawn_at_its_trigger_only(self, tmp_path):
        monitor, drawn = grad_profile(every=2), []
        step = problem.step(callbacks=monitor)
        write = fx.observers.write(writers.media(tmp_path))

        def watch(state, event: fx.StepEnd, control):
            drawn.extend((event.step, "pixels" in vars(entry.value)) for entry in control.log.values())

        fx.fit(problem.start(), step, problem.data(), steps=5, callbacks=monitor, observers=[watch, write])
        assert drawn == [(2, False), (4, False)]
        assert sorted(path.name for path in tmp_path.rglob("*.png")) == ["00000002.png", "00000004.png"]

    @pytest.mark.parametrize(
        ("layer", "scale", "is_marked"),
        [("second", 10.0, False), ("s*", 0.0, True), ("*", 10.0, True), ("*", math.nan, True), ("*", math.inf, True)],
    )
    def test_layers_without_finite_gradient_are_marked(self, layer, scale, is_marked):
        monitor = grad_profile(every=1, layer=layer)
        figure = published(monitor, after_a_step(monitor, scale))["grad_profile"]
        red = (figure.image().frames[0, :, :, :3] == (214, 39, 40)).all(-1)
        assert red.any() == is_marked

    def test_missing_matplotlib_names_the_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ImportError, match=r"grad_profile requires matplotlib. Install it: pip install 'fxtrain"):
            grad_profile(every=10)


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


class TestTap:
    @pytest.mark.parametrize("compiled", [False, True])
    def test_activation_stats_have_exact_values(self, compiled):
        module = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))

        def loss_fn(model, batch):
            return model(batch).square().mean()

        state = fx.init(module, fx.optim.sgd(0.0))
        step = fx.train_step(fx.tap(loss_fn, ["1", "2"], activation_stats), fx.optim.sgd(0.0))
        step = fx.compile(step, backend="eager") if compiled else step
        batch = torch.randn(8, 2)
        _, output = step(state, batch)
        inside = module[1](module[0](batch))
        wanted = {
            "activations/1/mean": inside.mean(),
            "activations/1/std": inside.std(unbiased=False),
            "activations/1/zeros": (inside == 0).float().mean(),
            "activations/1/max": inside.abs().max(),
        }
        for name, value in wanted.items():
            torch.testing.assert_close(output.metrics[name], value.detach())
        assert len(output.metrics) == 10  # the loss and the learning rate too
        assert not any(part._forward_hooks for part in module.modules())

    @pytest.mark.usefixtures("fresh_dynamo")
    def test_step_with_tap_and_patterns_is_one_dynamo_graph(self):
        counts = fx.callbacks.histograms(parameter="4.*", every=1)
        tx = fx.optim.sgd(0.1)
        step = fx.train_step(fx.tap(problem.loss_fn, ["0", "[24]"], activation_stats), tx, callbacks=counts)
        state, batch = fx.attach(fx.init(problem.module(), tx), step), problem.data()[0]
        wanted, eager = step(state, batch)
        new, output = torch.compile(step, fullgraph=True, backend="eager")(state, batch)
        assert list(output.metrics) == list(eager.metrics)
        for got, want in ((output.metrics, eager.metrics), (new.slots, wanted.slots), (new.params, wanted.params)):
            testing.assert_equal(got, want, "compiled")

    def test_tap_leaves_gradients_unchanged(self):
        state, batch = problem.start(), problem.data()[0]
        plain = fx.gradients(problem.loss_fn)(state, batch)
        tapped = fx.gradients(fx.tap(problem.loss_fn, "*", activation_stats))(state, batch)
        testing.assert_equal(tapped.grads, plain.grads, "gradients")

    def test_hooks_are_removed_after_an_error(self):
        state, batch, calls = problem.start(), problem.data()[0], []

        def count(output):
            calls.append(output)
            return activation_stats(output)

        def fails(model, batch):
            problem.loss_fn(model, batch)
            raise RuntimeError("on purpose")

        with pytest.raises(RuntimeError, match="on purpose"):
            fx.gradients(fx.tap(fails, "*", count))(state, batch)
        assert calls
        calls.clear()
        fx.gradients(problem.loss_fn)(state, batch)
        assert not calls

    def test_tap_reaches_into_dicts_of_modules(self):
        state = fx.init({"a": nn.Linear(1, 1), "b": nn.Sequential(nn.Tanh())})

        def loss_fn(model, batch):
            return model["b"](model["a"](batch)).sum()

        found = fx.gradients(fx.tap(loss_fn, "b.0", lambda y: y.amax(), prefix="out"))(state, torch.ones(1, 1))
        assert sorted(found.metrics) == ["loss", "out/b.0"]

    def test_unmatched_pattern_and_duplicate_names_are_rejected(self):
        state, batch = problem.start(), problem.data()[0]
        with pytest.raises(ValueError, match=r"expected 'nobody' to match a module, got no match among 0, 1"):
            fx.gradients(fx.tap(problem.loss_fn, "nobody", activation_stats))(state, batch)
        twice = fx.tap(fx.tap(problem.loss_fn, "0", activation_stats), "0", activation_stats)
        with pytest.raises(ValueError, match="Choose another prefix"):
            fx.gradients(twice)(state, batch)
