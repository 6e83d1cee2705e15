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
from benchmarks.bars import Verdict
from benchmarks.measure import Seconds, alternate, ratios
from benchmarks.workloads import Workload, workload

PLAIN = "one run"
"""The compiled step of a single run, without an axis of members."""

ABOUT = {
    "cpu": (
        "The step is `fit`'s own, compiled and donated; one core and one torch thread; alternating rounds of 100 "
        "steps; the thread's processor time, because other programs may use the machine. Members that stopped are "
        "frozen inside the kernels, by one blend of values that they hold in registers."
    ),
    "cuda": (
        "The step is `fit`'s own, compiled, donated and replayed as a CUDA graph; alternating rounds of 100 steps, "
        "until the GPU has done them. Members that stopped are frozen inside the kernels."
    ),
}
"""The conditions of the measurement, by device."""

REASON = (
    "Matmuls limit both. On an AMD EPYC of family 23, called by themselves with all inputs in the cache, the five of "
    "8 members took 281 us, at 18 GFLOP/s (the large ones 24), and those of 128 members 4724 us, where one run took "
    "211 us. In the step of 8 members they took 337 us, because its 0.6 MB exceed the second-level cache. The rest "
    "of that step was AdamW's update of 38,480 elements (three divisions and a square root each, 129 us), the loss "
    "with its gradient (42 us), other kernels (15 us) and the calls (about 95 us, of which one run has as many). On "
    "an AMD EPYC of family 25 (model 17), where one run takes 50 us, 8 members took 3.3 times as long and 128 "
    "members 40 times. There the matmuls of 8 members take 86 of 167 us, at 61 GFLOP/s. At the 103 GFLOP/s of large "
    "matmuls they would take 51 us, and the step 2.6 times one run. Those of 128 members, 1236 us by themselves, "
    "would take 804 us, and the step 31 times one run. As they are, these matmuls by themselves and AdamW's update "
    "by itself, which reads and writes 17 MB, took 26.4 and 6.6 times one run there (9 alternating rounds; 24.7 for "
    "the matmuls in the earlier one), which leaves almost nothing of the bar for the loss and its gradient. Variants "
    "that were not kept: one larger matmul in place of those that share the batch (3.0 and 3.5 times one run), all "
    "activations transposed, which makes the matmuls of the second layer faster and the sums over the batch slower "
    "by as much, and only the logits transposed, whose matmul then takes 0.43 of the time, but the step of one run "
    "1.02 (1.01 to 1.04), of 8 members 0.97 (0.94 to 1.02), and of 128 members 1.08 (1.01 to 1.16; 41 alternating "
    "rounds, family 25, model 17). There, a comparison of classes in place of the scatter in the gradient of the "
    "loss gave 0.99 and 1.03 (21 rounds), and Inductor's template for batches of matmuls takes 0.98 to 1.40 of MKL's "
    "time. On an NVIDIA H200, 8 and 128 members took 1.52 and 1.51 times one run (RESULTS_GPU.md)."
)


def main(*, rounds: int, quick: bool, device: str = "cpu") -> tuple[Seconds, list[Verdict]]:
    """Returns seconds per step of all members, by number of members, and the verdicts."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    torch.set_num_threads(1)
    try:
        made = workload("tiny_mlp", quick=quick, device=device)
        steps = 20 if quick else 100
        members = (1, 8) if quick else (1, 8, 32, 128)
        tx = fx.optim.adamw(made.learning_rate, weight_decay=made.weight_decay)
        single = fx.train_step(lambda model, batch: made.loss(model(batch["x"]), batch["y"]), tx)
        step = fx.compile(single, mode=None if device == "cpu" else "reduce-overhead", on_recompile="allow")

        def start(seed: int) -> fx.TrainState:
            return fx.init(made.module(), tx, seed=seed)

        turns = {PLAIN: turn_of(made, step, start(0), steps)}
        for count in members:
            runs = fx.ensemble.stack([start(seed) for seed in range(count)])
            turns[str(count)] = turn_of(made, step, runs, steps)
        found = alternate(turns, rounds)
        return found, verdicts(found)
    finally:
        os.sched_setaffinity(0, cores)


def verdicts(found: Seconds) -> list[Verdict]:
    judged: list[Verdict] = []
    for count, limit in ((8, 2.3), (128, 0.25 * 128)):
        if str(count) in found:
            text = f"Ensemble of {count} tiny MLPs, time per step, relative to one run"
            judged.append(Verdict(text, ratios(found[str(count)], found[PLAIN]), limit, REASON))
    return judged


def turn_of(made: Workload, step: Any, start: fx.TrainState, steps: int) -> Callable[[], float]:
    """Returns a function that takes steps with ``fit``'s own step, and returns the seconds of one.

    On a CPU, they are the processor time of the thread.
    """
    # The donating step and the state that it takes, as `fit` calls them.
    taken: list[Any] = []

    def keep(state: fx.TrainState, event: fx.FitEnd, control: fx.Control) -> None:
        taken.append(state.copy())

    fx.fit(start, step, made.batches, steps=2, observers=keep, progress=False)
    clock = time.thread_time if made.device == "cpu" else synchronized_time
    compiled = (step.over_members() if start.step.ndim else step).with_donation()

    def turn() -> float:
        state = taken.pop()
        began = clock()
        for index in range(steps):
            state, _ = compiled(state, made.batches[index % len(made.batches)])
        seconds = (clock() - began) / steps
        taken.append(state)
        return seconds

    turn()
    return turn


def synchronized_time() -> float:
    """Returns the time at which the GPU has done all its work."""
    torch.cuda.synchronize()
    return time.perf_counter()
