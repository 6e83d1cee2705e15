"""Modules incompatible with a precision policy: errors that name the module, and the option to keep it in float32."""

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
    """Writes the result of a matmul, in the policy's compute dtype, into a float32 tensor."""

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
    def test_error_names_module_line_dtypes_and_remedy(self, make, differentiate):
        options = {"differentiate": differentiate} if make is fx.gradients else {}
        call = make(loss_fn, precision="bf16", **options)
        with pytest.raises(RuntimeError) as caught:
            call(fx.init(seeded(Writes)), X)
        text = str(caught.value)
        assert text.startswith(
            "expected the module '1' (Writes) to compute with tensors of matching dtypes, got float32"
        )
        assert "and bfloat16 at " in text
        assert "test_forward_pass.py:" in text
        assert text.endswith("precision=fxtrain.Policy(compute=torch.bfloat16, keep=('1',)).")

    def test_error_names_module_in_tree_by_key(self):
        call = fx.gradients(lambda model, batch: loss_fn(model["body"], batch), precision="bf16")
        with pytest.raises(RuntimeError, match=r"expected the module 'body\.1' \(Writes\)"):
            call(fx.init({"head": nn.Linear(1, 1), "body": seeded(Writes)}), X)

    def test_error_for_half_precision_parameters_names_module(self):
        state, step = start(seeded(Widens), dtype=HALF, **PURE)
        with pytest.raises(RuntimeError, match=r"module '1\.inner' \(Linear\) .* float32 and bfloat16 .*'1\.inner',"):
            step(state, X.to(HALF))

    def test_error_without_policy_suggests_casting_the_batch(self):
        with pytest.raises(RuntimeError, match=r"module '0' \(Linear\) .*float64 and float32 .* Cast the batch"):
            fx.gradients(loss_fn)(fx.init(seeded()), X.double())

    def test_unrelated_errors_are_raised_unchanged(self):
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

    def test_kept_modules_see_float32_copies_of_half_precision_parameters(self):
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
    def test_compiled_and_vmapped_steps_keep_modules_in_float32(self, options):
        dtype = options.get("param")
        state, step = start(seeded(Widens), dtype=dtype, keep="1", **options)
        batch = X.to(dtype or torch.float32)
        want = step(state, batch)
        for compiled in (
            torch.compile(step, fullgraph=True, backend="eager"),
            fx.compile(step, backend="eager"),
        ):
            for _ in range(2):  # attributes that Dynamo sets on the module must not affect the second call
                got = compiled(copy.deepcopy(state), batch)
                torch.testing.assert_close(tree.leaves(got), tree.leaves(want))
        got = step(state, batch)
        torch.testing.assert_close(tree.leaves(got), tree.leaves(want), rtol=0, atol=0)
        got = torch.vmap(step, (None, 0))(state, batch[None])
        one = tree.map(lambda leaf: leaf[0], got[0].params)
        torch.testing.assert_close(one, want[0].params, rtol=0.02, atol=2e-3)  # bfloat16 sums depend on their order

    def test_keep_pattern_without_match_is_rejected(self):
        state, step = start(seeded(Widens), compute=HALF, keep="*.wo")
        with pytest.raises(
            ValueError, match=r"expected '\*\.wo' to match a module, got no match among 0, 1, 1\.inner, 2"
        ):
            step(state, X)

    def test_policy_description_lists_kept_modules(self):
        assert fx.Policy(keep="a").keep == ("a",)
        assert fx.Policy(keep=["a", "b"]).described.endswith(", a b in float32")
        assert hash(fx.Policy(keep=["a"])) == hash(fx.Policy(keep="a"))


def test_bfloat16_model_matches_plain_loop():
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
    # torch.optim rounds each update once. A chain of transformations also rounds the scaled gradient.
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
def test_keyword_inputs_of_softmax_and_norms_are_cast(softmax):
    dtypes = []

    def measure(model, batch):
        y = softmax(model(batch))
        dtypes.append(y.dtype)
        return y.float().square().mean()

    fx.gradients(measure, precision="bf16")(fx.init(nn.Linear(4, 4)), X)
    assert set(dtypes) == {torch.float32}
