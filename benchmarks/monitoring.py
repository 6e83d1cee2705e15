"""Measures the cost of monitoring gradients, weights, updates and activations in ``fxtrain lm``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import fxtrain as fx
from benchmarks import lm
from benchmarks.bars import Verdict
from benchmarks.measure import Seconds, alternate, ratios
from fxtrain.callbacks import activation_stats, grad_flow, grad_norms, histograms, update_ratios, weight_stats

STEPS = 4  # per turn
WHY = (
    "With one thread, monitors every 100 steps take 1.004 (6 fresh states, 72 alternating turns). With two, in a "
    "profile of 40 interleaved steps, fused kernels take 16.3 ms with them and 15.3 ms without, calls that allocate "
    "tensors and views 1.4 and 1.1 ms, and the same matmuls 76.9 and 75.6 ms: gradients and updates that a monitor "
    "may read live to the end of the step, so they cannot share memory, and the results of matmuls are written to "
    "memory that is in no cache."
)
NONE, EVERY, HUNDREDTH = "none", "all and activations, every step", "all, every 100 steps"


def main(*, rounds: int, quick: bool) -> tuple[Seconds, list[Verdict]]:
    """Returns seconds per step by monitors, and the verdicts. All runs take turns in one process with two threads."""
    torch.set_num_threads(2)
    made = {
        NONE: (lambda: (), lm.loss_fn),
        EVERY: (lambda: monitors(1), tapped()),
        HUNDREDTH: (lambda: monitors(100), lm.loss_fn),
    }
    runs = {name: Run(*parts) for name, parts in made.items()}
    found: Seconds = {name: [] for name in runs}
    for _ in range(1 if quick else 2 * rounds):
        # Fresh states in each round, because memory placement is random and changes the step time by some percent.
        for run in runs.values():
            run.restart()
        # With HUNDREDTH, one of 100 steps has monitors. 100 steps outlast the drift of the machine's speed, so they are
        # divided into many turns.
        short = alternate(runs, 2 if quick else 100 // STEPS)
        for name, seconds in short.items():
            found[name].append(statistics.fmean(seconds))
    return found, [
        Verdict("All monitors, every step, relative to none", ratios(found[EVERY], found[NONE]), 1.05),
        Verdict("All monitors, every 100 steps, relative to none", ratios(found[HUNDREDTH], found[NONE]), 1.01, WHY),
    ]


def monitors(every: int) -> Any:
    """Returns all monitors. Histograms sample 4096 elements of each parameter."""
    return fx.compose(
        grad_norms(layer="*", every=every),
        grad_flow(every=every),
        weight_stats(every=every),
        *[histograms(of, every=every) for of in ("grads", "weights", "updates")],
        update_ratios(every=every),
    )


def tapped() -> Callable[..., Any]:
    return fx.tap(lm.loss_fn, "blocks.?", activation_stats)


class Run:
    """A training run. Each call takes some steps and returns the seconds per step."""

    def __init__(self, callbacks: Callable[[], Any], loss_fn: Callable[..., Any]) -> None:
        tx, watching = fx.optim.adamw(1e-3), callbacks()
        self._step = fx.compile(fx.train_step(loss_fn, tx, callbacks=watching), donate=True, on_recompile="error")
        self._first = fx.attach(fx.init(lm.model(), tx), watching)
        batches, _ = lm.data()
        self._batches = [batches[index] for index in range(STEPS)]

    def restart(self) -> None:
        """Restarts from a copy of the first state, in other memory, and runs one warm-up turn."""
        self._state = self._first.copy()
        self()

    def __call__(self) -> float:
        began = time.perf_counter()
        for batch in self._batches:
            self._state, _ = self._step(self._state, batch)
        return (time.perf_counter() - began) / STEPS
