"""Measures the step time of many tiny MLPs trained as one vmapped state."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

import fxtrain as fx
from benchmarks.measure import Seconds, alternate
from benchmarks.workloads import Workload, workload


def main(*, rounds: int, quick: bool) -> Seconds:
    """Returns seconds per step of all members, by number of members."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    torch.set_num_threads(1)
    try:
        made = workload("tiny_mlp", quick=quick)
        steps = 20 if quick else 200
        members = (1, 8) if quick else (1, 8, 32, 128)
        return alternate({str(count): turn_of(made, count, steps) for count in members}, rounds)
    finally:
        os.sched_setaffinity(0, cores)


def turn_of(made: Workload, count: int, steps: int) -> Any:
    tx = fx.optim.adamw(made.learning_rate, weight_decay=made.weight_decay)
    single = fx.train_step(lambda model, batch: made.loss(model(batch["x"]), batch["y"]), tx)

    # torch.compile, because fxtrain.Step expects the step of a single state.
    step = torch.compile(torch.func.vmap(single, in_dims=(0, None)), fullgraph=True)
    states = [fx.init(made.module(), tx, seed=seed) for seed in range(count)]
    state = fx.tree.map(lambda *leaves: torch.stack(leaves), *states)

    def turn() -> float:
        nonlocal state
        began = time.perf_counter()
        for index in range(steps):
            state, _ = step(state, made.batches[index % len(made.batches)])
        return (time.perf_counter() - began) / steps

    turn()
    return turn
