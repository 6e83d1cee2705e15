"""``rng.functional``: torch's random functions sample from a key, with equal results in every mode."""

import math

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad_and_value, vmap
from torch.utils.checkpoint import checkpoint

from fxtrain import rng
from fxtrain._torch_internals.kernels import shared_libraries

MANY = 1 << 17

torch_generator = torch.Generator().manual_seed(0)
X = torch.randn(3, 4, 8, generator=torch_generator)
HALF = X.bfloat16()
IMAGE = torch.randn(2, 3, 8, 8, generator=torch_generator)
VOLUME = torch.randn(2, 3, 9, 9, 9, generator=torch_generator)
QUERY = torch.randn(2, 2, 5, 8, generator=torch_generator)
TRIANGLE = torch.ones(5, 5, dtype=torch.bool).tril()


def _module(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


ATTENTION = _module(lambda: nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True))
ENCODER = _module(lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True))


def _empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype)


CASES = {
    "F.dropout": lambda: F.dropout(X, 0.3),
    "F.dropout bfloat16": lambda: F.dropout(HALF, 0.3),
    "torch.dropout": lambda: torch.dropout(X, 0.3, True),
    "torch.dropout by name": lambda: torch.dropout(X, p=0.3, train=True),
    "nn.Dropout1d": lambda: nn.Dropout1d()(X),
    "nn.Dropout2d": lambda: nn.Dropout2d()(IMAGE),
    "nn.Dropout3d": lambda: nn.Dropout3d()(VOLUME),
    "nn.AlphaDropout": lambda: nn.AlphaDropout()(X),
    "nn.FeatureAlphaDropout": lambda: nn.FeatureAlphaDropout()(IMAGE),
    "torch.alpha_dropout": lambda: torch.alpha_dropout(X, 0.3, True),
    "torch.feature_dropout": lambda: torch.feature_dropout(IMAGE, 0.5, True),
    "torch.feature_alpha_dropout": lambda: torch.feature_alpha_dropout(IMAGE, 0.5, True),
    "attention": lambda: F.scaled_dot_product_attention(QUERY, QUERY, QUERY, dropout_p=0.3),
    "attention, mask": lambda: F.scaled_dot_product_attention(QUERY, QUERY, QUERY, TRIANGLE, 0.3),
    "attention, causal": lambda: F.scaled_dot_product_attention(QUERY, QUERY, QUERY, dropout_p=0.3, is_causal=True),
    "F.gumbel_softmax": lambda: F.gumbel_softmax(X),
    "F.gumbel_softmax hard": lambda: F.gumbel_softmax(X, hard=True),
    "F.rrelu": lambda: F.rrelu(X, training=True),
    "nn.RReLU": lambda: nn.RReLU()(X),
    "F.fractional_max_pool2d": lambda: F.fractional_max_pool2d(IMAGE, 2, output_size=5),
    "F.fractional_max_pool2d indices": lambda: F.fractional_max_pool2d(IMAGE, 2, output_size=5, return_indices=True)[1],
    "F.fractional_max_pool3d": lambda: F.fractional_max_pool3d(VOLUME, 2, output_size=5),
    "torch.rand": lambda: torch.rand(37),
    "torch.rand size": lambda: torch.rand(size=(5, 7)),
    "torch.rand float64": lambda: torch.rand((5, 7), dtype=torch.float64),
    "torch.rand bfloat16": lambda: torch.rand([37], dtype=torch.bfloat16),
    "torch.randn": lambda: torch.randn(1037),
    "torch.randn float64": lambda: torch.randn(37, dtype=torch.float64),
    "torch.randn float16": lambda: torch.randn(37, dtype=torch.float16),
    "torch.randint": lambda: torch.randint(10, (37,)),
    "torch.randint low": lambda: torch.randint(-3, 10, (37,)),
    "torch.randint wide": lambda: torch.randint(-(2**62), 2**62, (37,)),
    "torch.randint by name": lambda: torch.randint(low=2, high=9, size=(37,), dtype=torch.int32),
    "torch.randperm": lambda: torch.randperm(53),
    "torch.rand_like": lambda: torch.rand_like(X),
    "torch.randn_like": lambda: torch.randn_like(X),
    "torch.randn_like float64": lambda: torch.randn_like(X, dtype=torch.float64),
    "torch.randint_like": lambda: torch.randint_like(X, 7),
    "torch.randint_like low": lambda: torch.randint_like(X, -3, 7),
    "torch.normal": lambda: torch.normal(0.0, 2.0, (37,)),
    "torch.normal tensors": lambda: torch.normal(X, X.abs()),
    "torch.normal std": lambda: torch.normal(1.0, X.abs()),
    "torch.bernoulli": lambda: torch.bernoulli(X.sigmoid()),
    "Tensor.bernoulli": lambda: X.bernoulli(0.3),
    "torch.multinomial": lambda: torch.multinomial(X[0].sigmoid(), 2),
    "torch.multinomial replacement": lambda: torch.multinomial(X[0].sigmoid(), 20, True),
    "Tensor.multinomial": lambda: X[0].sigmoid().multinomial(1),
    "Tensor.uniform_": lambda: _empty(37).uniform_(-1, 3),
    "Tensor.uniform_ by name": lambda: _empty(37).uniform_(**{"from": 2.0, "to": 3.0}),
    "Tensor.normal_": lambda: _empty(37).normal_(1.0, 2.0),
    "Tensor.exponential_": lambda: _empty(37).exponential_(2.0),
    "Tensor.random_": lambda: _empty(37).random_(),
    "Tensor.random_ to": lambda: _empty(37, dtype=torch.int32).random_(9),
    "Tensor.random_ from": lambda: _empty(37, dtype=torch.int64).random_(-9, 9),
    "Tensor.random_ int64": lambda: _empty(37, dtype=torch.int64).random_(),
    "Tensor.random_ bool": lambda: _empty(37, dtype=torch.bool).random_(),
    "Tensor.log_normal_": lambda: _empty(37).log_normal_(),
    "Tensor.cauchy_": lambda: _empty(37).cauchy_(1.0, 2.0),
    "Tensor.geometric_": lambda: _empty(37).geometric_(0.3),
    "Tensor.geometric_ int64": lambda: _empty(37, dtype=torch.int64).geometric_(0.3),
    "Tensor.bernoulli_": lambda: X.new_empty(37).bernoulli_(0.3),
    "Tensor.bernoulli_ tensor": lambda: torch.empty_like(X).bernoulli_(X.sigmoid()),
    "init.kaiming_uniform_": lambda: nn.init.kaiming_uniform_(_empty(5, 7)),
    "init.uniform_": lambda: nn.init.uniform_(_empty(5, 7)),
    "init.normal_": lambda: nn.init.normal_(_empty(5, 7), std=2.0),
    "init.xavier_normal_": lambda: nn.init.xavier_normal_(_empty(5, 7)),
    "nn.MultiheadAttention": lambda: ATTENTION(X, X, X)[1],
    "nn.MultiheadAttention fused": lambda: ATTENTION(X, X, X, need_weights=False)[0],
    "nn.TransformerEncoderLayer": lambda: ENCODER(X),
    "Normal.rsample": lambda: torch.distributions.Normal(X, 1.0).rsample(),
    "Categorical.sample": lambda: torch.distributions.Categorical(logits=X).sample(),
    "Exponential.rsample": lambda: torch.distributions.Exponential(X.exp()).rsample(),
}
IN_PLACE = {  # on a captured tensor, which vmap refuses if only the key is batched
    "F.dropout in place": lambda: F.dropout(X * 1, 0.3, inplace=True),
    "torch.dropout_": lambda: torch.dropout_(X * 1, 0.3, True),
    "torch.alpha_dropout_": lambda: torch.alpha_dropout_(X * 1, 0.3, True),
    "F.rrelu in place": lambda: F.rrelu(X * 1, training=True, inplace=True),
}
SEED, SEEDS = torch.tensor(17), torch.tensor([3, 17, 5])


def _draw(names, seed):
    drawn = {}
    for name in names:
        with rng.functional(rng.key(seed, step=torch.tensor(5))):
            drawn[name] = (CASES | IN_PLACE)[name]()
    return drawn


@pytest.mark.parametrize("name", [*CASES, *IN_PLACE])
def test_replaced_functions_depend_only_on_the_key(name):
    with rng.untouched():
        drawn, again, other = (_draw([name], torch.tensor(seed))[name] for seed in (17, 17, 18))
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, other)
    assert drawn.isfinite().all()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", CASES)
def test_vmapped_samples_equal_single_samples(name):
    members = vmap(lambda seed: _draw([name], seed)[name])(SEEDS)
    for member, seed in zip(members, SEEDS, strict=True):
        assert torch.equal(member, _draw([name], seed)[name])


@pytest.mark.slow
def test_dynamo_traces_every_replaced_function():
    """The graph runs the operations of eager mode, so results are bitwise equal."""
    names = [*CASES, *IN_PLACE]
    with rng.untouched():
        drawn = torch.compile(_draw, fullgraph=True, backend="eager")(names, SEED)
    for name, expected in _draw(names, SEED).items():
        assert torch.equal(drawn[name], expected), name


# Inductor rounds torch's exponentials, logarithms and sums differently. All other results are bitwise equal, except
# those of fractional_max_pool3d, which differ by integers for equal samples and are therefore not compared.
ROUNDED = ("attention", "Attention", "gumbel", "Transformer", "log_normal")
FEW = ("F.dropout", "torch.randn", "attention, mask")
EACH = (  # one name per implementation; the tests above cover the other names of each, and modules made of them
    *("F.dropout", "F.dropout bfloat16", "torch.feature_alpha_dropout", "attention, mask"),
    *("F.gumbel_softmax hard", "F.rrelu", "F.fractional_max_pool2d"),
    *("torch.rand float64", "torch.rand bfloat16", "Tensor.uniform_ by name"),
    *("torch.randn", "torch.randn float64", "torch.randn float16", "Tensor.log_normal_"),
    *("torch.randint wide", "torch.randint by name", "Tensor.random_ bool", "torch.randperm"),
    *("torch.bernoulli", "torch.multinomial", "torch.multinomial replacement", "Tensor.geometric_ int64"),
    *("Tensor.exponential_", "Tensor.cauchy_"),
)


def _views_dtypes_under_vmap():
    try:
        vmap(lambda x: x.view(torch.int32))(torch.ones(2))
    except RuntimeError:
        return False
    return True


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.skipif(not _views_dtypes_under_vmap(), reason="this torch's Dynamo cannot reinterpret bits under vmap")
@pytest.mark.slow
@pytest.mark.parametrize("names", [FEW, *(EACH[start : start + 6] for start in range(0, len(EACH), 6))], ids=", ".join)
def test_inductor_samples_equal_eager_ones_alone_and_vmapped(names):
    def alone(seed):
        return _draw(names, seed)

    def vmapped(seeds):
        return vmap(lambda member: _draw(names, member))(seeds)

    with rng.untouched(), shared_libraries():
        if names is FEW:
            drawn = torch.compile(alone, fullgraph=True)(SEED)
        else:
            drawn = {name: members[1] for name, members in torch.compile(vmapped, fullgraph=True)(SEEDS).items()}
    for name, result in drawn.items():
        expected = _draw([name], SEED)[name]
        rounded = any(mark in name for mark in ROUNDED)
        tolerance = 1e-6 if rounded else 0.0
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_seeds_steps_and_sites_do_not_recompile():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=backend)
    def draw(x, seed, step):
        with rng.functional(rng.key(seed, step=step)):
            return F.dropout(F.dropout(x, 0.5), 0.5) + torch.randn_like(x)

    for number in range(4):
        draw(X, torch.tensor(number), torch.tensor(number + 10))
    assert len(graphs) == 1


def test_mode_applies_inside_a_compiled_function():
    def draw(x):
        return F.dropout(x, 0.5) + torch.randn_like(x)

    compiled = torch.compile(draw, fullgraph=True, backend="eager")
    for seed in range(3):
        with rng.functional(rng.key(seed)):
            expected = draw(X)
        with rng.functional(rng.key(seed)):
            assert torch.equal(compiled(X), expected)


# Semantics of each replacement.


def test_each_call_samples_from_the_next_site():
    key = rng.key(4)
    with rng.functional(key):
        drawn = [torch.rand(5), F.dropout(torch.ones(5), 0.5, training=False), torch.rand(5), torch.randn(3)]
    assert torch.equal(drawn[0], rng.uniform(key, [5]))
    assert torch.equal(drawn[2], rng.uniform(key, [5], site=1))
    assert torch.equal(drawn[3], rng.normal(key, [3], site=2))


def test_contexts_nest():
    first, second = rng.key(1), rng.key(2)
    with rng.functional(first):
        before = torch.rand(3)
        with rng.functional(second):
            within = torch.rand(3)
        after = torch.rand(3)
    assert torch.equal(before, rng.uniform(first, [3]))
    assert torch.equal(within, rng.uniform(second, [3]))
    assert torch.equal(after, rng.uniform(first, [3], site=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout_scales_the_expected_share_of_elements(dtype):
    x = torch.ones(MANY, dtype=dtype)
    with rng.functional(rng.key(0)):
        dropped = F.dropout(x, 0.3)
    assert dropped.dtype == dtype
    assert dropped.unique().tolist() == [0.0, torch.tensor(1 / 0.7, dtype=dtype).item()]
    assert abs((dropped > 0).sum().item() - 0.7 * MANY) < 4 * math.sqrt(0.21 * MANY)


def test_dropout_handles_edge_cases():
    x = torch.tensor([1.0, math.nan, -math.inf])
    with rng.functional(rng.key(0)):
        assert F.dropout(x, 0.5, training=False) is x
        assert F.dropout(x, 0.0) is x
        assert torch.equal(F.dropout(torch.ones(100), 1.0), torch.zeros(100))
        assert F.dropout(torch.full((100,), math.nan), 0.5).isnan().all()
        assert F.alpha_dropout(x, 0.5) is x
        assert torch.equal(F.alpha_dropout(torch.ones(4), 1.0, training=True), torch.zeros(4))
        y = torch.ones(100)
        assert F.dropout(y, 0.5, inplace=True) is y
        assert y.unique().tolist() == [0.0, 2.0]
        with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
            F.dropout(x, 1.5)


def test_feature_dropout_drops_whole_channels():
    with rng.functional(rng.key(0)):
        dropped = F.dropout2d(torch.ones(64, 32, 3, 3), 0.5)
    channels = dropped.flatten(2)
    assert (channels == channels[..., :1]).all()
    assert 0.45 < (channels[..., 0] > 0).double().mean() < 0.55


def test_alpha_dropout_keeps_mean_and_variance():
    with rng.functional(rng.key(0)):
        x = torch.randn(MANY)
        dropped = F.alpha_dropout(x, 0.3, training=True)
    assert abs(dropped.mean()) < 4 / math.sqrt(MANY)
    assert abs(dropped.var() - 1.0) < 0.02


def test_gradient_uses_the_mask_of_the_forward_pass():
    def loss(x):
        with rng.functional(rng.key(0)):
            dropped = F.dropout(x, 0.4)
        return dropped.sum(), dropped

    gradient, (_, dropped) = grad_and_value(loss, has_aux=True)(torch.ones(1000))
    assert torch.equal(gradient, dropped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"attn_mask": TRIANGLE},
        {"attn_mask": TRIANGLE.float().log()},
        {"is_causal": True},
        {"scale": 0.3},
        {"enable_gqa": True},
        {"attn_mask": torch.tensor([[True] * 5, *[[False] * 5] * 4])},
    ],
    ids=["plain", "bool", "float", "causal", "scale", "grouped", "blind"],
)
def test_attention_with_negligible_dropout_matches_torch(arguments, dtype):
    query = QUERY.to(dtype)
    key = query[:, :1] if "enable_gqa" in arguments else query
    given = {name: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for name, x in arguments.items()}

    def attend(query, dropout_p):
        with rng.functional(rng.key(0)):
            return F.scaled_dot_product_attention(query, key, key, dropout_p=dropout_p, **given)

    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 4e-3, "atol": 4e-3}
    torch.testing.assert_close(attend(query, 1e-12), attend(query, 0.0), **tolerance)
    gradient, expected = (
        torch.func.grad(lambda q, p=p: attend(q, p).float().square().sum())(query) for p in (1e-12, 0.0)
    )
    torch.testing.assert_close(gradient, expected, **tolerance)


def test_attention_dropout_is_unbiased():
    def attend(seed):
        with rng.functional(rng.key(seed)):
            return F.scaled_dot_product_attention(QUERY, QUERY, QUERY, TRIANGLE, 0.3)

    drawn = vmap(attend)(torch.arange(4000))
    error = (drawn.mean(0) - F.scaled_dot_product_attention(QUERY, QUERY, QUERY, TRIANGLE)) / drawn.std(0) * 4000**0.5
    assert error.abs().max() < 4.5


def test_transformer_layer_agrees_in_eager_compiled_and_vmapped_steps():
    """An unmodified layer computes the same loss and gradient for a key in each mode."""
    parameters = dict(ENCODER.named_parameters())

    def step(parameters, seed, x):
        def loss(parameters):
            with rng.functional(rng.key(seed)):
                return functional_call(ENCODER, parameters, (x,)).square().mean()

        return grad_and_value(loss)(parameters)

    with rng.untouched():
        eager = step(parameters, SEED, X)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(parameters, SEED, X)
        members = vmap(step, in_dims=(None, 0, None))(parameters, SEEDS, X)
    member = torch.utils._pytree.tree_map(lambda leaf: leaf[1], members)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(member, eager, rtol=1e-5, atol=1e-6)
    assert not torch.equal(members[1][0], members[1][1])


def test_modules_without_random_calls_are_unchanged():
    module = ENCODER.eval()
    with rng.functional(rng.key(0)):
        drawn = module(X), F.scaled_dot_product_attention(QUERY, QUERY, QUERY)
        recurrent = nn.LSTM(8, 3, num_layers=2)(X)[0], nn.GRU(8, 3, num_layers=2, dropout=0.5).eval()(X)[0]
    torch.testing.assert_close(drawn[0], module(X))
    assert torch.equal(drawn[1], F.scaled_dot_product_attention(QUERY, QUERY, QUERY))
    assert all(output.isfinite().all() for output in recurrent)
    ENCODER.train()


def test_initialization_follows_the_distributions_of_torch():
    with rng.functional(rng.key(0)), rng.untouched():
        layer = nn.Linear(1000, 300)
        truncated = nn.init.trunc_normal_(torch.empty(20000), std=2.0, a=-1.0, b=3.0)
    bound = 1000**-0.5
    assert layer.weight.requires_grad
    assert layer.weight.is_leaf
    uniform = scipy.stats.uniform(-bound, 2 * bound)
    assert scipy.stats.kstest(layer.weight.detach().double().flatten().numpy(), uniform.cdf).pvalue > 1e-3
    assert scipy.stats.kstest(truncated.double().numpy(), scipy.stats.truncnorm(-0.5, 1.5, scale=2.0).cdf).pvalue > 1e-3


def test_recomputed_activations_use_the_same_samples():
    layer = _module(lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.ReLU()))

    def block(x):
        with rng.functional(rng.key(0)):
            return layer(x)

    expected = torch.autograd.grad(block(X).square().sum(), layer[0].weight)
    recomputed = checkpoint(block, X, use_reentrant=False).square().sum()
    assert torch.equal(*expected, *torch.autograd.grad(recomputed, layer[0].weight))


def test_untouched_names_the_used_generator():
    with pytest.raises(RuntimeError, match="default generator of cpu to stay unused"), rng.untouched():
        torch.rand(1)
    with pytest.raises(RuntimeError, match="default generator of cpu to stay unused"), rng.untouched():
        torch.manual_seed(5)
