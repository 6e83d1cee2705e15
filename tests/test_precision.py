"""Precision policies: dtypes of parameters, computation and outputs, and dynamic loss scaling."""

import problem
import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import fxtrain as fx
from fxtrain import testing, tree
from fxtrain.precision import LossScale, dynamic_loss_scale, policy_of

SGD = fx.optim.sgd(0.1, momentum=0.9)


def module(*parts):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), *(parts or [nn.LayerNorm(8)]), nn.Tanh(), nn.Linear(8, 1))


def start(precision, loss_fn=problem.loss_fn, tx=SGD, **options):
    """Returns a state with attached slots, and its step."""
    step = fx.train_step(loss_fn, tx, precision=precision, **options)
    return fx.attach(fx.init(module(), tx), step), step


def scaled(**options):
    return fx.Policy(compute=torch.float16, loss_scale=LossScale(**options))


BATCH = problem.data()[0]


def close(got, wanted):
    torch.testing.assert_close(tree.leaves(got), tree.leaves(wanted), rtol=1e-3, atol=1e-4)


class TestPolicy:
    def test_names_map_to_policies(self):
        assert policy_of("bf16") == fx.Policy(compute=torch.bfloat16)
        assert policy_of("fp16") == fx.Policy(compute=torch.float16, loss_scale=LossScale())
        assert policy_of("fp32") == fx.Policy(param=torch.float32, output=torch.float32)
        assert policy_of(None) == fx.Policy(param=None, output=None)

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (
                lambda: policy_of("half"),
                ValueError,
                "expected precision to be 'fp32', 'bf16', 'fp16', None or an fxtrain.Policy, got 'half'",
            ),
            (
                lambda: fx.Policy(compute="bf16"),
                TypeError,
                r"expected compute to be a floating-point dtype .*, got 'bf16'",
            ),
            (lambda: fx.Policy(output=torch.int64), TypeError, r"expected output .*, got torch\.int64"),
            (
                lambda: fx.Policy(param=torch.bfloat16, compute=torch.float32),
                ValueError,
                "expected compute to be torch.bfloat16 or torch.float16",
            ),
            (lambda: fx.Policy(param=torch.float64, compute=torch.bfloat16), ValueError, "param to be torch.float32"),
            (
                lambda: fx.Policy(param=torch.float16, loss_scale=LossScale()),
                ValueError,
                "expected param to be torch.float32 with a loss scale, got torch.float16",
            ),
            (lambda: LossScale(factor=1.0), ValueError, r"expected factor > 1, .*got .*factor=1\.0"),
            (lambda: LossScale(period=0), ValueError, "period=0"),
            (lambda: LossScale(initial=0.5), ValueError, r"floor <= initial, .*initial=0\.5"),
        ],
    )
    def test_invalid_policies_are_rejected(self, make, error, message):
        with pytest.raises(error, match=message):
            make()

    @pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
    def test_parameters_of_wrong_dtype_are_rejected_by_path(self, precision):
        state, step = start(precision)
        state = state.replace(params={**state.params, "0.weight": state.params["0.weight"].double()})
        with pytest.raises(
            TypeError, match=r"expected state\.params\['0\.weight'\] to be torch\.float32, .*, got torch\.float64"
        ):
            step(state, BATCH)


class TestCompute:
    @pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
    def test_matmuls_use_compute_dtype_and_state_is_float32(self, precision):
        seen = {}

        def loss_fn(model, batch):
            product = model[0](batch["x"])
            seen.update(product=product.dtype, norm=model[1](product).dtype)
            y = model(batch["x"])
            return (y - batch["y"]).square().mean(), {"size": y.mean()}

        def watch(state, event: fx.Gradients):
            seen["grads"] = {leaf.dtype for leaf in tree.leaves(event.grads)}
            return state, fx.Control()

        state, step = start(precision, loss_fn, callbacks=watch)
        new, output = step(state, BATCH)
        compute = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        assert seen == {"product": compute, "norm": torch.float32, "grads": {torch.float32}}
        kept = tree.leaves((new.params, new.opt_state))
        assert {leaf.dtype for leaf in kept if leaf.is_floating_point()} == {torch.float32}
        assert {name: value.dtype for name, value in output.metrics.items()} == {
            "loss": torch.float32,
            "size": torch.float32,
            "learning_rate": torch.float32,
        }
        assert not torch.equal(new.params["0.weight"], state.params["0.weight"])

    def test_gradients_match_autocast(self):
        reference = module(nn.Identity())  # without a norm, which autocast on CPU would run in half precision
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, _ = problem.loss_fn(reference, BATCH)
        loss.backward()
        found = fx.gradients(problem.loss_fn, precision="bf16")(fx.init(reference), BATCH)
        torch.testing.assert_close(found.grads, {name: p.grad for name, p in reference.named_parameters()})
        exact = fx.gradients(problem.loss_fn)(fx.init(reference), BATCH).grads
        assert not torch.equal(found.grads["0.weight"], exact["0.weight"])
        torch.testing.assert_close(found.grads, exact, rtol=0.05, atol=0.02)

    @pytest.mark.parametrize("part", [nn.LayerNorm(8), nn.BatchNorm1d(8), nn.GroupNorm(2, 8), nn.Softmax(-1)], ids=repr)
    def test_vmapped_step_matches_single_step(self, part):
        step = fx.train_step(problem.loss_fn, SGD, precision="bf16")
        state = fx.init(module(part), SGD)
        wanted = step(state, BATCH)
        got = torch.vmap(step, (0, None))(tree.map(lambda leaf: torch.stack([leaf] * 2), state), BATCH)
        for index in range(2):
            one = tree.map(lambda leaf, index=index: leaf[index], got)
            torch.testing.assert_close(tree.leaves(one), tree.leaves(wanted), rtol=0.02, atol=2e-3)

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_compiled_step_matches_eager_and_casts_in_the_graph(self, precision):
        state, step = start(precision)
        found = set()

        def read(graph, inputs):
            products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
            found.update(node.meta["val"].dtype for node in graph.graph.nodes if node.target in products)
            return graph

        close(fx.compile(step, backend=aot_autograd(fw_compiler=read))(state, BATCH), step(state, BATCH))
        assert found == {policy_of(precision).compute}

    def test_compiled_vmapped_step_matches_eager(self):
        state, step = start("fp16")
        states = tree.map(lambda leaf: torch.stack([leaf] * 2), state)

        def batched(states, batch):
            return torch.vmap(step, (0, None))(states, batch)

        close(torch.compile(batched, fullgraph=True, backend="eager")(states, BATCH), batched(states, BATCH))

    def test_eval_step_uses_compute_dtype(self):
        step = fx.eval_step(
            lambda model, b: {"half": torch.tensor(model(b["x"]).dtype == torch.bfloat16)}, precision="bf16"
        )
        assert bool(step(fx.init(module()), BATCH).metrics["half"])

    def test_parameters_may_be_bfloat16(self):
        policy = fx.Policy(param=torch.bfloat16, output=torch.float32)
        step = fx.train_step(lambda model, batch: model(batch).square().mean(), SGD, precision=policy)
        state, output = step(fx.init(module(), SGD, dtype=torch.bfloat16), BATCH["x"].bfloat16())
        assert {leaf.dtype for leaf in tree.leaves(state.params)} == {torch.bfloat16}
        assert output.metrics["loss"].dtype == torch.float32

    def test_double_model_stays_double_without_a_policy(self):
        state = fx.init(module().double(), SGD)
        batch = tree.map(torch.Tensor.double, BATCH)
        new, output = fx.train_step(problem.loss_fn, SGD)(state, batch)
        assert {leaf.dtype for leaf in tree.leaves((new.params, dict(output.metrics)))} == {torch.float64}


class TestLossScale:
    def test_tiny_gradients_survive_float16(self):
        def tiny(model, batch):
            return model(batch["x"]).mean() * 1e-8

        state, _ = start("fp16", tiny)
        lost = fx.gradients(tiny, precision=fx.Policy(compute=torch.float16))(state, BATCH).grads
        found = fx.gradients(tiny, precision="fp16")(state, BATCH).grads
        exact = fx.gradients(tiny)(state, BATCH).grads
        assert float(lost["0.weight"].norm()) == 0.0
        torch.testing.assert_close(found, exact, rtol=0.01, atol=1e-10)

    def test_callbacks_see_unscaled_gradients(self):
        seen = []

        def watch(state, event: fx.Microbatch | fx.Gradients):
            seen.append(event.grads)
            return state, fx.Control()

        state, step = start("fp16", callbacks=watch, accumulate=2)
        step(state, BATCH)
        exact = fx.gradients(problem.loss_fn)(state, BATCH).grads
        assert len(seen) == 3
        torch.testing.assert_close(seen[2], exact, rtol=0.01, atol=1e-3)
        torch.testing.assert_close(tree.map(lambda a, b: (a + b) / 2, *seen[:2]), seen[2])

    @pytest.mark.parametrize("compiled", [False, True])
    def test_scale_halves_on_overflow_and_doubles_after_period(self, compiled):
        state, step = start(scaled(initial=2.0**22, period=2))
        step = fx.compile(step, backend="eager") if compiled else step
        scales, moved = [], []
        for _ in range(12):
            before = state
            state, output = step(state, BATCH)
            scales.append(float(state.slots["loss_scale"].scale.log2()))
            moved.append(not torch.equal(state.params["0.weight"], before.params["0.weight"]))
            if not moved[-1]:
                for name in ("params", "opt_state", "buffers"):
                    testing.assert_equal(getattr(state, name), getattr(before, name), name)
                assert output.control.reasons("skip_update") == ["gradients overflowed at this loss scale"]
        assert int(state.step) == 12
        assert moved[0] is False
        last = 22.0
        calm = 0
        for scale, good in zip(scales, moved, strict=True):
            calm = calm + 1 if good else 0
            expected = last - 1 if not good else last + 1 if calm % 2 == 0 else last
            assert scale == expected
            last = scale
        assert any(moved)
        assert all(leaf.isfinite().all() for leaf in tree.leaves(state.params))

    def test_scale_stays_between_floor_and_float32_maximum(self):
        handler = dynamic_loss_scale(LossScale(initial=2.0**127, period=1, floor=2.0**126))
        state = fx.attach(fx.init(torch.tensor(1.0)), handler)

        def event(value):
            grads = torch.tensor(value)
            return fx.Gradients(step=state.step + 1, loss=grads, metrics={"loss": grads}, grads=grads)

        for value, scale in ((1.0, 127), (float("nan"), 126), (float("inf"), 126), (1.0, 127), (1.0, 127)):
            state, control = handler(state, event(value))
            assert float(state.slots["loss_scale"].scale.log2()) == scale
            assert bool(control.any("skip_update")) == (value != 1.0)

    def test_vmapped_runs_have_separate_scales(self):
        state, step = start(scaled(initial=2.0**4, period=100))
        states = tree.map(lambda leaf: torch.stack([leaf] * 2), state)
        memory = states.slots["loss_scale"]
        states = states.with_slot("loss_scale", memory._replace(scale=torch.tensor([2.0**4, 2.0**30])))
        states, _ = torch.vmap(step, (0, None))(states, BATCH)
        assert states.slots["loss_scale"].scale.log2().tolist() == [4.0, 29.0]

    def test_scale_is_saved_and_resumed(self, tmp_path):
        def run(steps, **options):
            _, step = start(scaled(initial=2.0**22, period=2))
            return fx.fit(fx.init(module(), SGD), step, [BATCH], steps=steps, **options).state

        whole = run(10)
        checkpoints = fx.checkpointer(tmp_path)
        run(4, checkpointer=checkpoints)
        testing.assert_equal(run(10, checkpointer=checkpoints, resume=True), whole, "resumed")
        assert float(whole.slots["loss_scale"].scale) < 2.0**22

    def test_state_without_loss_scale_is_rejected(self):
        step = fx.gradients(problem.loss_fn, precision="fp16")
        with pytest.raises(ValueError, match=r"in the slot 'loss_scale', got a state without it\. .* callbacks="):
            step(fx.init(module(), SGD), BATCH)

    def test_loss_scale_combines_with_nan_guard(self):
        state, step = start(scaled(initial=2.0**22), callbacks=fx.callbacks.nan_guard(patience=100))
        state, output = step(state, BATCH)
        assert set(output.control.reasons("skip_update")) == {
            "gradients overflowed at this loss scale",
            "loss or gradients are not finite",
        }
