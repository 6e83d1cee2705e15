"""Schedules equal those of optax, for steps that are tensors, ints, batched or compiled."""

import math

import jax
import numpy as np
import optax
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from fxtrain import schedules

jax.config.update("jax_platforms", "cpu")

PAIRS = {
    "constant": (schedules.constant(0.3), optax.constant_schedule(0.3)),
    "linear": (
        schedules.linear(0.1, 2.0, transition_steps=40, transition_begin=5),
        optax.linear_schedule(0.1, 2.0, 40, 5),
    ),
    "polynomial": (
        schedules.polynomial(2.0, 0.1, power=2.5, transition_steps=60),
        optax.polynomial_schedule(2.0, 0.1, 2.5, 60),
    ),
    "cosine": (
        schedules.cosine(0.7, 80, alpha=0.1, exponent=1.5),
        optax.cosine_decay_schedule(0.7, 80, 0.1, 1.5),
    ),
    "exponential": (
        schedules.exponential(0.7, 20, decay_rate=0.5, transition_begin=10, end_value=0.1),
        optax.exponential_decay(0.7, 20, 0.5, 10, end_value=0.1),
    ),
    "growth": (
        schedules.exponential(0.7, 20, decay_rate=2.0, staircase=True, end_value=4.0),
        optax.exponential_decay(0.7, 20, 2.0, staircase=True, end_value=4.0),
    ),
    "piecewise constant": (
        schedules.piecewise(1.0, {60: 0.5, 20: 0.1}),
        optax.piecewise_constant_schedule(1.0, {60: 0.5, 20: 0.1}),
    ),
    "piecewise linear": (
        schedules.piecewise(1.0, {20: 0.1, 60: 5.0}, interpolation="linear"),
        optax.piecewise_interpolate_schedule("linear", 1.0, {20: 0.1, 60: 5.0}),
    ),
    "piecewise cosine": (
        schedules.piecewise(1.0, {20: 0.1, 60: 5.0}, interpolation="cosine"),
        optax.piecewise_interpolate_schedule("cosine", 1.0, {20: 0.1, 60: 5.0}),
    ),
    "one cycle": (schedules.one_cycle(90, 0.3), optax.cosine_onecycle_schedule(90, 0.3)),
    "linear one cycle": (
        schedules.one_cycle(90, 0.3, interpolation="linear"),
        optax.linear_onecycle_schedule(90, 0.3),
    ),
    "warmup cosine": (
        schedules.warmup_cosine_decay(0.1, 0.7, warmup_steps=10, decay_steps=80, end_value=0.05, exponent=1.2),
        optax.warmup_cosine_decay_schedule(0.1, 0.7, 10, 80, 0.05, 1.2),
    ),
    "warmup exponential": (
        schedules.warmup(schedules.exponential(0.7, 20, decay_rate=0.5), 10, init_value=0.1),
        optax.warmup_exponential_decay_schedule(0.1, 0.7, 10, 20, 0.5),
    ),
    "join": (
        schedules.join(
            [schedules.linear(0.0, 1.0, transition_steps=10), schedules.cosine(1.0, 30), schedules.constant(0.2)],
            [10, 50],
        ),
        optax.join_schedules(
            [optax.linear_schedule(0.0, 1.0, 10), optax.cosine_decay_schedule(1.0, 30), optax.constant_schedule(0.2)],
            [10, 50],
        ),
    ),
}
STEPS = (0, 1, 4, 9, 10, 11, 19, 20, 27, 49, 50, 59, 60, 76, 79, 80, 90, 200)


@pytest.mark.parametrize("name", PAIRS)
def test_schedule_equals_optax(name):
    ours, theirs = PAIRS[name]
    with jax.enable_x64(True):
        expected = [float(theirs(step)) for step in STEPS]
    for found in (
        [ours(step) for step in STEPS],
        [ours(torch.tensor(step)) for step in STEPS],
        torch.func.vmap(ours)(torch.tensor(STEPS)),
    ):
        np.testing.assert_allclose(np.array([float(value) for value in found]), expected, rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize("name", PAIRS)
def test_schedule_returns_a_float64_scalar(name):
    for step in (3, torch.tensor(3)):
        value = PAIRS[name][0](step)
        assert (value.dtype, value.shape) == (torch.float64, torch.Size([]))


@pytest.mark.parametrize("name", PAIRS)
def test_new_step_does_not_recompile(name):
    torch._dynamo.reset()  # All schedules share one code object, and Dynamo limits the graphs of a code object.
    counter = CompileCounter()
    compiled = torch.compile(PAIRS[name][0], fullgraph=True, backend=counter)
    for step in range(0, 60, 7):
        torch.testing.assert_close(compiled(torch.tensor(step)), PAIRS[name][0](step))
    # A schedule that only clones a constant may need no graph at all.
    assert counter.frame_count <= 1


def test_schedule_of_a_tensor_value_can_be_vmapped():
    peaks = torch.tensor([0.1, 1.0])
    found = torch.func.vmap(lambda peak: schedules.warmup(schedules.cosine(peak, 90), 10)(55))(peaks)
    torch.testing.assert_close(found, peaks.double() * 0.5)


def test_inverse_sqrt_with_warmup_equals_the_transformer_schedule():
    schedule = schedules.warmup(schedules.inverse_sqrt(0.5, 100), 100)
    for step in (1, 50, 100, 101, 400, 10_000):
        assert float(schedule(step)) == pytest.approx(0.5 * 100**0.5 * min(step**-0.5, step * 100**-1.5), rel=1e-6)


def test_transition_begin_beyond_float32_integers_is_exact():
    # float32 cannot represent 2**24 + 1, so the difference from transition_begin must be taken in integers.
    schedule = schedules.linear(0.0, 1.0, transition_steps=4, transition_begin=2**24)
    assert [float(schedule(2**24 + step)) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: schedules.cosine(1.0, 0),
            "expected decay_steps to be a positive int, got 0.",
        ),
        (
            lambda: schedules.linear(0.0, 1.0, transition_steps=1.5),
            "expected transition_steps to be a positive int, got 1.5.",
        ),
        (
            lambda: schedules.one_cycle(0.1, 100),
            "expected transition_steps to be a positive int, got 0.1.",
        ),
        (
            lambda: schedules.one_cycle(10, 0.1, pct_start=0.9),
            "expected 0 < pct_start < pct_final < 1, got pct_start=0.9, pct_final=0.85.",
        ),
        (
            lambda: schedules.one_cycle(10, 0.1, div_factor=0.0),
            "expected div_factor to be above 0, got 0.0.",
        ),
        (
            lambda: schedules.exponential(1.0, 10, decay_rate=0.0),
            "expected decay_rate to be above 0, got 0.0.",
        ),
        (
            lambda: schedules.exponential(1.0, 10, decay_rate=torch.tensor(0.5), end_value=0.1),
            "expected decay_rate to be a Python scalar, because end_value is given, got a float32 tensor of shape []. "
            "Its value decides whether end_value is a lower or an upper bound.",
        ),
        (
            lambda: schedules.warmup_cosine_decay(0.0, 1.0, warmup_steps=10, decay_steps=10),
            "expected decay_steps to be larger than warmup_steps=10, got 10. It includes the warmup.",
        ),
        (
            lambda: schedules.piecewise(1.0, {}, interpolation="cubic"),
            "expected interpolation to be one of 'constant', 'linear', 'cosine', got 'cubic'.",
        ),
        (
            lambda: schedules.piecewise(1.0, {-1: 0.5}),
            "expected boundaries to be non-negative numbers, got -1.",
        ),
        (
            lambda: schedules.join([schedules.constant(1.0)], [5]),
            "expected one more schedule than boundaries, got 1 schedules and 1 boundaries.",
        ),
        (
            lambda: schedules.join([schedules.constant(1.0)] * 3, [5, 5]),
            "expected boundaries to be increasing, got [5, 5].",
        ),
    ],
)
def test_invalid_schedule_arguments_are_refused(make, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        make()
    assert str(caught.value) == message


EXACT = {
    "exponential": (
        lambda: schedules.exponential(1.0, 1, decay_rate=0.9999999),
        lambda step: 0.9999999**step,
    ),
    "exponential, staircase": (
        lambda: schedules.exponential(1.0, 3, decay_rate=0.5, staircase=True, transition_begin=16_777_200),
        lambda step: 0.5 ** (max(step - 16_777_200, 0) // 3),
    ),
    "linear": (
        lambda: schedules.linear(0.0, 1.0, transition_steps=100, transition_begin=16_777_200),
        lambda step: min(max(step - 16_777_200, 0), 100) / 100,
    ),
    "cosine near its end": (
        lambda: schedules.cosine(1.0, 16_777_300),
        lambda step: 0.5 * (1 + math.cos(math.pi * min(step / 16_777_300, 1))),
    ),
    "piecewise": (
        lambda: schedules.piecewise(1.0, {16_777_200: 1.0, 16_777_300: 0.0}, interpolation="linear"),
        lambda step: 1 - min(max(step - 16_777_200, 0), 100) / 100,
    ),
    "warmup": (lambda: schedules.warmup(schedules.constant(1.0), 16_777_300), lambda step: min(step / 16_777_300, 1)),
}


@pytest.mark.parametrize("step", [16_777_203, 16_777_216, 16_777_217, 16_777_219, 16_777_299])
@pytest.mark.parametrize("name", EXACT)
def test_steps_beyond_float32_integers_are_exact(name, step):
    make, wanted = EXACT[name]
    assert float(make()(torch.tensor(step))) == pytest.approx(wanted(step), rel=2e-7, abs=1e-15)
