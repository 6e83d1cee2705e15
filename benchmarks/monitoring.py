"""Monitoring: what watching gradients, weights, updates and activations adds to a step of ``fxtrain lm``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

import fxtrain as fx
from benchmarks import lm
from benchmarks.bars import Verdict
from benchmarks.measure import Seconds, alternate, ratios
from fxtrain.callbacks import activation_stats, grad_flow, grad_norms, histograms, update_ratios, weight_stats

NONE, EVERY, HUNDREDTH = "none", "all, and activations, every step", "all, every 100th step"


def main(*, rounds: int, quick: bool) -> tuple[Seconds, list[Verdict]]:
    """Seconds a step, in turns of one process, with two threads, and what they come to."""
    torch.set_num_threads(2)
    steps = 4 if quick else 100  # a turn of a hundred steps has one that is measured
    made = {
        NONE: (lambda: (), lm.loss_fn),
        EVERY: (lambda: monitors(1), tapped()),
        HUNDREDTH: (lambda: monitors(100), lm.loss_fn),
    }
    found = alternate({name: turn_of(*parts, steps) for name, parts in made.items()}, min(rounds, 7))
    return found, [
        Verdict("All monitors, every step, over none", ratios(found[EVERY], found[NONE]), 1.05),
        Verdict("All monitors, every 100th step, over none", ratios(found[HUNDREDTH], found[NONE]), 1.01),
    ]


def monitors(every: int) -> Any:
    """All that watch; histograms of 4096 elements of each parameter."""
    return fx.compose(
        grad_norms(layer="*", every=every),
        grad_flow(every=every),
        weight_stats(every=every),
        *[histograms(of, every=every) for of in ("grads", "weights", "updates")],
        update_ratios(every=every),
    )


def tapped() -> Callable[..., Any]:
    return fx.tap(lm.loss_fn, "blocks.?", activation_stats)


def turn_of(callbacks: Callable[[], Any], loss_fn: Callable[..., Any], steps: int) -> Callable[[], float]:
    tx, watching = fx.optim.adamw(1e-3), callbacks()
    step = fx.compile(fx.train_step(loss_fn, tx, callbacks=watching), donate=True, on_recompile="error")
    state = fx.attach(fx.init(lm.model(), tx), watching)
    batches, _ = lm.data()
    some = [batches[index] for index in range(16)]

    def turn() -> float:
        nonlocal state
        began = time.perf_counter()
        for index in range(steps):
            state, _ = step(state, some[index % len(some)])
        return (time.perf_counter() - began) / steps

    turn()
    return turn
