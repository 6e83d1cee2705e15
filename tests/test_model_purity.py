"""Calls of the functional model have no side effects, and take modes and random samples from the state."""

import problem
import pytest
import torch
import torch.nn.functional as F
from example_modules import close, example
from torch import nn

import fxtrain as fx
from fxtrain import rng, testing, tree


class TestModes:
    def test_module_in_eval_mode_trains_in_train_mode(self):
        module = problem.module().eval()
        found = fx.gradients(problem.loss_fn)(fx.init(module), problem.data()[0])
        assert int(found.buffers["1.num_batches_tracked"]) == 1
        assert not module.training

    def test_submodule_in_eval_mode_stays_in_eval_mode(self):
        module = problem.module()
        module[1].eval()
        found = fx.gradients(problem.loss_fn)(fx.init(module), problem.data()[0])
        assert int(found.buffers["1.num_batches_tracked"]) == 0

    def test_dropout_follows_the_mode_of_the_view(self):
        x = torch.ones(100)
        state = fx.init(nn.Dropout(0.5))
        assert torch.equal(fx.view(state)(x), x)
        assert set(fx.view(state, train=True)(x).tolist()) == {0.0, 2.0}
        assert torch.equal(fx.eval_step(lambda model, batch: model(batch).sum())(state, x).metrics["loss"], x.sum())


class TestPurity:
    def test_buffers_are_threaded_and_input_state_is_unchanged(self):
        module, tx = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1)), fx.optim.sgd(0.1)
        state, step = fx.init(module, tx), fx.train_step(problem.loss_fn, tx, accumulate=2)
        first, second = problem.data(2)
        before = state.copy()
        after, _ = step(step(state, first)[0], second)
        testing.assert_equal(state, before, "the state that the step was given")
        for part in (*first["x"].chunk(2), *second["x"].chunk(2)):
            module(part)
        close(after.buffers, dict(module.named_buffers()))

    def test_attributes_set_by_a_call_are_discarded(self):
        class Stores(nn.Linear):
            def forward(self, x):
                self.last = super().forward(x)
                return self.last

        def loss_fn(model, batch):
            return (model(batch) + model.last).sum()

        state, tx = fx.init(Stores(2, 1), fx.optim.sgd(0.0)), fx.optim.sgd(0.0)
        step = fx.train_step(loss_fn, tx)
        first, second = step(state, torch.ones(3, 2)), step(state, torch.ones(3, 2))
        testing.assert_equal(first, second, "the second call")
        with pytest.raises(AttributeError, match="last"):
            fx.view(state).last  # noqa: B018

    @pytest.mark.parametrize("write", [lambda p: p.detach().zero_(), lambda p: p.data.zero_()])
    def test_writing_into_a_parameter_is_rejected(self, write):
        def writes(model, batch):
            write(model.weight)
            return model(batch).sum()

        tx = fx.optim.sgd(0.1)
        with pytest.raises(RuntimeError, match=r"got an in-place write \(zero_\) to model\.weight"):
            fx.train_step(writes, tx)(fx.init(nn.Linear(1, 1), tx), torch.ones(1, 1))

    def test_model_is_usable_after_an_error(self):
        module, batch = example("sequence")
        state = fx.init(module)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            fx.view(state)(torch.ones(1, 3))
        close(fx.view(state)(batch), module(batch).detach())


class TestRandomness:
    """A seed determines the run in every mode, independently of the global generator."""

    def test_random_samples_match_eager_compiled_and_vmapped(self):
        def loss_fn(model, batch):
            x = model(batch) + torch.randn_like(batch) + torch.rand(batch.shape[0], 1) + torch.normal(0.0, 1.0, (4,))
            return F.dropout(x, 0.3).square().mean()

        first = fx.init(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), fx.optim.sgd(0.1))
        states = [first, first.replace(seed=first.seed + 1)]
        step, batch = fx.train_step(loss_fn, fx.optim.sgd(0.1)), torch.ones(8, 4)
        compiled = fx.compile(step, backend="aot_eager")
        with rng.untouched():
            alone = [step(state, batch) for state in states]
            close([compiled(state, batch)[0].params for state in states], [state.params for state, _ in alone])
            together, output = torch.vmap(step, (0, None))(
                tree.map(lambda *leaves: torch.stack(leaves), *states), batch
            )
        close(output.metrics["loss"], torch.stack([output.metrics["loss"] for _, output in alone]))
        for index, (state, _) in enumerate(alone):
            close(tree.map(lambda leaf, index=index: leaf[index], together.params), state.params)
        assert alone[0][1].metrics["loss"] != alone[1][1].metrics["loss"]

    def test_random_samples_depend_only_on_step_microbatch_and_seed(self):
        model, batch = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), torch.ones(32, 2)
        state = fx.init(model)
        find = fx.gradients(lambda model, batch: model(batch).square().mean())
        losses = {
            "first": find(state, batch).loss,
            "step": find(state.replace(step=state.step + 1), batch).loss,
            "microbatch": find(state, batch, 1).loss,
            "seed": find(state.replace(seed=state.seed + 1), batch).loss,
        }
        assert len({float(loss) for loss in losses.values()}) == 4
        torch.manual_seed(99)
        assert torch.equal(find(state, batch).loss, losses["first"])

    def test_microbatches_get_different_random_samples(self):
        losses, tx = [], fx.optim.sgd(0.1)

        def watch(state, event: fx.Microbatch):
            losses.append(float(event.loss))
            return state, fx.Control()

        step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx, accumulate=3, callbacks=watch)
        step(fx.init(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), tx), torch.ones(96, 2))
        assert len(set(losses)) == 3

    def test_unsupported_random_operation_is_named(self):
        state = fx.init(nn.Linear(1, 1))
        with pytest.raises(NotImplementedError, match="poisson"):
            fx.gradients(lambda model, batch: torch.poisson(batch).mean())(state, torch.ones(2))
