"""Measures step time and peak of activations of a GPT, with and without recomputation, next to loops by hand."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import fxtrain as fx
from benchmarks.bars import Verdict
from benchmarks.measure import Seconds, alternate, ratios
from benchmarks.workloads import Workload
from benchmarks.workloads.small_gpt import gpt

SAVE, THIRD, RECOMPUTE = "fxtrain, save", "fxtrain, 1/3", "fxtrain, recompute"
BY_HAND = "by hand, checkpoint for each block"
BY_HAND_COMPILED = "by hand, checkpoint for each block, model compiled"

ABOUT = (
    "8 layers, width 128, 4 heads, vocabulary 512, batch 1 x 1024, SGD; one core. fxtrain donates the state. Peaks are "
    "the most bytes that torch's allocator has given out at one time in a step, above those at its beginning. They "
    "include gradients and return to zero after the step."
)
ON_GPU = (
    "On an NVIDIA H200 (2026-11-26; torch 2.11; width 512, 8 heads, vocabulary 4096, batch 8 x 1024; one run, while "
    "other processes used the GPU, so times are rough), peaks in MiB and times per step in ms were: save 2339 and 42, "
    "1/3 739 and 54, recompute 536 and 52, offload to the host 675 and 109; by hand, with a checkpoint for each block, "
    "544 and 62, and with the model compiled 640 and 53."
)
REASON = (
    "Peaks are estimated from the graph before the compiler fuses its operations. They include neither workspaces of "
    "operators nor gradients of parameters that wait for the update."
)


class Found(NamedTuple):
    """What was measured.

    Args:
        seconds: Seconds per step by contestant, one per round.
        peaks: Bytes by contestant that torch's allocator had given out at the peak of a step, above those at its
            beginning.
    """

    seconds: Seconds
    peaks: dict[str, int]


def main(*, rounds: int, quick: bool) -> tuple[Found, list[Verdict]]:
    """Returns the measurements and the verdicts. All contestants take turns in one process on one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    torch.set_num_threads(1)
    try:
        size = (2, 32, 2, 64, 1, 64) if quick else (8, 128, 4, 512, 1, 1024)
        made = gpt("memory", *size, about="", turn=1)
        turns = {
            **{name: of_fxtrain(made, memory) for name, memory in ((SAVE, "save"), (THIRD, 1 / 3))},
            RECOMPUTE: of_fxtrain(made, "recompute"),
            BY_HAND: by_hand(made),
            BY_HAND_COMPILED: by_hand(made, compiled=True),
        }
        peaks = {name: peak(turn) for name, turn in turns.items()}
        seconds = alternate({name: functools.partial(timed, turn) for name, turn in turns.items()}, rounds)
    finally:
        os.sched_setaffinity(0, cores)
    third, hand = peaks[THIRD] / peaks[SAVE], min(peaks[BY_HAND], peaks[BY_HAND_COMPILED])
    return Found(seconds, peaks), [
        Verdict("GPT, peak above the state with `memory=1/3`, relative to `save`", [third], 1 / 3, REASON),
        Verdict(
            "GPT, time per step with `memory=1/3`, relative to `save`",
            ratios(seconds[THIRD], seconds[SAVE]),
            1.35,
            REASON,
        ),
        Verdict(
            f"GPT, peak above the state with `recompute`, relative to {BY_HAND}", [peaks[RECOMPUTE] / hand], 1.0, REASON
        ),
    ]


def of_fxtrain(made: Workload, memory: Any) -> Callable[[], object]:
    """Returns a function that takes a donated step."""
    tx = fx.optim.sgd(made.learning_rate)
    loss = functools.partial(loss_of, made)
    step = fx.compile(fx.train_step(loss, tx), donate=True, memory=memory)
    taken = [fx.init(made.module(), tx)]

    def turn() -> None:
        taken.append(step(taken.pop(), made.batches[0])[0])

    turn()
    turn()
    return turn


def loss_of(made: Workload, model: Any, batch: dict[str, Tensor]) -> Tensor:
    return made.loss(model(batch["x"]), batch["y"])


def by_hand(made: Workload, *, compiled: bool = False) -> Callable[[], object]:
    """Returns a function that takes a step of a loop by hand, with a checkpoint for each block."""
    module: Any = made.module()
    module.blocks = nn.ModuleList(Checkpointed(block) for block in module.blocks)
    model = torch.compile(module) if compiled else module
    optimizer = torch.optim.SGD(module.parameters(), made.learning_rate)

    def turn() -> None:
        loss_of(made, model, made.batches[0]).backward()
        optimizer.step()
        optimizer.zero_grad()

    turn()
    turn()
    return turn


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.block, x, use_reentrant=False)


def timed(turn: Callable[[], object]) -> float:
    began = time.perf_counter()
    turn()
    return time.perf_counter() - began


def peak(turn: Callable[[], object]) -> int:
    """Returns the most bytes that torch's allocator gives out at one time while a function runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        turn()
    total = most = 0
    results: Any = recorded.profiler
    for event in results.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            most = max(most, total)
    return most
