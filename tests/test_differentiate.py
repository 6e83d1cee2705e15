"""The two ways to differentiate give the same numbers, and the choice between them is made once and said."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import fxtrain as fx
from fxtrain import testing
from fxtrain.model import ValuesNeededError

WAYS = ("func", "autograd")


class Old(torch.autograd.Function):
    """x^2, with the signature that torch.func refuses."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Net(nn.Module):
    """Tied weights, buffers that change, dropout, and a complex parameter."""

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
    """What the graph of a step gives, run by the interpreter."""
    leaves, structure = fx.tree.flatten((state, batch))

    def flat(*leaves):
        return fx.tree.leaves(step(*fx.tree.unflatten(structure, leaves)))

    return make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*leaves)(*leaves)


class TestBothWays:
    @pytest.mark.parametrize("options", [{}, {"accumulate": 2}])
    def test_give_the_same_steps(self, options):
        tx = fx.optim.adamw(1e-2)
        ends = []
        for way in WAYS:
            state, step = fx.init(net(), tx), fx.train_step(plain, tx, differentiate=way, **options)
            for _ in range(3):
                state, output = step(state, X)
            ends.append((state, output))
        close(*ends)

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_give_the_same_steps_in_lower_precision(self, precision):
        tx = fx.optim.sgd(1e-2)
        ends = []
        for way in WAYS:
            step = fx.train_step(plain, tx, differentiate=way, precision=precision)
            state = fx.attach(fx.init(linear().float(), tx), step)
            ends.append(step(state, X.float()))
        close(*ends, 1e-6)

    def test_of_one_entry(self):
        state = fx.init({"a": linear(), "b": linear()})

        def loss_fn(model, batch):
            return (model["a"](batch) * model["b"](batch)).mean()

        one, two = (fx.gradients(loss_fn, wrt="a", differentiate=way)(state, X) for way in WAYS)
        close(one, two)

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_where_gradients_are_switched_off(self, way, context):
        find = fx.gradients(plain, differentiate=way)
        wanted = find(fx.init(net()), X)
        with context():
            testing.assert_equal(find(fx.init(net()), X.clone()), wanted, "gradients")

    def test_traced(self):
        tx = fx.optim.sgd(1e-2, momentum=0.9)
        step = fx.train_step(plain, tx, differentiate="autograd")
        state = fx.init(net(), tx)
        close(traced(step, state, X), step(state, X))


class TestByAutograd:
    def test_leaves_everything_outside_as_it_was(self):
        module = net()
        state = fx.init(module)
        before = state.copy()
        found = fx.gradients(plain, differentiate="autograd")(state, X)
        testing.assert_equal(state, before, "state")
        tensors = [*fx.tree.leaves(state), *fx.tree.leaves(found), *module.parameters()]
        assert all(leaf.grad is None for leaf in tensors if leaf.is_leaf)
        assert not any(leaf.requires_grad for leaf in (*fx.tree.leaves(state), *fx.tree.leaves(found)))

    def test_refuses_transforms_and_outer_derivatives(self):
        state = fx.init(linear())
        find = fx.gradients(plain, differentiate="autograd")
        with pytest.raises(ValueError, match=r"outside of torch\.func\.vmap, .* Choose differentiate='func'"):
            torch.func.vmap(lambda x: find(state, x).grads)(X[None])
        with pytest.raises(ValueError, match=r"outside of torch\.func\.vmap"):
            torch.func.grad(lambda params: find(state.replace(params=params), X).loss)(state.params)
        with pytest.raises(ValueError, match=r"outside of torch\.func\.vmap"):
            find(state.replace(params=fx.tree.map(lambda leaf: leaf.clone().requires_grad_(), state.params)), X)

    def test_refuses_a_loss_that_reaches_no_parameter(self):
        module = linear()
        with pytest.raises(ValueError, match="instead of module, which it takes from outside"):
            fx.gradients(lambda model, batch: plain(module, batch), differentiate="autograd")(fx.init(module), X)


class TestAuto:
    def test_says_once_why_and_where_torch_func_is_left(self):
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

    def test_keeps_to_torch_func_where_it_can(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fx.gradients(plain)(fx.init(net()), X)

    def test_leaves_mistakes_their_own_words(self):
        def mistaken(model, batch):
            return F.linear(model(batch), torch.ones(1, 7, dtype=batch.dtype)).sum()

        def mistaken_later(model, batch):
            return mistaken(model, Old.apply(model[0].weight).sum() * batch)

        for loss_fn in (mistaken, mistaken_later):
            with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
                fx.gradients(loss_fn)(fx.init(linear()), X)

    def test_stays_with_func_where_it_is_chosen(self):
        with pytest.raises(RuntimeError, match="setup_context"):
            fx.gradients(old, differentiate="func")(fx.init(linear()), X)

    def test_changes_when_it_is_traced_first(self):
        tx = fx.optim.sgd(0.1)
        state, step = fx.init(linear(), tx), fx.train_step(old, tx)
        with pytest.warns(UserWarning, match="setup_context"), pytest.raises(ValuesNeededError):
            traced(step, state, X)
        close(traced(step, state, X), step(state, X))

    def test_of_an_unknown_name_is_an_error(self):
        with pytest.raises(ValueError, match="expected differentiate='auto', 'func' or 'autograd', got 'backward'"):
            fx.train_step(plain, fx.optim.sgd(0.1), differentiate="backward")


class TestUsed:
    @pytest.mark.parametrize("way", WAYS)
    def test_is_false_for_parameters_the_loss_does_not_reach(self, way):
        state = fx.init({"a": linear(), "b": linear()})
        found = fx.gradients(lambda model, batch: plain(model["a"], batch) * 0.0, differentiate=way)(state, X)
        assert set(found.used["a"].values()) == {True}
        assert set(found.used["b"].values()) == {False}
        assert not found.grads["b"]["0.weight"].any()

    @pytest.mark.parametrize("way", WAYS)
    def test_is_decided_at_each_call(self, way):
        state = fx.init({"a": torch.tensor(1.0), "b": torch.tensor(1.0)})
        find = fx.gradients(lambda model, batch: model["a" if batch > 0 else "b"] * batch, differentiate=way)
        assert find(state, torch.tensor(1.0)).used == {"a": True, "b": False}
        assert find(state, torch.tensor(-1.0)).used == {"a": False, "b": True}

    def test_is_static_under_vmap(self):
        state = fx.init({"a": torch.tensor(1.0), "b": torch.tensor(1.0)})
        find = fx.gradients(lambda model, batch: model["a"] * batch)
        found = torch.vmap(find, (None, 0))(state, torch.ones(3))
        assert found.used == {"a": True, "b": False}
        assert found.grads["a"].shape == (3,)
