"""Which parameters move, and when: masked in one graph, and partitioned with a graph for each phase."""

import problem
import pytest
import torch
from torch import nn

import fxtrain as fx
from fxtrain import testing, tree


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))


def loss_fn(model, batch):
    return model(batch).square().mean()


BATCH = torch.tensor([[1.0, -2.0], [0.5, 3.0]])


def moved(before, after):
    return sorted(name for name in before.params if not torch.equal(before.params[name], after.params[name]))


class TestUnfreeze:
    @pytest.mark.parametrize("compiled", [False, True])
    def test_each_in_its_own_time(self, compiled):
        tx = fx.optim.unfreeze(fx.optim.adam(0.1), {"2.*": 0, "0.weight": (1, 3), "*": None})
        step = fx.train_step(loss_fn, tx)
        step = fx.compile(step, on_recompile="error") if compiled else step
        state, found = fx.init(two_layers(), tx), []
        for _ in range(4):
            after, _ = step(state, BATCH)
            found.append(moved(state, after))
            state = after
        head, both = ["2.bias", "2.weight"], ["0.weight", "2.bias", "2.weight"]
        assert found == [head, both, both, head]

    def test_the_memory_of_what_is_frozen_waits(self):
        tx = fx.optim.unfreeze(fx.optim.adam(0.1), {"*": 2})
        state, step = fx.init(two_layers(), tx), fx.train_step(loss_fn, tx)
        for _ in range(2):
            state, _ = step(state, BATCH)
        fresh = fx.init(two_layers(), fx.optim.adam(0.1))
        begun, _ = fx.train_step(loss_fn, fx.optim.adam(0.1))(fresh, BATCH)
        state, _ = step(state, BATCH)
        testing.assert_equal(state.params, begun.params, "the first step that moves it")

    @pytest.mark.parametrize("phase", [-1, (3, 3), (2, 1), "soon", True, 1.5])
    def test_a_phase_that_is_none(self, phase):
        with pytest.raises(ValueError, match=r"phases\['a\*'\] is .*: its first step, \(first, end\), or None"):
            fx.optim.unfreeze(fx.optim.sgd(0.1), {"a*": phase})

    def test_a_parameter_that_nobody_named(self):
        with pytest.raises(ValueError, match=r"'0\.bias' matches none of '2\.\*': add a pattern"):
            fx.init(two_layers(), fx.optim.unfreeze(fx.optim.sgd(0.1), {"2.*": 0}))


class TestWithTrainable:
    def test_phases(self):
        tx = fx.optim.adam(0.1)
        step = fx.compile(fx.train_step(loss_fn, tx), on_recompile="allow")
        state = fx.with_trainable(fx.init(two_layers(), tx), tx, "2.*")
        assert len(tree.leaves(state.opt_state)) < len(tree.leaves(fx.init(two_layers(), tx).opt_state))
        after, _ = step(state, BATCH)
        assert moved(state, after) == ["2.bias", "2.weight"]
        thawed = fx.with_trainable(after, tx, "*")
        assert moved(thawed, step(thawed, BATCH)[0]) == ["0.bias", "0.weight", "2.bias", "2.weight"]
        assert step.graphs == 2

    def test_what_the_optimizer_remembers_stays(self):
        tx = fx.optim.sgd(0.1, momentum=0.9)
        state, _ = fx.train_step(loss_fn, tx)(fx.init(two_layers(), tx), BATCH)
        narrowed = fx.with_trainable(state, tx, ["2.*", "0.bias"])
        old = dict(zip(tree.paths(state.opt_state), tree.leaves(state.opt_state), strict=True))
        new = dict(zip(tree.paths(narrowed.opt_state), tree.leaves(narrowed.opt_state), strict=True))
        assert new
        assert all(leaf is old[path] for path, leaf in new.items())

    def test_in_a_run(self):
        tx = problem.transform()
        state = fx.with_trainable(problem.start(), tx, "4.*")
        result = fx.fit(state, problem.step(), problem.data(), epochs=1)
        assert moved(state, result.last) == ["4.bias", "4.weight"]

    def test_a_pattern_that_matches_nothing(self):
        tx = fx.optim.sgd(0.1)
        with pytest.raises(
            ValueError, match=r"'head' matches no parameter that can be trained; there are 0\.bias, 0\.weight"
        ):
            fx.with_trainable(fx.init(two_layers(), tx), tx, "head")


class TestRecompute:
    def test_statistics_are_means_over_the_batches(self):
        state = problem.start()
        after = fx.recompute_statistics(state, problem.data(), lambda model, batch: model(batch["x"]))
        inside = [batch["x"] @ state.params["0.weight"].T + state.params["0.bias"] for batch in problem.data()]
        wanted = torch.stack([x.mean(0) for x in inside]).mean(0)
        torch.testing.assert_close(after.buffers["1.running_mean"], wanted)
        variance = torch.stack([x.var(0) for x in inside]).mean(0)
        torch.testing.assert_close(after.buffers["1.running_var"], variance)
        testing.assert_equal(after.params, state.params, "parameters")
        assert {m.momentum for m in state.model._training.modules() if hasattr(m, "momentum")} == {0.1}

    def test_nothing_to_compute_of(self):
        with pytest.raises(ValueError, match="no batch"):
            fx.recompute_statistics(problem.start(), [])
