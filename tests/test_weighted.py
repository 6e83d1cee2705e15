"""Weighted losses: means over unequal microbatches, batches and steps equal the mean over all items."""

import problem
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxtrain as fx
from fxtrain import metrics, testing, tree

VOCABULARY = 7


def module():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(VOCABULARY, 6), nn.Tanh(), nn.Linear(6, VOCABULARY)).double()


def texts(lengths, size=6, seed=0):
    """Returns a batch of texts, with labels of -100 past the length of each text."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (len(lengths), size), generator=generator)
    labels = torch.randint(VOCABULARY, (len(lengths), size), generator=generator)
    return {"ids": ids, "labels": labels.masked_fill(torch.arange(size) >= torch.tensor(lengths)[:, None], -100)}


def loss_fn(model, batch):
    logits, labels = model(batch["ids"]), batch["labels"]
    kept = labels != -100
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)  # NaN if no label is kept
    right = ((logits.argmax(-1) == labels) & kept).sum(dtype=loss.dtype) / kept.sum()
    return fx.weighted(loss, kept.sum()), {"accuracy": right, "tokens": metrics.Sum.from_model_output(kept)}


def masked_squares(model, batch):
    error = (model["w"] - batch["x"]).square().mean(-1) * batch["mask"]
    return fx.weighted(error.sum() / batch["mask"].sum(), batch["mask"].sum())


def train(tx=None, loss_fn=loss_fn, **options):
    tx = tx or fx.optim.adamw(1e-2)
    return fx.init(module(), tx), fx.train_step(loss_fn, tx, **options)


UNEQUAL = texts([6, 5, 1, 1, 3, 2, 1, 6])
PADDED = texts([6, 5, 0, 0, 3, 2, 0, 1])
EMPTY = texts([0, 0, 0, 0])


def close(got, wanted):
    torch.testing.assert_close(tree.leaves(got), tree.leaves(wanted), rtol=1e-12, atol=1e-12)


class TestAccumulation:
    @pytest.mark.parametrize("batch", [UNEQUAL, PADDED], ids=["unequal", "with empty microbatches"])
    @pytest.mark.parametrize("accumulate", [2, 4, 8])
    def test_equals_the_whole_batch(self, batch, accumulate):
        state, whole = train()
        _, parts = train(accumulate=accumulate)
        (after, told), (wanted, expected) = parts(state, batch), whole(state, batch)
        close(after.params, wanted.params)
        close(after.opt_state, wanted.opt_state)
        close(metrics.compute(told.metrics), metrics.compute(expected.metrics))
        close(told.weight, expected.weight)
        assert int(told.weight) == int((batch["labels"] != -100).sum())

    def test_unweighted_mean_of_means_differs(self):
        state, _ = train()
        _, unweighted = train(loss_fn=lambda model, batch: loss_fn(model, batch)[0].loss, accumulate=4)
        _, weighted = train(accumulate=4)
        losses = [step(state, UNEQUAL)[1].metrics["loss"] for step in (unweighted, weighted)]
        assert abs(float(losses[0] - losses[1])) > 1e-3

    def test_compiled_equals_the_whole_batch(self):
        tx, w = fx.optim.sgd(0.1), torch.tensor([1.0, 2.0], dtype=torch.float64)
        state = fx.init({"w": w}, tx)
        whole, parts = fx.train_step(masked_squares, tx), fx.train_step(masked_squares, tx, accumulate=4)
        compiled = fx.compile(parts)
        for kept in ([1, 1, 1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1, 1], [0] * 8):
            batch = {"x": torch.randn(8, 2, dtype=torch.float64), "mask": torch.tensor(kept, dtype=torch.float64)}
            (after, told), (wanted, expected) = compiled(state, batch), whole(state, batch)
            close(after.params, wanted.params)
            close((told.metrics, told.weight), (expected.metrics, expected.weight))

    def test_dynamo_equals_eager(self):
        tx = fx.optim.sgd(0.1)
        state, parts = fx.init({"w": torch.ones(2)}, tx), fx.train_step(masked_squares, tx, accumulate=2)
        batch = {"x": torch.randn(4, 2), "mask": torch.tensor([1.0, 1.0, 1.0, 0.0])}
        compiled = torch.compile(parts, fullgraph=True, backend="eager")
        torch.testing.assert_close(tree.leaves(compiled(state, batch)), tree.leaves(parts(state, batch)))

    def test_vmapped_equals_single_states(self):
        state, step = train(accumulate=4)
        states = tree.map(lambda leaf: torch.stack([leaf] * 2), state)
        batches = tree.map(lambda a, b: torch.stack([a, b]), UNEQUAL, PADDED)
        got = torch.vmap(step)(states, batches)
        for index, batch in enumerate((UNEQUAL, PADDED)):
            close(tree.map(lambda leaf, index=index: leaf[index], got), step(state, batch))

    @pytest.mark.parametrize("accumulate", [1, 4])
    def test_total_weight_of_zero_gives_zeros(self, accumulate):
        state, step = train(fx.optim.sgd(0.1), accumulate=accumulate)
        after, told = step(state, EMPTY)
        testing.assert_equal(after.params, state.params, "parameters")
        assert float(told.metrics["loss"]) == float(told.metrics["accuracy"]) == float(told.weight) == 0.0

    def test_half_precision_gradients_keep_unequal_weights(self):
        state, parts = train(fx.optim.sgd(1.0), accumulate=4)
        _, whole = train(fx.optim.sgd(1.0))
        for dtype, tolerance in ((torch.bfloat16, 0.02), (torch.float16, 0.003)):
            half = state.replace(params=tree.map(lambda leaf, dtype=dtype: leaf.to(dtype), state.params))
            moved = [step(half, UNEQUAL)[0].params for step in (parts, whole)]
            assert {leaf.dtype for leaf in tree.leaves(moved)} == {dtype}
            torch.testing.assert_close(*moved, rtol=tolerance, atol=tolerance)

    def test_loss_scaling_does_not_change_the_update(self):
        state = fx.init(module().float(), fx.optim.sgd(0.1))
        policy = fx.Policy(compute=torch.float16, loss_scale=fx.precision.LossScale())
        steps = [fx.train_step(loss_fn, fx.optim.sgd(0.1), accumulate=4, precision=p) for p in (policy, None)]
        moved = [step(fx.attach(state, step), PADDED)[0].params for step in steps]
        torch.testing.assert_close(*moved, rtol=1e-2, atol=1e-3)

    def test_events_carry_weights(self):
        seen = []

        def record(state, event: fx.Microbatch | fx.Gradients | fx.Updated):
            seen.append(int(event.weight))
            return state, fx.Control()

        state, step = train(accumulate=4, callbacks=record)
        step(state, PADDED)
        assert seen == [11, 0, 5, 1, 17, 17]

    def test_weights_on_only_some_microbatches_are_refused(self):
        def sometimes(model, batch):
            loss = model(batch["ids"]).mean()
            return fx.weighted(loss, 2) if bool((batch["labels"] == -100).any()) else loss

        state, step = train(loss_fn=sometimes, accumulate=2)
        with pytest.raises(ValueError, match="all microbatches or none to have a weight"):
            step(state, texts([6, 3]))


class TestMeanGradient:
    def test_weighted_microbatches_equal_the_whole_batch(self):
        state, _ = train()
        find = fx.gradients(loss_fn)
        parts = fx.step.microbatches(UNEQUAL, 4)
        got = fx.step.mean_gradient(find(state, part, index) for index, part in enumerate(parts))
        wanted = find(state, UNEQUAL)
        close((got.loss, got.grads, got.weight), (wanted.loss, wanted.grads, wanted.weight))

    def test_unweighted_microbatches_count_equally(self):
        state = fx.init(problem.module().double())
        find, batch = fx.gradients(problem.loss_fn), tree.map(torch.Tensor.double, problem.data()[0])
        parts = [find(state, part) for part in fx.step.microbatches(batch, 2)]
        got = fx.step.mean_gradient(parts)
        close(got.grads, tree.map(lambda a, b: (a + b) / 2, parts[0].grads, parts[1].grads))
        assert got.weight is None
        with pytest.raises(ValueError, match="at least one microbatch"):
            fx.step.mean_gradient([])


class TestMeans:
    def test_evaluation_is_the_mean_over_all_tokens(self):
        state, _ = train()
        data = [texts([6, 6], seed=1), texts([1, 0], seed=2), EMPTY]
        whole = tree.map(lambda *parts: torch.cat(parts), *data)
        step = fx.eval_step(loss_fn)
        got, wanted = fx.evaluate(state, step, data), fx.evaluate(state, step, [whole])
        assert got == pytest.approx(wanted, rel=1e-12)
        assert wanted["tokens"] == 13

    def test_fit_evaluation_and_epoch_mean_are_weighted(self):
        mean = fx.callbacks.epoch_mean("loss", "accuracy")
        state, step = train(fx.optim.sgd(0.0), callbacks=mean)
        data = [texts([6, 6], seed=1), texts([1, 0], seed=2), texts([0, 0], seed=3)]
        result = fx.fit(state, step, data, callbacks=mean, eval_step=fx.eval_step(loss_fn), eval_data=data, epochs=1)
        wanted = fx.evaluate(state, fx.eval_step(loss_fn), data)
        last = {name: series.values[-1] for name, series in result.history.items()}
        for name in ("loss", "accuracy"):
            assert last[f"eval/{name}"] == pytest.approx(wanted[name], rel=1e-12)
            assert last[f"epoch/{name}"] == pytest.approx(wanted[name], rel=1e-12)

    def test_padded_batch_is_weighted_by_its_examples(self):
        x = torch.arange(6, dtype=torch.float64)[:, None]

        data = fx.data.batches({"x": x}, 4, drop_last="pad", shuffle=False)
        tx = fx.optim.sgd(0.1)
        state = fx.init({"w": torch.tensor(1.0, dtype=torch.float64)}, tx)
        step, parts = fx.train_step(masked_squares, tx), fx.train_step(masked_squares, tx, accumulate=2)
        close(parts(state, data[1]), step(state, data[1]))
        assert fx.evaluate(state, fx.eval_step(masked_squares), data)["loss"] == pytest.approx(
            float((x - 1).square().mean())
        )

    def test_spike_guard_ignores_batches_without_weight(self):
        guard = fx.callbacks.spike_guard(warmup=2, window=4)
        state, step = train(callbacks=guard)
        state = fx.attach(state, guard)
        for batch in (UNEQUAL, EMPTY, EMPTY, UNEQUAL):
            state, _ = step(state, batch)
        memory = state.slots["spike_guard"]
        assert (int(memory.count), int(memory.spikes)) == (2, 0)
        assert float(memory.window[:2].min()) > 1.0

    def test_tapped_loss_keeps_its_weight(self):
        state, _ = train()
        tapped = fx.tap(loss_fn, "2", lambda y: y.abs().mean())
        found = fx.gradients(tapped)(state, UNEQUAL)
        assert int(found.weight) == 25
        assert "activations/2" in found.metrics


class TestWeights:
    @pytest.mark.parametrize("weight", [3, 3.0, torch.tensor(3), torch.tensor(3.0), torch.tensor(True) * 3])
    def test_scalars_and_tensors_are_accepted(self, weight):
        state, step = train(loss_fn=lambda model, batch: fx.weighted(model(batch["ids"]).mean(), weight))
        assert float(step(state, UNEQUAL)[1].weight) == 3.0

    @pytest.mark.parametrize("weight", [-1, float("nan"), float("inf")])
    def test_negative_and_non_finite_weights_are_refused(self, weight):
        with pytest.raises(ValueError, match="expected a finite weight of 0 or more, got"):
            fx.weighted(torch.tensor(1.0), weight)

    @pytest.mark.parametrize("weight", [torch.ones(2), "3", torch.tensor(1j)])
    def test_weights_of_other_types_are_refused(self, weight):
        state, step = train(loss_fn=lambda model, batch: fx.weighted(model(batch["ids"]).mean(), weight))
        with pytest.raises(TypeError, match=r"the weight that <lambda> .* gives to fxtrain\.weighted .*, got "):
            step(state, UNEQUAL)
