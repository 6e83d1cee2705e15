"""Callbacks match short Python reference implementations on random metrics: ties, nan, inf, float32 and float64.

``FXTRAIN_FUZZ=5000 pytest tests/test_fuzz_callbacks.py`` runs 5000 cases per test. Hypothesis prints the smallest
failing case and the blob that reproduces it.
"""

import math
import os
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fxtrain as fx
from fxtrain import callbacks as cb
from fxtrain.core import Epoch

CASES = int(os.environ.get("FXTRAIN_FUZZ", "100"))
many = settings(max_examples=CASES, deadline=None, print_blob=True)

EPOCH = 5
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, 1.0 + 1e-12, 1.0 - 1e-12, 1.0 + 1e-7, 0.9, 0.1, 1e300, -1.0]
number = st.one_of(st.sampled_from(SPECIAL), st.integers(-4, 4).map(lambda n: n / 2), st.floats(-1e3, 1e3))
finite = number.filter(math.isfinite)
precision = st.sampled_from([torch.float32, torch.float64])
numpy_of = {torch.float32: np.float32, torch.float64: np.float64}


def same(got, wanted):
    return got == wanted or (math.isnan(got) and math.isnan(wanted))


def is_better(kind, mode, value, best, min_delta=0.0, relative=False):
    """Whether ``value`` improves on ``best``, in the precision of ``value``."""
    sign, best = kind(1 if mode == "min" else -1), kind(best)
    limit = sign * best
    if np.isfinite(best):
        limit = limit - (kind(min_delta) * abs(best) if relative else kind(min_delta))
    return bool(sign * value < limit)


def optional(strategy):
    return st.none() | strategy


@st.composite
def stopping(draw):
    return {
        "patience": draw(st.integers(1, 6)),
        "unit": draw(st.sampled_from(["evaluations", "steps", "epochs"])),
        "mode": draw(st.sampled_from(["min", "max"])),
        "min_delta": draw(st.sampled_from([0.0, 0.1, 0.5, 1e-12, 1e-7])),
        "relative": draw(st.booleans()),
        "baseline": draw(optional(finite)),
        "start_from": draw(st.integers(0, 3)),
    }


class Stopping:
    """Reference implementation of early stopping on Python scalars."""

    def __init__(self, options, begin):
        self.options, self.begin = options, begin
        self.best = math.inf if options["mode"] == "min" else -math.inf
        self.best_step, self.evaluations = -1, 0
        self.since = {"evaluations": 0, "steps": begin, "epochs": begin}[options["unit"]]

    def see(self, kind, value, step):
        o = self.options
        passed, now = (self.evaluations, self.evaluations + 1) if o["unit"] == "evaluations" else (step, step)
        scale = EPOCH if o["unit"] == "epochs" else 1
        watching = passed >= o["start_from"] * scale
        better = {"min_delta": o["min_delta"], "relative": o["relative"]}
        improved = watching and is_better(kind, o["mode"], value, self.best, **better)
        beats = improved and (o["baseline"] is None or is_better(kind, o["mode"], value, o["baseline"], **better))
        if improved:
            self.best, self.best_step = float(value), step
        if beats or not watching:
            self.since = now
        self.evaluations += 1
        return bool(watching and now - self.since >= o["patience"] * scale)


@many
@given(
    options=stopping(),
    values=st.lists(st.tuples(number, precision), min_size=1, max_size=12),
    begin=st.integers(0, 30),
    gap=st.integers(1, 7),
)
def test_early_stopping_matches_reference(options, values, begin, gap):
    start = fx.init({"w": torch.tensor(-1.0, dtype=torch.float64)})
    start = start.replace(step=torch.tensor(begin), position=torch.tensor(begin))
    start = Epoch(done=0, start=0, length=EPOCH).written_to(start)
    callback = fx.compose(cb.early_stopping("loss", **options))
    state, oracle, step = fx.attach(start, callback), Stopping(options, begin), begin
    with np.errstate(all="ignore"):
        for value, dtype in values:
            step += gap
            given_value = torch.tensor(value, dtype=dtype)
            state = state.replace(step=torch.tensor(step))
            event = fx.EvalEnd(step=step, position=step, epoch_length=EPOCH, metrics={"loss": given_value})
            state, control = callback(state, event)
            stop = oracle.see(numpy_of[dtype], numpy_of[dtype](value), step)
            memory = state.slots["early_stopping"]
            assert bool(control.any("stop")) == stop
            assert same(float(memory.best), oracle.best)
            scale = EPOCH if options["unit"] == "epochs" else 1
            assert (int(memory.best_step), round(float(memory.since) * scale, 6)) == (oracle.best_step, oracle.since)


@many
@given(
    mode=st.sampled_from(["min", "max"]),
    limits=st.tuples(finite, optional(finite)),
    values=st.lists(st.tuples(number, precision), min_size=1, max_size=12),
)
def test_limits_and_best_weights_match_reference(mode, limits, values):
    (target, worst), sign = limits, 1 if mode == "min" else -1
    parts = [
        cb.stop_at("loss", target, mode=mode),
        cb.stop_on_divergence("loss", worst, mode=mode),
        cb.restore_best("loss", mode=mode),
    ]
    callback = fx.compose(*parts)
    state = fx.attach(fx.init({"w": torch.tensor(0.0)}), callback)
    best, best_step = sign * math.inf, 0
    with np.errstate(all="ignore"):
        for step, (given_value, dtype) in enumerate(values, start=1):
            kind = numpy_of[dtype]
            value = kind(given_value)
            state = state.replace(step=torch.tensor(step), params={"w": torch.tensor(float(step))})
            event = fx.EvalEnd(step=step, metrics={"loss": torch.tensor(given_value, dtype=dtype)})
            state, control = callback(state, event)
            diverged = not np.isfinite(value) or (worst is not None and bool(sign * value >= sign * kind(worst)))
            assert bool(control.any("stop")) == (bool(sign * value <= sign * kind(target)) or diverged)
            if is_better(kind, mode, value, best):
                best, best_step = float(value), step
    ended, _ = callback(state, fx.FitEnd(step=step, reason=""))
    assert float(ended.params["w"]) == (best_step or step)


@many
@given(
    options=st.fixed_dictionaries(
        {
            "factor": st.sampled_from([0.1, 0.5, 0.9]),
            "patience": st.integers(0, 4),
            "cooldown": st.integers(0, 3),
            "mode": st.sampled_from(["min", "max"]),
            "minimum": st.sampled_from([0.0, 1e-3, 0.5]),
        }
    ),
    min_delta=st.sampled_from([0.0, 0.1, 1e-12]),
    values=st.lists(number, min_size=1, max_size=20),
)
def test_reduce_on_plateau_matches_torch(options, min_delta, values):
    weight = torch.nn.Parameter(torch.tensor(0.0, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer,
        mode=options["mode"],
        factor=options["factor"],
        patience=options["patience"],
        cooldown=options["cooldown"],
        min_lr=options["minimum"],
        threshold=min_delta,
        threshold_mode="abs",
        eps=0.0,
    )
    tx = fx.optim.inject_hyperparams(fx.optim.sgd)(learning_rate=1.0)
    callback = fx.compose(cb.reduce_on_plateau("loss", min_delta=min_delta, relative=False, **options))
    state = fx.attach(fx.init({"w": torch.tensor(0.0, dtype=torch.float64)}, tx), callback)
    for step, value in enumerate(values, start=1):
        event = fx.EvalEnd(step=step, metrics={"loss": torch.tensor(value, dtype=torch.float64)})
        state, _ = callback(state, event)
        scheduler.step(value)
        rate = float(fx.optim.get_hyperparams(state.opt_state)["learning_rate"])
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=0)
        assert int(state.slots["reduce_on_plateau"].bad) == scheduler.num_bad_epochs


@many
@given(
    mode=st.sampled_from(["min", "max"]),
    min_delta=st.sampled_from([0.0, 1e-4, 0.1]),
    patience=st.integers(0, 3),
    values=st.lists(st.tuples(number, precision), min_size=1, max_size=20),
)
def test_relative_plateau_matches_reference(mode, min_delta, patience, values):
    tx = fx.optim.inject_hyperparams(fx.optim.sgd)(learning_rate=1.0)
    callback = fx.compose(cb.reduce_on_plateau("loss", mode=mode, min_delta=min_delta, patience=patience, factor=0.5))
    state = fx.attach(fx.init({"w": torch.tensor(0.0)}, tx), callback)
    best, bad, reductions = math.inf if mode == "min" else -math.inf, 0, 0
    with np.errstate(all="ignore"):
        for step, (value, dtype) in enumerate(values, start=1):
            event = fx.EvalEnd(step=step, metrics={"loss": torch.tensor(value, dtype=dtype)})
            state, _ = callback(state, event)
            value = numpy_of[dtype](value)
            improved = is_better(numpy_of[dtype], mode, value, best, min_delta, relative=True)
            best, bad = (float(value), 0) if improved else (best, bad + 1)
            if bad > patience:
                bad, reductions = 0, reductions + 1
            memory = state.slots["reduce_on_plateau"]
            assert (int(memory.bad), int(memory.reductions)) == (bad, reductions)
            assert same(float(memory.best), best)


class Spikes:
    """Reference implementation of the spike guard on Python scalars."""

    def __init__(self, deviations, window, warmup, record):
        self.deviations, self.window, self.warmup, self.record = deviations, window, warmup, record
        self.values, self.in_a_row, self.found, self.banned, self.spikes = [], 0, [], [], 0

    def see(self, value, position):
        limit, banned = math.inf, position in self.banned
        if len(self.values) >= self.warmup:
            recent = self.values[-self.window :]
            median = statistics.median(recent)
            spread = 1.4826 * statistics.median([abs(v - median) for v in recent])
            limit = median + self.deviations * max(spread, 1e-3 * abs(median))
        spike = not banned and not (math.isfinite(value) and value <= limit)
        if spike:
            self.in_a_row, self.spikes = self.in_a_row + 1, self.spikes + 1
            self.found = [*self.found, position][-self.record :]
        elif not banned:
            self.in_a_row = 0
            self.values.append(value)
        return spike, banned

    def rewound(self):
        self.banned = sorted(self.banned + self.found)[-self.record :]
        self.found, self.in_a_row = [], 0


@many
@given(
    losses=st.lists(
        st.one_of(st.sampled_from([1.0, 1.0, 2.0, 50.0, -50.0, math.nan, math.inf, -math.inf, 1e39]), st.floats(-3, 3)),
        min_size=1,
        max_size=30,
    ),
    back=st.lists(st.booleans(), min_size=30, max_size=30),
    window=st.integers(2, 6),
    data=st.data(),
)
def test_spike_guard_matches_reference(losses, back, window, data):
    warmup, record = data.draw(st.integers(2, window)), data.draw(st.integers(1, 4))
    deviations, patience = data.draw(st.sampled_from([0.5, 3.0, 6.0])), data.draw(st.integers(1, 4))
    guard = fx.compose(
        cb.spike_guard(deviations=deviations, window=window, warmup=warmup, rewind=1, patience=patience, record=record)
    )
    state = fx.attach(fx.init({"w": torch.tensor(0.0)}), guard)
    oracle, position = Spikes(deviations, window, warmup, record), 0
    for loss, rewinds in zip(losses, back, strict=False):
        value = torch.tensor(loss, dtype=torch.float64)
        event = fx.Gradients(step=state.step + 1, loss=value, metrics={}, grads={})
        state, control = guard(state.replace(position=torch.tensor(position)), event)
        spike, banned = oracle.see(loss, position)
        assert bool(control.any("skip_update")) == (spike or banned)
        assert bool(control.any("stop")) == (oracle.in_a_row >= patience)
        assert int(state.slots["spike_guard"].spikes) == oracle.spikes
        _, control = guard(state, fx.StepEnd(step=1, metrics={}))
        # Only the presence of a rewind is compared, because the ring may still hold batches of an abandoned timeline.
        assert any(int(steps) > 0 for steps in control.rewind.values()) == bool(oracle.found)
        position += 1
        if oracle.found and rewinds:
            state, _ = guard(state, fx.Rewound(step=1, from_step=1, to_step=0, abandoned=range(0), times=1))
            oracle.rewound()
            position = max(0, position - 2)


@many
@given(
    steps=st.lists(st.tuples(number, st.lists(number, min_size=2, max_size=2)), min_size=1, max_size=15),
    patience=st.integers(1, 4),
    dtype=precision,
)
def test_nan_guard_matches_reference(steps, patience, dtype):
    guard = fx.compose(cb.nan_guard(patience=patience))
    zero = torch.zeros((), dtype=dtype)
    state = fx.attach(fx.init({"a": zero, "b": zero}, fx.optim.sgd(0.1)), guard)
    in_a_row = skipped = 0
    for step, (loss, grads) in enumerate(steps, start=1):
        a, b = (torch.tensor(grad, dtype=dtype) for grad in grads)
        loss = torch.tensor(loss, dtype=dtype)
        event = fx.Gradients(step=torch.tensor(step), loss=loss, metrics={}, grads={"a": a, "b": b})
        state, control = guard(state, event)
        good = all(map(math.isfinite, (float(loss), float(a), float(b))))
        in_a_row, skipped = (0, skipped) if good else (in_a_row + 1, skipped + 1)
        memory = state.slots["nan_guard"]
        assert (int(memory.in_a_row), int(memory.skipped)) == (in_a_row, skipped)
        assert bool(control.any("skip_update")) == (not good)
        assert bool(control.any("stop")) == (in_a_row >= patience)
        if not good:
            first = next((k for k, leaf in {"a": a, "b": b}.items() if not math.isfinite(float(leaf))), None)
            what = "the loss" if first is None else f"grads[{first!r}]"
            assert cb.first_not_finite(state) == f"{what} at step {step}"


@many
@given(
    steps=st.lists(st.tuples(st.floats(-10, 10), st.booleans()), min_size=1, max_size=15),
    decay=st.sampled_from([0.5, 0.9, 0.999, 0.999999, 0.999999999]),
    debias=st.booleans(),
    warmup=st.booleans(),
    every=st.integers(1, 3),
    start=st.integers(0, 4),
    mean=st.booleans(),
)
def test_weight_averages_match_reference(steps, decay, debias, warmup, every, start, mean):
    callback = fx.compose(
        cb.swa(start=start, every=every, name="average")
        if mean
        else cb.ema(decay, debias=debias, warmup=warmup, every=every, start=start, name="average")
    )
    first = torch.tensor([3.0, -1.0], dtype=torch.float64)
    state = fx.attach(fx.init({"w": first}), callback)
    average, weight, count = first.numpy(), 0.0, 0
    for step, (value, skipped) in enumerate(steps, start=1):
        now = torch.tensor([value, -value], dtype=torch.float64)
        state = state.replace(params={"w": now})
        zero = torch.tensor(0.0)
        event = fx.Updated(
            step=torch.tensor(step), loss=zero, metrics={}, grads={}, updates={}, skipped=torch.tensor(skipped)
        )
        state, _ = callback(state, event)
        if not skipped and step <= start:
            average = now.numpy()
        elif not skipped and step % every == 0:
            share = 1 / (count + 1) if mean else max(1 - decay, 9 / (10 + count)) if warmup else 1 - decay
            if debias and not mean:
                weight = weight + share * (1 - weight)
                share = share / weight
            average, count = average + share * (now.numpy() - average), count + 1
        seen = cb.averaged(state, "average").params["w"].numpy()
        np.testing.assert_allclose(seen, average, rtol=1e-12, atol=1e-13)
