"""torch.func and torch.autograd give the same gradients, and the automatic choice is made once with one warning."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fxtrain as fx
from fxtrain import testing
from fxtrain.model import ValuesNeededError

WAYS = ("func", "autograd")


class Old(torch.autograd.Function):
    """x^2, with the old signature that torch.func rejects."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Net(nn.Module):
    """A model with tied weights, changing buffers, dropout and a complex parameter."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.inner.weight
        self.norm = nn.BatchNorm1d(4)
        self.phase = nn.Parameter(torch.randn(4, dtype=torch.complex128))

    def forward(self, x):
        x = F.dropout(self.norm(self.tied(self.inner(x).tanh())), 0.2, self.training)
        return (x * self.phase).abs().square().sum(-1)


def plain(model, batch):
    return model(batch).mean()


def old(model, batch):
    return Old.apply(model(batch)).mean()


def squares(model, batch):
    return model(batch).square().mean()


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def net():
    torch.manual_seed(0)
    return Net().double()


X = torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(8, 4)


def close(one, two, tolerance=1e-12):
    torch.testing.assert_close(fx.tree.leaves(one), fx.tree.leaves(two), rtol=tolerance, atol=tolerance)


def traced(step, state, batch):
    """Returns the results of a step's traced graph, run by the interpreter."""
    leaves, structure = fx.tree.flatten((state, batch))

    def flat(*leaves):
        return fx.tree.leaves(step(*fx.tree.unflatten(structure, leaves)))

    return make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*leaves)(*leaves)


class TestBothWays:
    @pytest.mark.parametrize("options", [{}, {"accumulate": 2}])
    def test_steps_are_equal(self, options):
        tx = fx.optim.adamw(1e-2)
        ends = []
        for way in WAYS:
            state, step = fx.init(net(), tx), fx.train_step(plain, tx, differentiate=way, **options)
            for _ in range(3):
                state, output = step(state, X)
            ends.append((state, output))
        close(*ends)

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_steps_are_equal_in_lower_precision(self, precision):
        tx = fx.optim.sgd(1e-2)
        ends = []
        for way in WAYS:
            step = fx.train_step(plain, tx, differentiate=way, precision=precision)
            state = fx.attach(fx.init(linear().float(), tx), step)
            ends.append(step(state, X.float()))
        close(*ends, 1e-6)

    def test_gradients_of_one_entry_are_equal(self):
        state = fx.init({"a": linear(), "b": linear()})

        def loss_fn(model, batch):
            return (model["a"](batch) * model["b"](batch)).mean()

        one, two = (fx.gradients(loss_fn, wrt="a", differentiate=way)(state, X) for way in WAYS)
        close(one, two)

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_gradients_work_under_no_grad(self, way, context):
        find = fx.gradients(plain, differentiate=way)
        wanted = find(fx.init(net()), X)
        with context():
            testing.assert_equal(find(fx.init(net()), X.clone()), wanted, "gradients")

    def test_traced_step_equals_eager(self):
        tx = fx.optim.sgd(1e-2, momentum=0.9)
        step = fx.train_step(plain, tx, differentiate="autograd")
        state = fx.init(net(), tx)
        close(traced(step, state, X), step(state, X))


class TestAutograd:
    def test_has_no_side_effects(self):
        module = net()
        state = fx.init(module)
        before = state.copy()
        found = fx.gradients(plain, differentiate="autograd")(state, X)
        testing.assert_equal(state, before, "state")
        tensors = [*fx.tree.leaves(state), *fx.tree.leaves(found), *module.parameters()]
        assert all(leaf.grad is None for leaf in tensors if leaf.is_leaf)
        assert not any(leaf.requires_grad for leaf in (*fx.tree.leaves(state), *fx.tree.leaves(found)))

    def test_rejects_transforms_and_outer_derivatives(self):
        state = fx.init(linear())
        find = fx.gradients(plain, differentiate="autograd")
        with pytest.raises(ValueError, match=r"outside torch\.func\.vmap, .* Choose differentiate='func'"):
            torch.func.vmap(lambda x: find(state, x).grads)(X[None])
        with pytest.raises(ValueError, match=r"outside torch\.func\.vmap"):
            torch.func.grad(lambda params: find(state.replace(params=params), X).loss)(state.params)
        with pytest.raises(ValueError, match=r"outside torch\.func\.vmap"):
            find(state.replace(params=fx.tree.map(lambda leaf: leaf.clone().requires_grad_(), state.params)), X)

    def test_rejects_loss_without_parameters(self):
        module = linear()
        with pytest.raises(ValueError, match="instead of module, which it captures, outside"):
            fx.gradients(lambda model, batch: plain(module, batch), differentiate="autograd")(fx.init(module), X)


class TestAuto:
    def test_warns_once_about_fallback_with_line(self):
        tx = fx.optim.sgd(0.1)
        state, step = fx.init(linear(), tx), fx.train_step(old, tx)
        with pytest.warns(UserWarning, match="old is differentiated by torch.autograd .*setup_context") as said:
            state, _ = step(state, X)
        assert len(said) == 1
        line = old.__code__.co_firstlineno + 1
        assert f"{__file__}:{line}: " in str(said[0].message)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step(state, X)

    def test_prefers_torch_func(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fx.gradients(plain)(fx.init(net()), X)

    def test_raises_user_errors_unchanged(self):
        def mistaken(model, batch):
            return F.linear(model(batch), torch.ones(1, 7, dtype=batch.dtype)).sum()

        def mistaken_later(model, batch):
            return mistaken(model, Old.apply(model[0].weight).sum() * batch)

        for loss_fn in (mistaken, mistaken_later):
            with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
                fx.gradients(loss_fn)(fx.init(linear()), X)

    def test_raises_transient_error(self, recwarn):
        errors = [OSError("the disk is busy")]

        def loss_fn(model, batch):
            if errors:
                raise errors.pop()
            return model(batch).mean()

        find = fx.gradients(loss_fn)
        with pytest.raises(OSError, match="the disk is busy"):
            find(fx.init(nn.Linear(2, 1)), torch.ones(3, 2))
        find(fx.init(nn.Linear(2, 1)), torch.ones(3, 2))
        assert not recwarn.list

    def test_explicit_func_does_not_fall_back(self):
        with pytest.raises(RuntimeError, match="setup_context"):
            fx.gradients(old, differentiate="func")(fx.init(linear()), X)

    def test_falls_back_when_traced_first(self):
        tx = fx.optim.sgd(0.1)
        state, step = fx.init(linear(), tx), fx.train_step(old, tx)
        with pytest.warns(UserWarning, match="setup_context"), pytest.raises(ValuesNeededError):
            traced(step, state, X)
        close(traced(step, state, X), step(state, X))

    def test_unknown_choice_is_rejected(self):
        with pytest.raises(
            ValueError, match="expected differentiate to be one of 'auto', 'func', 'autograd', got 'backward'"
        ):
            fx.train_step(plain, fx.optim.sgd(0.1), differentiate="backward")


class Recomputes(nn.Module):
    """Two dropout regions, optionally under activation checkpointing, followed by dropout."""

    def __init__(self, again):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        self.again = again

    def region(self, x):
        return F.dropout(self.inner(F.dropout(x, 0.3)).tanh(), 0.5)

    def forward(self, x):
        x = self.first(x)
        for _ in range(2):
            x = self.region(x) if self.again is None else checkpoint(self.region, x, use_reentrant=self.again)
        return self.last(F.dropout(x, 0.5))


class TestRecomputation:
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_reuses_random_samples_and_leaves_generator_unchanged(self, reentrant):
        tx, ends = fx.optim.sgd(0.1), []
        before = torch.get_rng_state()
        for again in (None, reentrant):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                state = fx.init(Recomputes(again).double(), tx)
            step = fx.train_step(squares, tx, differentiate="autograd")
            for _ in range(2):
                state, _ = step(state, X)
            ends.append(state.params)
        close(*ends)
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_traced_step_equals_eager(self, reentrant):
        tx = fx.optim.sgd(0.1)
        state = fx.init(Recomputes(reentrant).double(), tx)
        step = fx.train_step(squares, tx, differentiate="autograd")
        found = step(state, X)
        close(traced(step, state, X), found)


def penalty(model, batch):
    x = batch.requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return (slope.norm(dim=1) - 1).square().mean()


def hooked(model, batch):
    with torch.autograd.graph.save_on_cpu():
        return plain(model, batch)


def masked(model, batch):
    mask = torch.zeros_like(batch)
    mask.data = torch.ones_like(batch)
    return (model(batch) * mask).mean()


def backward_inside(model, batch):
    x = batch.clone().requires_grad_()
    model(x).sum().backward()
    return (model(batch) * x.grad.norm()).mean()


class TestPlainLoop:
    @pytest.mark.parametrize("loss_fn", [penalty, hooked, masked, backward_inside, old])
    def test_steps_equal_plain_loop(self, loss_fn):
        module, tx = linear(), fx.optim.sgd(0.1, momentum=0.9)
        state, step = fx.init(module, tx), fx.train_step(loss_fn, tx, differentiate="autograd")
        batch = X.clone()
        for _ in range(3):
            state, _ = step(state, batch)
        assert not batch.requires_grad
        optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            loss_fn(module, X.clone()).backward()
            optimizer.step()
        close(state.params, {name: value.detach() for name, value in module.named_parameters()})

    def test_densifies_sparse_gradients(self):
        state = fx.init(nn.Embedding(5, 2, sparse=True))
        (grad,) = fx.gradients(plain)(state, torch.tensor([1, 3])).grads.values()
        assert grad.layout == torch.strided
        assert grad.any(1).tolist() == [False, True, False, True, False]

    def test_outside_tensors_keep_their_grad(self):
        outside = torch.ones(4, dtype=torch.float64, requires_grad=True)
        outside.grad = torch.full_like(outside, 3.0)
        state = fx.init(Recomputes(True).double())
        fx.gradients(lambda model, x: squares(model, x * outside), differentiate="autograd")(state, X)
        assert outside.grad.tolist() == [3.0] * 4


class TestWritesToParameters:
    @pytest.mark.parametrize("way", ["auto", *WAYS])
    def test_writes_are_rejected(self, way):
        def assigns(model, batch):
            model[0].weight.data = model[0].weight.data * 0.5
            return plain(model, batch)

        def clamps(model, batch):
            model[0].weight.data.clamp_(-0.1, 0.1)
            return plain(model, batch)

        tx = fx.optim.sgd(0.1)
        with pytest.raises(RuntimeError, match=r"got an assignment to \.data of model\.0\.weight"):
            fx.train_step(assigns, tx, differentiate=way)(fx.init(linear(), tx), X)
        with pytest.raises(RuntimeError, match=r"an in-place write \(clamp_\) to model\.0\.weight"):
            fx.train_step(clamps, tx, differentiate=way)(fx.init(linear(), tx), X)


class TestUsed:
    @pytest.mark.parametrize("way", WAYS)
    def test_unreached_parameters_are_unused(self, way):
        state = fx.init({"a": linear(), "b": linear()})
        found = fx.gradients(lambda model, batch: plain(model["a"], batch) * 0.0, differentiate=way)(state, X)
        assert set(found.used["a"].values()) == {True}
        assert set(found.used["b"].values()) == {False}
        assert not found.grads["b"]["0.weight"].any()

    @pytest.mark.parametrize("way", WAYS)
    def test_used_is_decided_per_call(self, way):
        state = fx.init({"a": torch.tensor(1.0), "b": torch.tensor(1.0)})
        find = fx.gradients(lambda model, batch: model["a" if batch > 0 else "b"] * batch, differentiate=way)
        assert find(state, torch.tensor(1.0)).used == {"a": True, "b": False}
        assert find(state, torch.tensor(-1.0)).used == {"a": False, "b": True}

    def test_used_is_static_under_vmap(self):
        state = fx.init({"a": torch.tensor(1.0), "b": torch.tensor(1.0)})
        find = fx.gradients(lambda model, batch: model["a"] * batch)
        found = torch.vmap(find, (None, 0))(state, torch.ones(3))
        assert found.used == {"a": True, "b": False}
        assert found.grads["a"].shape == (3,)
