"""Transformations with a counterpart in optax follow the same trajectories."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
import torch

from fxtrain import optim, schedules, tree

jax.config.update("jax_platforms", "cpu")

STEPS = 50
WARMUP = {"warmup_steps": 10, "decay_steps": 40, "end_value": 1e-4}


def _mask_tree(params):
    return {name: value.ndim > 1 for name, value in params.items()}


def _matrices(path, leaf):
    return leaf.ndim > 1


def jitted(tx):
    # Without jit, JAX would recompile the control flow in every step.
    return optax.GradientTransformation(tx.init, jax.jit(tx.update))


PAIRS = {
    "sgd": (optim.sgd(0.1), optax.sgd(0.1)),
    "momentum": (optim.sgd(0.1, momentum=0.9), optax.sgd(0.1, 0.9)),
    "nesterov": (optim.sgd(0.1, momentum=0.9, nesterov=True), optax.sgd(0.1, 0.9, nesterov=True)),
    "adam": (optim.adam(0.01), optax.adam(0.01)),
    "adam, eps_root": (
        optim.adam(0.01, b1=0.8, b2=0.95, eps=1e-6, eps_root=1e-4),
        optax.adam(0.01, 0.8, 0.95, 1e-6, 1e-4),
    ),
    "adam, no memory": (optim.adam(0.01, b1=0.0, b2=0.0), optax.adam(0.01, 0.0, 0.0)),
    "amsgrad": (optim.adam(0.01, amsgrad=True), optax.amsgrad(0.01)),
    "adamw": (optim.adamw(0.01, weight_decay=0.1), optax.adamw(0.01, weight_decay=0.1)),
    "adamw, mask": (
        optim.adamw(0.01, weight_decay=0.1, mask=_matrices),
        optax.adamw(0.01, weight_decay=0.1, mask=_mask_tree),
    ),
    "adamax": (optim.adamax(0.01), optax.adamax(0.01)),
    "nadam": (optim.nadam(0.01), optax.nadam(0.01)),
    "nadamw": (
        optim.adamw(0.01, weight_decay=0.1, nesterov=True),
        optax.nadamw(0.01, weight_decay=0.1),
    ),
    "radam": (optim.radam(0.01, b2=0.9), optax.radam(0.01, b2=0.9)),
    "lamb": (optim.lamb(0.01, weight_decay=0.1), optax.lamb(0.01, weight_decay=0.1)),
    "lion": (optim.lion(0.01, weight_decay=0.1), optax.lion(0.01, weight_decay=0.1)),
    "rmsprop": (optim.rmsprop(0.01), optax.rmsprop(0.01)),
    "rmsprop, all of it": (
        optim.rmsprop(0.01, initial_scale=0.5, eps_in_sqrt=False, momentum=0.9, nesterov=True, bias_correction=True),
        optax.rmsprop(0.01, 0.9, 1e-8, 0.5, False, False, 0.9, True, True),
    ),
    "rmsprop, centred": (
        optim.rmsprop(0.01, centered=True, eps=1e-4, momentum=0.9),
        optax.rmsprop(0.01, centered=True, eps=1e-4, momentum=0.9),
    ),
    "rmsprop, centred and corrected": (
        optim.rmsprop(0.01, centered=True, eps=1e-2, bias_correction=True),
        optax.rmsprop(0.01, centered=True, eps=1e-2, bias_correction=True),
    ),
    "adagrad": (optim.adagrad(0.1), optax.adagrad(0.1)),
    "adadelta": (optim.adadelta(1.0, weight_decay=0.1), optax.adadelta(1.0, weight_decay=0.1)),
    "factored rms": (
        optim.scale_by_factored_rms(min_dim_size_to_factor=3),
        optax.scale_by_factored_rms(min_dim_size_to_factor=3),
    ),
    "adafactor": (
        optim.adafactor(0.01, min_dim_size_to_factor=3, momentum=0.9, weight_decay_rate=1e-3, mask=_matrices),
        optax.adafactor(
            0.01, min_dim_size_to_factor=3, momentum=0.9, weight_decay_rate=1e-3, weight_decay_mask=_mask_tree
        ),
    ),
    "adafactor, bare": (
        optim.adafactor(0.01, factored=False, clipping_threshold=None, multiply_by_parameter_scale=False),
        optax.adafactor(0.01, factored=False, clipping_threshold=None, multiply_by_parameter_scale=False),
    ),
    "ema": (optim.ema(0.9), optax.ema(0.9)),
    "ema, biased": (optim.ema(0.9, debias=False), optax.ema(0.9, debias=False)),
    "clip": (optim.clip_by_value(0.5), optax.clip(0.5)),
    "global norm": (optim.clip_by_global_norm(2.0), optax.clip_by_global_norm(2.0)),
    "block rms": (optim.clip_by_block_rms(0.5), optax.clip_by_block_rms(0.5)),
    "trust ratio": (
        optim.scale_by_trust_ratio(min_norm=0.1, trust_coefficient=0.5, eps=0.1),
        optax.scale_by_trust_ratio(0.1, 0.5, 0.1),
    ),
    "param rms": (optim.scale_by_param_block_rms(min_scale=0.1), optax.scale_by_param_block_rms(0.1)),
    "decay on a schedule": (
        optim.add_decayed_weights(schedules.linear(0.0, 0.1, transition_steps=20)),
        optax.add_decayed_weights(optax.linear_schedule(0.0, 0.1, 20)),
    ),
    "a chain": (
        optim.chain(
            optim.clip_by_global_norm(1.0),
            optim.adamw(schedules.warmup_cosine_decay(0.0, 0.01, **WARMUP), weight_decay=0.1),
        ),
        optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.01, **WARMUP), weight_decay=0.1),
        ),
    ),
    "masked": (
        optim.masked(optim.adam(0.01), _matrices),
        optax.masked(optax.adam(0.01), _mask_tree),
    ),
    "partition": (
        optim.partition(
            {"a": optim.adam(0.01), "b": optim.sgd(0.1), "c": optim.set_to_zero()},
            {"bias": "c", "conv": "a", "matrix": "a", "scalar": "b"},
        ),
        optax.partition(
            {"a": optax.adam(0.01), "b": optax.sgd(0.1), "c": optax.set_to_zero()},
            {"bias": "c", "conv": "a", "matrix": "a", "scalar": "b"},
        ),
    ),
    "apply_if_finite": (
        optim.apply_if_finite(optim.adam(0.01), max_consecutive=2),
        jitted(optax.apply_if_finite(optax.adam(0.01), 2)),
    ),
    "injected": (
        optim.inject_hyperparams(optim.adamw)(
            learning_rate=schedules.warmup_cosine_decay(0.0, 0.01, **WARMUP), weight_decay=0.1, b1=0.8
        ),
        optax.inject_hyperparams(optax.adamw)(
            learning_rate=optax.warmup_cosine_decay_schedule(0.0, 0.01, **WARMUP), weight_decay=0.1, b1=0.8
        ),
    ),
}
# Both libraries compute these schedules, or the decay of the factored average, in float32.
SINGLE = {"a chain", "injected", "factored rms", "adafactor", "adafactor, bare", "decay on a schedule"}
TRIPLES = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037))
SHAPES = {"bias": (7,), "conv": (5, 2, 4), "matrix": (4, 6), "scalar": ()}


def trajectories(ours, theirs, *, shapes=SHAPES, dtype=np.float64, poison=()):
    """Yields the parameters of both optimizers after each step, with equal starts and gradients."""
    generator = np.random.default_rng(0)

    def draw():
        parts = {name: generator.normal(size=shape) for name, shape in shapes.items()}
        if np.issubdtype(dtype, np.complexfloating):
            parts = {name: part + 1j * generator.normal(size=part.shape) for name, part in parts.items()}
        return {name: np.asarray(part, dtype) for name, part in parts.items()}

    start = draw()
    params = tree.map(torch.from_numpy, start)
    state = ours.init(params)
    with jax.enable_x64(True):
        their_params = jax.tree.map(jnp.asarray, start)
        their_state = theirs.init(their_params)
    for step in range(STEPS):
        grads = draw()
        if step in poison:
            grads["matrix"][0, 0] = np.nan
        updates, state = ours.update(tree.map(torch.from_numpy, grads), state, params)
        params = optim.apply_updates(params, updates)
        with jax.enable_x64(True):
            their_updates, their_state = theirs.update(jax.tree.map(jnp.asarray, grads), their_state, their_params)
            their_params = optax.apply_updates(their_params, their_updates)
        yield params, jax.tree.map(np.asarray, their_params)


def assert_same(pairs, rtol):
    for params, expected in pairs:
        for name, value in expected.items():
            np.testing.assert_allclose(params[name].numpy(), value, rtol=rtol, atol=rtol, err_msg=name)


@pytest.mark.parametrize("name", PAIRS)
def test_trajectories_match_optax(name):
    poison = (3, 10, 11, 12, 13) if name == "apply_if_finite" else ()
    assert_same(trajectories(*PAIRS[name], poison=poison), rtol=1e-6 if name in SINGLE else 1e-11)


@pytest.mark.parametrize("name", ["momentum", "adamw", "lamb", "rmsprop, all of it", "adagrad", "global norm"])
def test_complex_trajectories_match_optax(name):
    assert_same(trajectories(*PAIRS[name], dtype=np.complex128), rtol=1e-11)


def test_split_real_and_imaginary_matches_optax():
    ours = optim.split_real_and_imaginary(optim.adamw(0.01, weight_decay=0.1))
    theirs = optax.contrib.split_real_and_imaginary(optax.adamw(0.01, weight_decay=0.1))
    assert_same(trajectories(ours, theirs, dtype=np.complex128), rtol=1e-11)


@pytest.mark.parametrize(
    ("shape", "options"),
    [((6, 4), {}), ((4, 6), {"nesterov": False}), ((5, 5), {"consistent_rms": 0.2}), ((6, 4), {"ns_coeffs": TRIPLES})],
)
def test_muon_matches_optax_on_transposed_matrices(shape, options):
    # Matrices are [in, out] in optax and [out, in] in torch. Orthogonalization commutes with transposition.
    shapes = {"bias": (7,), "matrix": shape}
    ours = optim.muon(0.02, weight_decay=0.1, ns_steps=len(TRIPLES), **options)
    theirs = optax.contrib.muon(0.02, weight_decay=0.1, ns_steps=len(TRIPLES), **options)

    def flip(params):
        return {**params, "matrix": params["matrix"].T}

    def update(grads, state, params):
        updates, state = theirs.update(flip(grads), state, flip(params))
        return flip(updates), state

    transposed = jitted(optax.GradientTransformation(lambda params: theirs.init(flip(params)), update))
    assert_same(trajectories(ours, transposed, shapes=shapes), rtol=1e-10)
