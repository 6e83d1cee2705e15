"""Optimizers match optax and ``torch.optim`` in float64 on random trees, options, gradients and chains.

``FXTRAIN_FUZZ=5000 pytest tests/test_fuzz_optim.py`` runs 5000 cases per test. Hypothesis prints the smallest failing
case and the blob that reproduces it.
"""

import os
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxtrain import optim, tree

jax.config.update("jax_platforms", "cpu")

CASES = int(os.environ.get("FXTRAIN_FUZZ", "25"))
many = settings(max_examples=CASES, deadline=None, print_blob=True)

Pair = namedtuple("Pair", ["first", "second"])

# Few shapes, because jax compiles each operation once per shape.
shape = st.sampled_from([(), (3,), (2, 3), (2, 3, 2), (0,), (1, 1)])
trees = st.recursive(
    shape.map(np.empty),
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from("abcd"), inner, min_size=1, max_size=3),
        st.lists(inner, min_size=1, max_size=3),
        st.tuples(inner),
        st.builds(Pair, inner, inner),
    ),
    max_leaves=5,
)
seeds = st.integers(0, 2**31)

rate = st.sampled_from([1e-3, 0.1, 1.0])
decay = st.sampled_from([0.0, 0.5, 0.9, 0.99])
slow = st.sampled_from([0.5, 0.9, 0.99, 0.999])
eps = st.sampled_from([1e-8, 1e-3, 0.1])
weight_decay = st.sampled_from([0.0, 0.01, 0.5])


def one_of_the_leaves(path, leaf):
    return leaf.ndim != 1


def mask_for_optax(params):
    return jax.tree.map(lambda leaf: leaf.ndim != 1, params)


def gradients(generator, like):
    """Returns gradients of random magnitude, sometimes all zero."""
    size = 10.0 ** generator.integers(-4, 3)
    kept = generator.random() < 0.9

    def draw(leaf):
        return np.asarray(generator.normal(size=leaf.shape) * size * kept)

    return jax.tree.map(draw, like)


@st.composite
def pieces(draw):
    """Draws a pair of equivalent transformations: fxtrain's and optax's."""
    kind = draw(st.sampled_from(sorted(PIECES)))
    return PIECES[kind](draw)


def _adam(draw):
    b1, b2, e, root = draw(decay), draw(slow), draw(eps), draw(st.sampled_from([0.0, 1e-4]))
    nesterov = draw(st.booleans())
    return (
        optim.scale_by_adam(b1=b1, b2=b2, eps=e, eps_root=root, nesterov=nesterov),
        optax.scale_by_adam(b1, b2, e, root, nesterov=nesterov),
    )


def _rms(draw):
    centered, corrected, inside = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    start = draw(st.sampled_from([0.0, 0.5]))
    d, e = draw(slow), draw(st.sampled_from([1e-3, 0.1]))
    ours = optim.scale_by_stddev if centered else optim.scale_by_rms
    theirs = optax.scale_by_stddev if centered else optax.scale_by_rms
    if centered:
        start, e = 1.0, 0.5  # the variance of a single gradient is rounding error, so eps must dominate
    return (
        ours(decay=d, eps=e, initial_scale=start, eps_in_sqrt=inside, bias_correction=corrected),
        theirs(d, e, start, eps_in_sqrt=inside, bias_correction=corrected),
    )


def _same(ours, theirs, **strategies):
    def make(draw):
        options = {name: draw(strategy) for name, strategy in strategies.items()}
        return ours(**options), theirs(**options)

    return make


def _decayed(draw):
    w, is_masked = draw(weight_decay), draw(st.booleans())
    return (
        optim.add_decayed_weights(w, one_of_the_leaves if is_masked else None),
        optax.add_decayed_weights(w, mask_for_optax if is_masked else None),
    )


def _masked(draw):
    ours, theirs = draw(pieces())
    return optim.masked(ours, one_of_the_leaves), optax.masked(theirs, mask_for_optax)


def _scheduled(draw):
    start = draw(rate)
    return (
        optim.scale_by_learning_rate(lambda count: start / (1 + count.double())),
        optax.scale_by_learning_rate(lambda count: start / (1 + count.astype(jnp.float64))),
    )


PIECES = {
    "adam": _adam,
    "amsgrad": _same(optim.scale_by_amsgrad, optax.scale_by_amsgrad, b1=decay, b2=slow, eps=eps),
    "adamax": _same(optim.scale_by_adamax, optax.scale_by_adamax, b1=decay, b2=slow, eps=eps),
    "lion": _same(optim.scale_by_lion, optax.scale_by_lion, b1=decay, b2=slow),
    "rms": _rms,
    "adadelta": _same(optim.scale_by_adadelta, optax.scale_by_adadelta, rho=decay, eps=eps),
    "adagrad": _same(
        optim.scale_by_rss, optax.scale_by_rss, initial_accumulator_value=st.sampled_from([0.1, 1.0]), eps=eps
    ),
    "trace": _same(optim.trace, optax.trace, decay=decay, nesterov=st.booleans()),
    "ema": _same(optim.ema, optax.ema, decay=decay, debias=st.booleans()),
    "trust ratio": _same(optim.scale_by_trust_ratio, optax.scale_by_trust_ratio, min_norm=st.sampled_from([0.0, 0.1])),
    "decay": _decayed,
    "block rms": lambda draw: (optim.clip_by_block_rms(0.5), optax.clip_by_block_rms(0.5)),
    "global norm": lambda draw: (optim.clip_by_global_norm(1.0), optax.clip_by_global_norm(1.0)),
    "value": lambda draw: (optim.clip_by_value(0.5), optax.clip(0.5)),
    "scale": _same(
        lambda factor: optim.scale(factor), lambda factor: optax.scale(factor), factor=st.sampled_from([-1.0, 0.1])
    ),
    "schedule": _scheduled,
    "masked": _masked,
}


def with_means(tx, k):
    """Applies ``tx`` to the mean of every k gradients. ``optax.MultiSteps`` computes that mean in float32."""

    def update(grads, opt_state, params):
        inner, seen = opt_state
        seen = [*seen, grads]
        if len(seen) < k:
            return jax.tree.map(jnp.zeros_like, grads), (inner, seen)
        updates, inner = tx.update(jax.tree.map(lambda *parts: sum(parts) / k, *seen), inner, params)
        return updates, (inner, [])

    return optax.GradientTransformation(lambda params: (tx.init(params), []), update)


def wrapped(draw, ours, theirs):
    match draw(st.sampled_from(["alone", "alone", "every_k", "partition", "injected"])):
        case "every_k":
            k = draw(st.integers(1, 3))
            return optim.every_k(ours, k), with_means(theirs, k)
        case "partition":
            other = draw(rate)
            label = lambda leaf: "a" if leaf.ndim != 1 else "b"  # noqa: E731
            return (
                optim.partition({"a": ours, "b": optim.sgd(other)}, lambda path, leaf: label(leaf)),
                optax.partition({"a": theirs, "b": optax.sgd(other)}, lambda params: jax.tree.map(label, params)),
            )
        case "injected":
            size = draw(rate)
            return (
                optim.chain(ours, optim.inject_hyperparams(optim.sgd)(learning_rate=size)),
                optax.chain(theirs, optax.inject_hyperparams(optax.sgd)(learning_rate=size)),
            )
    return ours, theirs


def as_tensors(values):
    return tree.map(lambda leaf: torch.from_numpy(np.array(leaf)), values)


@pytest.mark.slow
@many
@given(like=trees, seed=seeds, data=st.data())
def test_random_chains_match_optax(like, seed, data):
    generator = np.random.default_rng(seed)
    chosen = data.draw(st.lists(pieces(), min_size=1, max_size=4))
    ours, theirs = wrapped(data.draw, optim.chain(*[a for a, _ in chosen]), optax.chain(*[b for _, b in chosen]))
    start = jax.tree.map(lambda leaf: np.asarray(generator.normal(size=leaf.shape)), like)
    params = as_tensors(start)
    state = ours.init(params)
    with jax.enable_x64(True), np.errstate(all="ignore"):
        their_params = jax.tree.map(jnp.asarray, start)
        their_state = theirs.init(their_params)
        for _ in range(4):
            grads = gradients(generator, like)
            updates, state = ours.update(as_tensors(grads), state, params)
            their_updates, their_state = theirs.update(jax.tree.map(jnp.asarray, grads), their_state, their_params)
            for path, got, wanted in zip(
                tree.paths(updates, "updates"), tree.leaves(updates), jax.tree.leaves(their_updates), strict=True
            ):
                np.testing.assert_allclose(got.numpy(), np.asarray(wanted), rtol=1e-10, atol=1e-12, err_msg=path)
            # Both continue from the same parameters, because a sign or a clip could amplify a rounding error to a step.
            params = as_tensors(jax.tree.map(np.asarray, optax.apply_updates(their_params, their_updates)))
            their_params = jax.tree.map(jnp.asarray, tree.map(lambda leaf: leaf.numpy(), params))


betas = st.tuples(decay, slow)
TORCH = {
    "SGD": {
        "lr": rate,
        "momentum": decay,
        "dampening": st.sampled_from([0.0, 0.3]),
        "weight_decay": weight_decay,
        "maximize": st.booleans(),
    },
    "Adam": {
        "lr": rate,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "amsgrad": st.booleans(),
        "maximize": st.booleans(),
        "decoupled_weight_decay": st.booleans(),
    },
    "AdamW": {"lr": rate, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": st.booleans()},
    "Adamax": {"lr": rate, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": st.booleans()},
    "NAdam": {
        "lr": rate,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "momentum_decay": st.sampled_from([4e-3, 0.1]),
        "decoupled_weight_decay": st.booleans(),
    },
    "RAdam": {"lr": rate, "betas": betas, "eps": eps, "weight_decay": weight_decay},
    "RMSprop": {
        "lr": rate,
        "alpha": slow,
        "eps": st.sampled_from([1e-3, 0.1]),
        "weight_decay": weight_decay,
        "momentum": decay,
    },
    "Adagrad": {
        "lr": rate,
        "lr_decay": st.sampled_from([0.0, 0.1]),
        "weight_decay": weight_decay,
        "initial_accumulator_value": st.sampled_from([0.0, 0.5]),
        "eps": eps,
    },
    "Adadelta": {"lr": rate, "rho": slow, "eps": eps, "weight_decay": weight_decay},
    "ASGD": {"lr": rate, "lambd": st.sampled_from([1e-4, 0.1]), "t0": st.sampled_from([1e6, 3.0])},
    "Rprop": {"lr": st.sampled_from([1e-3, 0.1]), "etas": st.sampled_from([(0.5, 1.2), (0.3, 1.5)])},
    "Adafactor": {
        "lr": rate,
        "beta2_decay": st.sampled_from([-0.8, -0.5]),
        "d": st.sampled_from([1.0, 2.0]),
        "weight_decay": weight_decay,
    },
}


@pytest.fixture(autouse=True)
def double():
    """Float64 as the default dtype, because torch.optim stores counts and values derived from them in it."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", TORCH)
def test_random_options_match_torch_optim(name):
    @settings(max_examples=2 * CASES, deadline=None, print_blob=True)
    @given(like=trees, seed=seeds, options=st.fixed_dictionaries({}, optional=TORCH[name]))
    def check(like, seed, options):
        if name == "Adafactor":  # torch's Adafactor divides by the number of elements
            like = jax.tree.map(lambda leaf: leaf if leaf.size else np.empty(3), like)
        generator = np.random.default_rng(seed)
        tx = optim.from_torch(getattr(torch.optim, name), **options)
        params = as_tensors(jax.tree.map(lambda leaf: np.asarray(generator.normal(size=leaf.shape)), like))
        theirs = tree.leaves(tree.clone(params))
        optimizer, state = getattr(torch.optim, name)(theirs, **options), tx.init(params)
        for _ in range(6):
            grads = as_tensors(gradients(generator, like))
            updates, state = tx.update(grads, state, params)
            params = optim.apply_updates(params, updates)
            for value, grad in zip(theirs, tree.leaves(grads), strict=True):
                value.grad = grad.clone()
            optimizer.step()
            for path, got, wanted in zip(tree.paths(params, "params"), tree.leaves(params), theirs, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12, msg=lambda m, p=path: f"{p}: {m}")

    check()
