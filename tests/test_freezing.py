"""Frozen parameters: unfreeze masks updates in a single graph, and with_trainable compiles a graph for each phase."""

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


def scheduled():
    return fx.optim.adam(fx.schedules.linear(0.1, 0.0, transition_steps=100))


def counted_in_a_dict():
    def init(params):
        return {"count": torch.tensor(0), "mu": tree.zeros_like(params)}

    def update(updates, state, params=None):
        mu = tree.map(lambda old, new: 0.9 * old + 0.1 * new, state["mu"], updates)
        count = state["count"] + 1
        return tree.map(lambda value: -0.1 * value / (1 - 0.9**count), mu), {"count": count, "mu": mu}

    return fx.optim.GradientTransformation(init, update)


RATE = fx.schedules.linear(0.01, 0.001, transition_steps=10)


def both(kind, **options):
    return lambda params: kind(params, lr=0.01, **options), fx.optim.from_torch(kind, lr=exact_rate, **options)


def exact_rate(step):
    return 0.01 * (1 - 0.9 * step.double().clamp(max=10) / 10)


THAWED = {
    "Adam": both(torch.optim.Adam, amsgrad=True),
    "AdamW": both(torch.optim.AdamW),
    "Adamax": both(torch.optim.Adamax),
    "NAdam": both(torch.optim.NAdam),
    "RAdam": both(torch.optim.RAdam),
    "ASGD": both(torch.optim.ASGD, lambd=0.1, t0=2),
    "Adagrad": both(torch.optim.Adagrad, lr_decay=0.1),
    "Adafactor": both(torch.optim.Adafactor),
    "RMSprop": both(torch.optim.RMSprop, momentum=0.9),
    "SGD": both(torch.optim.SGD, momentum=0.9, dampening=0.3),
}
COMPOSED = {
    "chain": lambda: fx.optim.chain(fx.optim.clip_by_global_norm(1.0), fx.optim.adamw(RATE)),
    "injected": lambda: fx.optim.inject_hyperparams(fx.optim.adam)(learning_rate=0.1),
    "lamb": lambda: fx.optim.lamb(0.1),
    "adafactor": lambda: fx.optim.adafactor(0.1),
    "muon": lambda: fx.optim.muon(0.1),
    "rmsprop, corrected": lambda: fx.optim.rmsprop(0.1, bias_correction=True),
    "masked": lambda: fx.optim.masked(fx.optim.adam(0.1), lambda path, leaf: True),
    "lookahead": lambda: fx.optim.lookahead(fx.optim.adam(0.1)),
    "if finite": lambda: fx.optim.apply_if_finite(fx.optim.adam(0.1), max_consecutive=2),
    "lion": lambda: fx.optim.lion(0.1),
    "accumulated": lambda: fx.optim.every_k(fx.optim.adam(0.1), 1),
}


class TestUnfreeze:
    @pytest.mark.parametrize("name", ["Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adafactor"])
    def test_unfrozen_parameters_match_torch_optim(self, name):
        frozen, options = 2000, {"lr": 0.01}
        make = getattr(torch.optim, name)
        tx = fx.optim.unfreeze(fx.optim.from_torch(make, **options), {"head": 0, "body": frozen})
        start = {"body": torch.ones(3, dtype=torch.float64), "head": torch.ones(3, dtype=torch.float64)}
        grads, params, state = tree.clone(start), tree.clone(start), tx.init(start)
        theirs = torch.ones(3, dtype=torch.float64, requires_grad=True)
        optimizer = make([theirs], **options)
        for step in range(frozen + 10):
            updates, state = tx.update(grads, state, params)
            params = fx.optim.apply_updates(params, updates)
            if step < frozen:
                assert not updates["body"].any()
                continue
            theirs.grad = grads["body"].clone()
            optimizer.step()
            torch.testing.assert_close(params["body"], theirs.detach(), rtol=1e-6, atol=0)


class TestUnfreezePhases:
    @pytest.mark.parametrize("compiled", [False, True])
    def test_parameters_change_only_in_their_phase(self, compiled):
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

    def test_optimizer_state_starts_with_first_unfrozen_step(self):
        tx = fx.optim.unfreeze(fx.optim.adam(0.1), {"*": 2})
        state, step = fx.init(two_layers(), tx), fx.train_step(loss_fn, tx)
        for _ in range(2):
            state, _ = step(state, BATCH)
        fresh = fx.init(two_layers(), fx.optim.adam(0.1))
        begun, _ = fx.train_step(loss_fn, fx.optim.adam(0.1))(fresh, BATCH)
        state, _ = step(state, BATCH)
        testing.assert_equal(state.params, begun.params, "the first step that moves it")

    @pytest.mark.parametrize("phase", [-1, (3, 3), (2, 1), "soon", True, 1.5])
    def test_invalid_phase_is_rejected(self, phase):
        with pytest.raises(
            ValueError, match=r"expected phases\['a\*'\] to be a first step, \(first, end\) .*, or None"
        ):
            fx.optim.unfreeze(fx.optim.sgd(0.1), {"a*": phase})

    def test_parameter_without_phase_is_rejected(self):
        with pytest.raises(
            ValueError, match=r"expected phases to have a pattern for '0\.bias', got '2\.\*'\. Add a pattern"
        ):
            fx.init(two_layers(), fx.optim.unfreeze(fx.optim.sgd(0.1), {"2.*": 0}))


class TestWithTrainable:
    def test_trainable_selection_limits_updates_and_optimizer_state(self):
        tx = fx.optim.rmsprop(0.1)
        step = fx.compile(fx.train_step(loss_fn, tx), on_recompile="allow")
        state = fx.with_trainable(fx.init(two_layers(), tx), tx, "2.*")
        assert len(tree.leaves(state.opt_state)) < len(tree.leaves(fx.init(two_layers(), tx).opt_state))
        after, _ = step(state, BATCH)
        assert moved(state, after) == ["2.bias", "2.weight"]
        thawed = fx.with_trainable(after, tx, "*")
        assert moved(thawed, step(thawed, BATCH)[0]) == ["0.bias", "0.weight", "2.bias", "2.weight"]
        assert step.graphs == 2

    def test_later_parameter_is_rejected_if_count_is_shared(self):
        tx = counted_in_a_dict()
        head = fx.with_trainable(fx.init(two_layers(), tx), tx, "2.*")
        fx.with_trainable(head, tx, "*")  # before the first update
        state, _ = fx.train_step(loss_fn, tx)(head, BATCH)
        fx.with_trainable(state, tx, "2.weight")  # a smaller selection keeps its optimizer state
        with pytest.raises(ValueError, match=r"got '0\.\w+' after 1 updates, .*fxtrain\.optim\.start_counts"):
            fx.with_trainable(state, tx, "*")
        again = fx.with_trainable(state.replace(opt_state=()), tx, "*")
        testing.assert_equal(again.opt_state, tx.init(state.params), "the restarted optimizer")

    @pytest.mark.parametrize("name", THAWED)
    def test_thawed_parameters_match_torch_optim(self, name, double):
        make, tx = THAWED[name]
        head, body = two_layers().double(), two_layers().double()
        state = fx.with_trainable(fx.init(head, tx), tx, "2.*")
        body[0].requires_grad_(False)
        optimizer = make(body.parameters())
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 10)
        step = fx.train_step(loss_fn, tx)
        for index in range(8):
            if index == 3:
                body[0].requires_grad_(True)
                state = fx.with_trainable(state, tx, "*")
            optimizer.zero_grad()
            loss_fn(body, BATCH.double()).backward()
            optimizer.step()
            scheduler.step()
            state, _ = step(state, BATCH.double())
        for path, value in body.named_parameters():
            torch.testing.assert_close(state.params[path], value.detach(), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("name", COMPOSED)
    def test_composed_transformations_update_thawed_parameters(self, name):
        tx = COMPOSED[name]()
        state, step = fx.with_trainable(fx.init(two_layers(), tx), tx, "2.*"), fx.train_step(loss_fn, tx)
        for _ in range(4):
            state, _ = step(state, BATCH)
        after, _ = step(fx.with_trainable(state, tx, "*"), BATCH)
        assert moved(state, after) == ["0.bias", "0.weight", "2.bias", "2.weight"]

    def test_parameter_thawed_during_accumulation_gets_mean_gradient(self):
        tx = fx.optim.every_k(fx.optim.sgd(0.1), 2)
        step = fx.train_step(loss_fn, tx)
        state, _ = step(fx.with_trainable(fx.init(two_layers(), tx), tx, "2.*"), BATCH)
        after, _ = step(fx.with_trainable(state, tx, "*"), BATCH)
        grads = fx.gradients(loss_fn)(fx.with_trainable(state, tx, "*"), BATCH).grads
        expected = state.params["0.weight"] - 0.1 * grads["0.weight"] / 2  # the mean counts both microbatches
        torch.testing.assert_close(after.params["0.weight"], expected)

    def test_with_trainable_keeps_optimizer_state_of_trainable_parameters(self):
        tx = fx.optim.sgd(0.1, momentum=0.9)
        state, _ = fx.train_step(loss_fn, tx)(fx.init(two_layers(), tx), BATCH)
        narrowed = fx.with_trainable(state, tx, ["2.*", "0.bias"])
        old = dict(zip(tree.paths(state.opt_state), tree.leaves(state.opt_state), strict=True))
        new = dict(zip(tree.paths(narrowed.opt_state), tree.leaves(narrowed.opt_state), strict=True))
        assert new
        assert all(leaf is old[path] for path, leaf in new.items())

    def test_fit_trains_only_selected_parameters(self):
        tx = problem.transform()
        state = fx.with_trainable(problem.start(), tx, "4.*")
        result = fx.fit(state, problem.step(), problem.data(), epochs=1)
        assert moved(state, result.state) == ["4.bias", "4.weight"]

    def test_pattern_without_match_is_rejected(self):
        tx = fx.optim.sgd(0.1)
        with pytest.raises(
            ValueError,
            match=r"expected 'head' to match a parameter that can be trained, got no match among 0\.bias, 0\.weight",
        ):
            fx.with_trainable(fx.init(two_layers(), tx), tx, "head")


class TestRecomputeStatistics:
    def test_recomputed_statistics_are_means_over_batches(self):
        state = problem.start()
        after = fx.recompute_statistics(state, problem.data(), lambda model, batch: model(batch["x"]))
        inside = [batch["x"] @ state.params["0.weight"].T + state.params["0.bias"] for batch in problem.data()]
        wanted = torch.stack([x.mean(0) for x in inside]).mean(0)
        torch.testing.assert_close(after.buffers["1.running_mean"], wanted)
        variance = torch.stack([x.var(0) for x in inside]).mean(0)
        torch.testing.assert_close(after.buffers["1.running_var"], variance)
        testing.assert_equal(after.params, state.params, "parameters")
        assert {m.momentum for m in state.model.named_modules(train=True).values() if hasattr(m, "momentum")} == {0.1}

    def test_empty_data_is_rejected(self):
        with pytest.raises(ValueError, match="at least one batch, got none"):
            fx.recompute_statistics(problem.start(), [])
