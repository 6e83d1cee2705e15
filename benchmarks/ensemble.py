"""Measures the step time of many tiny MLPs trained as one batch of runs, next to that of one run.

Times are the processor time of one thread, because other programs may use the machine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch

import fxtrain as fx
from benchmarks.measure import Seconds, alternate
from benchmarks.workloads import Workload, workload

PLAIN = "one run"
"""The compiled step of a single run, without an axis of members."""


def main(*, rounds: int, quick: bool) -> Seconds:
    """Returns processor seconds per step of all members, by number of members."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    torch.set_num_threads(1)
    try:
        made = workload("tiny_mlp", quick=quick)
        steps = 20 if quick else 100
        members = (1, 8) if quick else (1, 8, 32, 128)
        tx = fx.optim.adamw(made.learning_rate, weight_decay=made.weight_decay)
        single = fx.train_step(lambda model, batch: made.loss(model(batch["x"]), batch["y"]), tx)
        step = fx.compile(single, on_recompile="allow")

        def start(seed: int) -> fx.TrainState:
            return fx.init(made.module(), tx, seed=seed)

        turns = {PLAIN: turn_of(made, step, start(0), steps)}
        for count in members:
            runs = fx.ensemble.stack([start(seed) for seed in range(count)])
            turns[str(count)] = turn_of(made, step, runs, steps)
        return alternate(turns, rounds)
    finally:
        os.sched_setaffinity(0, cores)


def turn_of(made: Workload, step: Any, start: fx.TrainState, steps: int) -> Callable[[], float]:
    """Returns a function that takes steps with ``fit``'s own step, and returns the processor seconds of one."""
    # The donating step and the state that it takes, as `fit` calls them.
    taken: list[Any] = []

    def keep(state: fx.TrainState, event: fx.FitEnd, control: fx.Control) -> None:
        taken.append(state.copy())

    fx.fit(start, step, made.batches, steps=2, observers=keep, progress=False)
    compiled = (step.over_members() if start.step.ndim else step).with_donation()

    def turn() -> float:
        state = taken.pop()
        began = time.thread_time()
        for index in range(steps):
            state, _ = compiled(state, made.batches[index % len(made.batches)])
        seconds = (time.thread_time() - began) / steps
        taken.append(state)
        return seconds

    turn()
    return turn
