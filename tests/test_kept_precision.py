"""Models that break a precision policy: errors that name the module, and modules kept in float32."""

import copy

import pytest
import torch
from torch import nn

import fxtrain as fx
from fxtrain import tree

HALF = torch.bfloat16
PURE = {"param": HALF, "compute": HALF}
TX = fx.optim.sgd(0.1)
X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Writes(nn.Module):
    """Writes what a product gives, in the dtype of the policy, into a float32 tensor."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros((), dtype=HALF))
        self.seen = None

    def forward(self, x):
        y = torch.zeros(x.shape[0], 4)
        y[torch.arange(x.shape[0])] = self.linear(x)
        self.calls += 1
        return self.norm(y)


class Widens(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x.float())


def seeded(*parts):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), *(part() for part in parts), nn.Linear(4, 1))


def loss_fn(model, batch):
    return model(batch).float().square().mean()


def start(model, *, dtype=None, **options):
    return fx.init(model, TX, dtype=dtype), fx.train_step(loss_fn, TX, precision=fx.Policy(**options))


class TestErrors:
    @pytest.mark.parametrize("differentiate", ["auto", "func", "autograd"])
    @pytest.mark.parametrize("make", [fx.gradients, fx.eval_step])
    def test_module_line_dtypes_and_remedy_are_named(self, make, differentiate):
        options = {"differentiate": differentiate} if make is fx.gradients else {}
        call = make(loss_fn, precision="bf16", **options)
        with pytest.raises(RuntimeError) as caught:
            call(fx.init(seeded(Writes)), X)
        text = str(caught.value)
        assert text.startswith(
            "expected the module '1' (Writes) to compute with tensors of matching dtypes, got float32"
        )
        assert "and bfloat16 at " in text
        assert "test_kept_precision.py:" in text
        assert text.endswith("precision=fxtrain.Policy(compute=torch.bfloat16, keep=('1',)).")

    def test_modules_of_a_tree_are_named_by_their_keys(self):
        call = fx.gradients(lambda model, batch: loss_fn(model["body"], batch), precision="bf16")
        with pytest.raises(RuntimeError, match=r"expected the module 'body\.1' \(Writes\)"):
            call(fx.init({"head": nn.Linear(1, 1), "body": seeded(Writes)}), X)

    def test_parameters_in_half_precision(self):
        state, step = start(seeded(Widens), dtype=HALF, **PURE)
        with pytest.raises(RuntimeError, match=r"module '1\.inner' \(Linear\) .* float32 and bfloat16 .*'1\.inner',"):
            step(state, X.to(HALF))

    def test_without_a_policy_the_batch_is_to_be_cast(self):
        with pytest.raises(RuntimeError, match=r"module '0' \(Linear\) .*float64 and float32 .* Cast the batch"):
            fx.gradients(loss_fn)(fx.init(seeded()), X.double())

    def test_other_errors_are_left_as_they_are(self):
        with pytest.raises(RuntimeError, match=r"^mat1 and mat2 shapes cannot be multiplied"):
            fx.gradients(loss_fn, precision="bf16")(fx.init(seeded()), X[:, :2])


class TestKeep:
    @pytest.mark.parametrize("keep", ["1", ["*.linear", "1"], "*"])
    def test_kept_modules_compute_in_float32(self, keep):
        state, step = start(seeded(Writes), compute=HALF, keep=keep)
        new, output = step(state, X)
        reference = seeded(Writes)
        with torch.autocast("cpu", dtype=HALF, enabled=keep != "*"):
            y = reference[0](X)
            with torch.autocast("cpu", enabled=False):
                y = reference[1](y.float())
            loss = reference[2](y).float().square().mean()
        torch.testing.assert_close(output.metrics["loss"], loss.detach())
        assert float(new.buffers["1.calls"]) == 1.0
        assert new.buffers["1.calls"].dtype == HALF

    def test_parameters_in_half_precision(self):
        seen = []

        class Looks(Widens):
            def forward(self, x):
                seen.append((x.dtype, self.inner.weight.dtype))
                return super().forward(x)

        state, step = start(seeded(Looks, Writes), dtype=HALF, keep=("1", "2"), **PURE)
        state = state.replace(buffers={name: leaf.to(HALF) for name, leaf in state.buffers.items()})
        new, _ = step(state, X.to(HALF))
        assert set(seen) == {(torch.float32, torch.float32)}
        assert {leaf.dtype for leaf in tree.leaves((new.params, new.buffers))} == {HALF}
        assert not torch.equal(new.buffers["2.norm.running_mean"], state.buffers["2.norm.running_mean"])
        assert not torch.equal(new.params["3.bias"], state.params["3.bias"])

    @pytest.mark.parametrize("options", [{"compute": HALF}, PURE], ids=["autocast", "pure"])
    def test_compiled_and_vmapped_it_is_the_same(self, options):
        dtype = options.get("param")
        state, step = start(seeded(Widens), dtype=dtype, keep="1", **options)
        batch = X.to(dtype or torch.float32)
        want = step(state, batch)
        for compiled in (
            torch.compile(step, fullgraph=True, backend="eager"),
            fx.compile(step, backend="eager"),
        ):
            for _ in range(2):  # what Dynamo leaves on the module does not matter to the next call
                got = compiled(copy.deepcopy(state), batch)
                torch.testing.assert_close(tree.leaves(got), tree.leaves(want))
        got = step(state, batch)
        torch.testing.assert_close(tree.leaves(got), tree.leaves(want), rtol=0, atol=0)
        got = torch.vmap(step, (None, 0))(state, batch[None])
        one = tree.map(lambda leaf: leaf[0], got[0].params)
        torch.testing.assert_close(one, want[0].params, rtol=0.02, atol=2e-3)  # sums in bfloat16 in another order

    def test_patterns_that_match_nothing_are_refused(self):
        state, step = start(seeded(Widens), compute=HALF, keep="*.wo")
        with pytest.raises(
            ValueError, match=r"expected '\*\.wo' to match a module, got no match among 0, 1, 1\.inner, 2"
        ):
            step(state, X)

    def test_policy_says_what_it_keeps(self):
        assert fx.Policy(keep="a").keep == ("a",)
        assert fx.Policy(keep=["a", "b"]).described.endswith(", a b in float32")
        assert hash(fx.Policy(keep=["a"])) == hash(fx.Policy(keep="a"))


def test_models_of_bfloat16_train_as_in_a_plain_loop():
    batches = [(X * scale).to(HALF) for scale in (1.0, 0.5, 2.0)]
    model = seeded(nn.Tanh, lambda: nn.LayerNorm(4)).to(HALF)
    state, step = fx.init(model, TX), fx.train_step(loss_fn, TX)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in batches:
        found = fx.gradients(loss_fn)(fx.init(model), batch)
        state, _ = step(state, batch)
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        torch.testing.assert_close(found.loss, loss.detach(), rtol=0, atol=0)
        torch.testing.assert_close(found.grads, {n: p.grad for n, p in model.named_parameters()}, rtol=0, atol=0)
        optimizer.step()
    # torch.optim rounds a parameter's update once, and a chain of transformations its product too.
    torch.testing.assert_close(state.params, {n: p.detach() for n, p in model.named_parameters()}, rtol=0.01, atol=2e-3)


@pytest.mark.parametrize(
    "softmax",
    [
        lambda x: torch.softmax(input=x, dim=-1),
        lambda x: torch.log_softmax(dim=-1, input=x),
        lambda x: nn.functional.layer_norm(input=x, normalized_shape=(4,)),
        lambda x: torch.layer_norm(input=x, normalized_shape=(4,)),
    ],
)
def test_keyword_inputs_of_norms_are_cast_too(softmax):
    dtypes = []

    def measure(model, batch):
        y = softmax(model(batch))
        dtypes.append(y.dtype)
        return y.float().square().mean()

    fx.gradients(measure, precision="bf16")(fx.init(nn.Linear(4, 4)), X)
    assert set(dtypes) == {torch.float32}
