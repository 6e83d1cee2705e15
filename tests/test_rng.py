"""Counter-based random samples: known answers, arithmetic, distributions and independence."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx

from fxtrain import rng
from fxtrain.rng import _arithmetic as arithmetic
from fxtrain.rng import _continuous, _discrete, _uniform

MANY = 1 << 17
ONES = 0xFFFFFFFF


# The generator.


@pytest.mark.parametrize(
    ("rounds", "counter", "key", "words"),
    [
        (7, "00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (7, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (7, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
        (10, "00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (10, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (10, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_returns_known_answers(rounds, counter, key, words):
    counter, key, words = ([int(word, 16) for word in text.split()] for text in (counter, key, words))
    assert list(rng.philox4x32(counter, key, rounds=rounds)) == words
    tensors = rng.philox4x32([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key], rounds=rounds)
    assert [int(word) for word in tensors] == words


def test_bits_follow_the_layout_of_counter_and_key():
    """Compares the samples with a computation in Python integers."""
    seed, step, microbatch, stream, site = -(2**63) + 12345, 2**40 + 7, 2**20 + 9, 200, 77
    key = rng.key(seed, stream=stream, step=step, microbatch=microbatch)
    drawn = rng.bits(key, [10], site=site).tolist()
    for index in range(10):
        counter = (index // 4, stream << 24 | site, step & ONES, microbatch)
        words = rng.philox4x32(counter, (seed & ONES, (seed >> 32 ^ (step >> 32) * 0x9E3779B9) & ONES))
        assert drawn[index] == words[index % 4]


@pytest.mark.parametrize("rows", [None, 2])
def test_positions_are_masked_before_they_are_multiplied(rows):
    """Inductor computes multiples of ``arange`` as indices, which have 32 bits on GPUs."""
    key = rng.key(0)
    if rows is not None:
        key = key.replace(rows=_uniform.Rows(torch.tensor(0), rows, 6))
    graph = make_fx(lambda: rng.bits(key, [6, 5]))().graph
    reached = {node for node in graph.nodes if "arange" in str(node.target)}
    multiplied = [node for node in graph.nodes if "mul" in str(node.target) and node.args[1] == 0xD2511F53]
    assert reached
    assert multiplied
    for node in graph.nodes:
        if any(word in str(node.target) for word in ("add", "unsqueeze", "view", "reshape", "clone", "expand")):
            reached |= {node} if reached.intersection(node.all_input_nodes) else set()
    assert reached.isdisjoint(node.args[0] for node in multiplied)


def test_bits_depend_on_each_key_field_and_the_site():
    key = rng.key(1, step=1, microbatch=1)
    others = {"seed": [2, 1 + 2**32, 1 - 2**63], "step": [2, 1 + 2**32, 1 + 2**47], "microbatch": [2, 1 + 2**31]}
    keys = [key, *[key.replace(**{name: value}) for name, values in others.items() for value in values]]
    keys += [key.replace(stream=stream) for stream in (*list(rng.Stream)[1:], 255)]
    drawn = [rng.bits(k, [4], width=64) for k in keys]
    drawn += [rng.bits(key, [4], site=site, width=64) for site in (1, 2**24 - 1)]
    assert len(torch.cat(drawn).unique()) == 4 * len(drawn)


def test_longer_samples_begin_like_shorter_ones():
    for draw in (rng.bits, rng.uniform, rng.normal, rng.exponential):
        assert torch.equal(draw(rng.key(0), [5, 5]).flatten()[:7], draw(rng.key(0), [7]))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: rng.key(0.5), TypeError, "expected seed to be an int or .*, got 0.5"),
        (lambda: rng.key(True), TypeError, "expected seed to be an int or .*, got True"),
        (lambda: rng.key(torch.zeros(2, dtype=torch.int64)), TypeError, r"shape \[2\].*vmap"),
        (
            lambda: rng.key(0, step=torch.tensor(1.0)),
            TypeError,
            "expected step to be an int or .*, got a float32 tensor",
        ),
        (lambda: rng.key(0, stream=256), ValueError, "0 to 255"),
        (lambda: rng.uniform(rng.key(0), [1], site=2**24), ValueError, "expected site to be an int"),
        (lambda: rng.uniform(rng.key(0), [1], low=2.0), ValueError, "got low=2.0 and high=1.0"),
        (lambda: rng.uniform(rng.key(0), [1], dtype=torch.int64), TypeError, "got torch.int64"),
        (lambda: rng.bits(rng.key(0), [1], width=8), ValueError, "expected width to be 32 or 64, got 8"),
        (lambda: rng.bernoulli(rng.key(0), [1], p=1.5), ValueError, "expected p to be between 0 and 1, got 1.5"),
        (lambda: rng.dropout(rng.key(0), torch.ones(1), p=-0.1), ValueError, "between 0 and 1"),
        (lambda: rng.exponential(rng.key(0), [1], rate=0.0), ValueError, "expected rate to be above 0, got 0.0"),
        (lambda: rng.randint(rng.key(0), [1], high=0), ValueError, "got low=0 and high=0"),
        (lambda: rng.randint(rng.key(0), [1], high=257, dtype=torch.uint8), ValueError, "256, got torch.uint8"),
        (
            lambda: rng.multinomial(rng.key(0), torch.ones(2), num_samples=3),
            ValueError,
            "at most 2, the number of categories, got 3",
        ),
    ],
)
def test_errors_name_the_argument_and_its_value(make, error, message):
    with pytest.raises(error, match=message):
        make()


# Arithmetic.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arithmetic_is_accurate_to_a_few_epsilons(dtype):
    form = arithmetic.form_of(dtype)
    integers = rng.bits(rng.key(0), [20000], width=64) >> 1
    integers = torch.cat([integers % 2**form.width, torch.arange(2000), 2**form.width - 1 - torch.arange(2000)])
    wide = integers.numpy().astype(np.longdouble)
    unit = np.longdouble(2.0) ** -(form.width + 1)
    below_one = (2 * wide + 1) * unit
    expected = np.where(below_one < 0.5, -np.log(below_one), -np.log1p(-(1 - below_one)))
    logarithm = arithmetic.negative_log(integers, form)
    x, y = arithmetic.point_on_circle(integers, form)
    root = arithmetic.sqrt(logarithm, form)
    exact = logarithm.numpy().astype(np.longdouble)
    epsilon = torch.finfo(dtype).eps
    assert logarithm.dtype == x.dtype == root.dtype == dtype
    assert np.abs(logarithm.numpy() / expected - 1).max() < 4 * epsilon
    assert np.abs(root.numpy() / np.sqrt(exact) - 1).max() < 2 * epsilon
    assert (x.double() ** 2 + y.double() ** 2 - 1).abs().max() < 4 * epsilon
    # The points cover the circle evenly, because a fine grid of integers gives equally spaced angles.
    grid = torch.arange(0, 2**form.width, 2 ** (form.width - 12)) + 2 ** (form.width - 13)
    cosine, sine = arithmetic.point_on_circle(grid, form)
    angles = torch.atan2(sine.double(), cosine.double()).sort().values
    steps = angles.diff()
    assert torch.allclose(steps, torch.full_like(steps, 2 * math.pi / 2**12), rtol=0, atol=16 * epsilon)


@pytest.mark.parametrize("word", [0, ONES])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_extreme_words_give_samples_in_range(monkeypatch, word, dtype):
    monkeypatch.setattr(_uniform, "blocks", lambda key, index, *_, **__: [torch.full_like(index, word)] * 4)
    key = rng.key(0)
    for low, high in ((0.0, 1.0), (1.0, 2.0), (-1e-3, 1e3)):
        drawn = rng.uniform(key, [4], low=low, high=high, dtype=dtype)
        assert ((drawn >= torch.tensor(low, dtype=dtype)) & (drawn < high)).all()
    assert ((drawn := rng.exponential(key, [4], dtype=dtype)) > 0).all()
    assert drawn.isfinite().all()
    assert rng.normal(key, [4], dtype=dtype).isfinite().all()
    assert rng.randint(key, [4], low=-(2**63), high=2**63).unique().item() == (-(2**63) if word == 0 else 2**63 - 1)
    assert rng.randint(key, [4], low=5, high=12).unique().item() == (5 if word == 0 else 11)


SAMPLERS = [
    lambda key, shape: rng.uniform(key, shape),
    lambda key, shape: rng.uniform(key, shape, dtype=torch.float64),
    lambda key, shape: rng.normal(key, shape),
    lambda key, shape: rng.normal(key, shape, dtype=torch.float64),
    lambda key, shape: rng.bernoulli(key, shape, p=0.3),
    lambda key, shape: rng.randint(key, shape, high=100),
    lambda key, shape: rng.bits(key, shape, width=64),
    lambda key, shape: rng.dropout(key, torch.ones(shape), p=0.5),
    lambda key, shape: rng.categorical(key, torch.zeros(*shape, 3)),
]


@pytest.mark.parametrize("shape", [(8,), (8, 3), (8, 4), (8, 5, 3), (8, 1), (8, 0)])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 9])
def test_rows_of_ranks_are_those_of_one_process(shape, ranks):
    key = rng.key(3, step=5)
    for sampler in SAMPLERS:
        whole = sampler(key, shape)
        for rank in range(ranks):
            expected = whole[rank::ranks]
            rows = _uniform.Rows(torch.tensor(rank), ranks, len(expected))
            assert torch.equal(sampler(key.replace(rows=rows), (len(expected), *shape[1:])), expected)


def test_other_shapes_are_the_same_on_all_ranks():
    key = rng.key(3, step=5)
    for rank in range(2):
        rows = _uniform.Rows(torch.tensor(rank), 2, 8)
        assert torch.equal(rng.uniform(key.replace(rows=rows), (3, 8)), rng.uniform(key, (3, 8)))
        assert key.replace(rows=rows).replace(step=6).rows is rows


# Distributions. Seeds are fixed, so the results are deterministic.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("draw", "distribution"),
    [
        (rng.uniform, scipy.stats.uniform()),
        (lambda key, shape, **k: rng.uniform(key, shape, low=-2.0, high=3.0, **k), scipy.stats.uniform(-2, 5)),
        (rng.normal, scipy.stats.norm()),
        (lambda key, shape, **k: rng.normal(key, shape, mean=1.0, std=3.0, **k), scipy.stats.norm(1, 3)),
        (lambda key, shape, **k: rng.exponential(key, shape, rate=4.0, **k), scipy.stats.expon(scale=0.25)),
        (_continuous.cauchy, scipy.stats.cauchy()),
    ],
    ids=["uniform", "uniform-2,3", "normal", "normal1,3", "exponential", "cauchy"],
)
def test_continuous_samples_follow_the_distribution(draw, distribution, dtype):
    drawn = draw(rng.key(7), [4, MANY], dtype=dtype).double().numpy()
    assert scipy.stats.kstest(drawn.ravel(), distribution.cdf).pvalue > 1e-3
    # Sums of neighboring pairs and of the four rows, mapped to uniform samples, are uniform modulo 1.
    uniform = distribution.cdf(drawn)
    folded = (uniform[:, ::2] + uniform[:, 1::2]) % 1.0
    assert scipy.stats.kstest(folded.ravel(), "uniform").pvalue > 1e-3
    assert scipy.stats.kstest(uniform.sum(0) % 1.0, "uniform").pvalue > 1e-3


def test_normal_tail_has_the_expected_frequency():
    drawn = vmap(lambda seed: (rng.normal(rng.key(seed), [MANY]).abs() > 4.5).sum())(torch.arange(40))
    expected = 40 * MANY * 2 * scipy.stats.norm.sf(4.5)
    assert abs(drawn.sum().item() - expected) < 4 * math.sqrt(expected)


@pytest.mark.parametrize("p", [0.0, 1e-3, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_bernoulli_samples_have_frequency_p(p, as_tensor):
    drawn = rng.bernoulli(rng.key(3), [MANY], p=torch.tensor(p, dtype=torch.float64) if as_tensor else p)
    assert drawn.dtype == torch.bool
    assert abs(drawn.sum().item() - p * MANY) <= 4 * math.sqrt(p * (1 - p) * MANY)


def _chi_square(drawn, probabilities):
    probabilities = np.asarray(probabilities, dtype=np.float64)
    counts = np.bincount(drawn.flatten().numpy(), minlength=len(probabilities))
    assert (counts[probabilities == 0.0] == 0).all()
    possible = probabilities > 0.0
    return scipy.stats.chisquare(counts[possible], probabilities[possible] / probabilities.sum() * drawn.numel()).pvalue


WEIGHTS = [0.0, 1.0, 2.0, 0.5, 0.0, 4.0]
ORDERS = torch.tensor([1000, 100, 10, 1])


@pytest.mark.parametrize(
    ("draw", "probabilities"),
    [
        (lambda key: rng.randint(key, [MANY], low=-3, high=10) + 3, [1] * 13),
        (lambda key: rng.randint(key, [MANY], high=3 * 2**61) >> 60, [1] * 6),
        (lambda key: rng.bits(key, [MANY]) & 0xFF, [1] * 256),
        (lambda key: rng.bits(key, [MANY]) >> 24, [1] * 256),
        (lambda key: rng.bits(key, [MANY], width=64) >> 56 & 0xFF, [1] * 256),
        (lambda key: rng.categorical(key, torch.tensor(WEIGHTS).log().expand(MANY, -1)), WEIGHTS),
        (lambda key: rng.multinomial(key, torch.tensor(WEIGHTS), num_samples=MANY, replacement=True), WEIGHTS),
        (lambda key: rng.multinomial(key, torch.tensor(WEIGHTS).expand(MANY, -1), num_samples=3)[:, 0], WEIGHTS),
        (
            lambda key: _discrete.geometric(key, [MANY], p=0.3).clamp(max=9) - 1,
            [0.3 * 0.7**n for n in range(8)] + [0.7**8],
        ),
    ],
    ids=[
        "randint",
        "randint-wide",
        "low-byte",
        "high-byte",
        "bits64",
        "categorical",
        "multinomial",
        "race",
        "geometric",
    ],
)
def test_discrete_samples_follow_the_distribution(draw, probabilities):
    assert _chi_square(draw(rng.key(11)), probabilities) > 1e-3


def test_permutations_are_equally_likely():
    orders = vmap(lambda step: rng.permutation(rng.key(0, step=step), 4))(torch.arange(1 << 14))
    assert torch.equal(orders.sort(-1).values, torch.arange(4).expand_as(orders))
    ranks = (orders * ORDERS).sum(-1).unique(return_inverse=True)[1]
    assert _chi_square(ranks, [1] * 24) > 1e-3


def test_samples_without_replacement_are_distinct():
    drawn = rng.multinomial(rng.key(0), torch.rand(100, 8, generator=torch.Generator().manual_seed(0)), num_samples=8)
    assert torch.equal(drawn.sort(-1).values, torch.arange(8).expand(100, -1))


def test_half_precision_is_uniform_on_its_grid():
    for dtype, significand in ((torch.bfloat16, 8), (torch.float16, 11)):
        drawn = rng.uniform(rng.key(0), [MANY], dtype=dtype).double() * 2**significand
        assert _chi_square(drawn.to(torch.int64), [1] * 2**significand) > 1e-3
        assert torch.equal(rng.normal(rng.key(0), [64], dtype=dtype), rng.normal(rng.key(0), [64]).to(dtype))


# Independence.


def _bits_of(words):
    return (words[..., None] >> torch.arange(32) & 1).to(torch.float64)


def test_bits_are_balanced():
    share = _bits_of(rng.bits(rng.key(5), [MANY])).mean(0)
    assert ((share - 0.5).abs() * 2 * math.sqrt(MANY)).max() < 4.5


@pytest.mark.parametrize("shift", [0, 9, 28])
def test_neighboring_samples_are_serially_independent(shift):
    nibbles = rng.bits(rng.key(6), [MANY]) >> shift & 15
    for lag in (1, 2, 4):
        assert _chi_square(nibbles[:-lag] * 16 + nibbles[lag:], [1] * 256) > 1e-3


def test_collisions_are_as_frequent_as_among_random_words():
    """The count is Poisson distributed with mean n^2 / 2^33. Keys vary in one coordinate at a time."""
    n = 1 << 17
    places = {
        "index": lambda: rng.bits(rng.key(0), [n]),
        "seed": lambda: vmap(lambda x: rng.bits(rng.key(x), [1]))(torch.arange(n)),
        "step": lambda: vmap(lambda x: rng.bits(rng.key(0, step=x), [1]))(torch.arange(n)),
        "microbatch and step": lambda: vmap(lambda x: rng.bits(rng.key(0, step=x >> 8, microbatch=x & 255), [1]))(
            torch.arange(n)
        ),
    }
    for place, draw in places.items():
        collisions = n - len(draw().unique())
        mean = n**2 / 2**33
        assert scipy.stats.poisson.cdf(collisions, mean) > 1e-3, place
        assert scipy.stats.poisson.sf(collisions - 1, mean) > 1e-3, place


@pytest.mark.parametrize(
    "other",
    [
        lambda key: key.replace(seed=1),
        lambda key: key.replace(seed=1 << 32),
        lambda key: key.replace(step=1),
        lambda key: key.replace(step=1 << 32),
        lambda key: key.replace(microbatch=1),
        lambda key: key.replace(stream=rng.Stream.EVAL),
        None,
    ],
    ids=["seed", "high seed", "step", "high step", "microbatch", "stream", "site"],
)
def test_neighboring_keys_and_sites_are_independent(other):
    key, n = rng.key(0), MANY
    words = rng.bits(key, [n])
    neighbours = rng.bits(key, [n], site=1) if other is None else rng.bits(other(key), [n])
    # Each output bit flips in half of the cases, and each pair of bits agrees in half of them.
    first, second = _bits_of(words) * 2 - 1, _bits_of(neighbours) * 2 - 1
    correlations = first.T @ second / math.sqrt(n)
    assert correlations.abs().max() < 5.0  # the maximum of 1024 standard normal samples: odds of 6e-4
    assert abs((correlations**2).sum().item() - 1024) < 4.5 * math.sqrt(2 * 1024)
