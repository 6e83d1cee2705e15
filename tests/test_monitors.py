"""Monitors of gradients and weights inside the step have exact values."""

import math
import re
import sys

import problem
import pytest
import torch
from monitored_steps import after_a_step, published, updated
from torch import nn

import fxtrain as fx
from fxtrain import testing, writers
from fxtrain.callbacks import grad_flow, grad_norms, grad_profile, histograms, update_ratios, weight_stats


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

    def test_each_of_many_parameters_has_its_own_counts(self):
        """Parameters of one size are counted together, at most 32 of them."""
        sizes = [3, 70, 3, 100] * 20
        params = {f"{index:02}": torch.randn(size) for index, size in enumerate(sizes)}
        params["05"][:4] = torch.tensor([math.nan, math.inf, -math.inf, 0.1])
        params["07"][:3] = torch.tensor([-0.1, 1.0, -1.0])
        monitor, tx = histograms("weights", every=1, smallest=0.1, largest=1.0, per_decade=1), fx.optim.sgd(0.0)
        step = fx.train_step(lambda model, batch: sum(map(torch.sum, model.values())), tx, callbacks=monitor)
        state, _ = step(fx.attach(fx.init(params, tx), monitor), torch.zeros(1))
        values, bounds = state.slots["histograms/weights"].values, torch.tensor([-1.0, -0.1, 0.1, 1.0])
        assert values.seen.tolist() == sizes
        for row, (_, leaf) in zip(values.counts, sorted(params.items()), strict=True):
            bucket = torch.where(leaf.isnan(), len(bounds), torch.bucketize(leaf, bounds))
            assert row.tolist() == bucket.bincount(minlength=len(bounds) + 1).tolist()

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
