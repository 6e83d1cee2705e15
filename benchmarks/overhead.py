"""Overhead: what callbacks and the loop add to a step, in microseconds.

All in one process and in turns, so that little else differs. A turn of ``fit`` is a whole run; a step lasts from one
batch to the next. A turn of the tiny MLP's counts with its mean, as a writer does something at few steps; one of longer
steps with its median, as what else the machine does at some of them is more than what the loop adds to each.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fxtrain as fx
from benchmarks.bars import Verdict
from benchmarks.contestants.fxtrain import pieces
from benchmarks.measure import Seconds, alternate, ratios
from benchmarks.workloads import Workload, workload
from benchmarks.workloads.workload import squared_error

Turn = Callable[[], float]
Average = Callable[[list[float]], float]

BARE = "bare loop"
IN_STEP = "bare loop, ten stateful callbacks on Updated"
FIT = "fit"
ON_STEP_END = "fit, ten callbacks on StepEnd, a writer at each 100th step"
WRITTEN = "fit, ten callbacks on StepEnd, a writer at each step"
UNSUBSCRIBED = "fit, ten callbacks that are not subscribed"
LOGGED = "fit, JSON lines and TensorBoard at each step"


def main(*, rounds: int, quick: bool) -> tuple[dict[str, Seconds], list[Verdict]]:
    """Seconds a step of the tiny MLP and of a step of about a millisecond, and what they come to."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
            tiny = workload("tiny_mlp", quick=quick)
            rounds *= 1 if quick else 4  # of short turns: where a turn's memory lies is left to chance
            steps = 500 if quick else 5000
            found = {"tiny_mlp": alternate(turns(tiny, steps, pathlib.Path(folder, "tiny"), statistics.fmean), rounds)}
            steps = 50 if quick else 250
            for name, batch, only in (
                ("about a millisecond", 1280, (BARE, FIT)),
                ("about five milliseconds", 7000, (FIT, LOGGED)),
            ):
                made = turns(slower(batch), steps, pathlib.Path(folder, str(batch)), statistics.median, only)
                found[name] = alternate(made, rounds)
    finally:
        os.sched_setaffinity(0, cores)
    return found, verdicts(found)


def slower(batch: int) -> Workload:
    """Of few weights: where many lie is left to chance, which made 5 % of their step, the same for a whole process."""
    generator = torch.Generator().manual_seed(1)
    return Workload(
        name="slower",
        about=f"4 x Linear(64), batch {batch}",
        make=lambda: nn.Sequential(*[part for _ in range(4) for part in (nn.Linear(64, 64), nn.ReLU())]),
        batches=[
            {"x": torch.randn(batch, 64, generator=generator), "y": torch.randn(batch, 64, generator=generator)}
            for _ in range(8)
        ],
        loss=squared_error,
    )


def turns(
    made: Workload, steps: int, folder: pathlib.Path, average: Average, only: tuple[str, ...] = ()
) -> dict[str, Turn]:
    """A turn of so many steps for each variant."""
    seen = [counter(index) for index in range(10)]
    glances = [glance() for _ in range(10)]
    asleep = [sleeper() for _ in range(10)]

    def writer(every: int) -> Any:
        return fx.observers.write(fx.writers.jsonl(folder / f"{every}.jsonl"), every=every)

    def logged() -> Any:
        writers = fx.writers.jsonl(folder / "logged.jsonl"), fx.writers.tensorboard(folder / "tensorboard")
        return fx.observers.write(*writers, every=1)

    def fit(callbacks: Any = (), observers: Callable[[], list[Any]] = list) -> Turn:
        # One graph for all: callbacks of the loop do not enter it.
        return fitted(state, step, batches, steps, callbacks, observers)

    folder.mkdir()
    batches = Clocked(made.batches * 64, average)  # an epoch is long, as epochs are
    state, step = pieces(made, donate=True)
    watched = fx.compose(*glances)
    variants: dict[str, Callable[[], Turn]] = {
        BARE: lambda: bare(state, step, batches, steps),
        IN_STEP: lambda: bare(*with_callbacks(made, fx.compose(*seen)), batches, steps),
        FIT: fit,
        ON_STEP_END: lambda: fit(watched, lambda: [writer(100)]),
        WRITTEN: lambda: fit(watched, lambda: [writer(1)]),
        UNSUBSCRIBED: lambda: fit(fx.compose(*asleep)),
        LOGGED: lambda: fit(observers=lambda: [logged()]),
    }
    return {name: make() for name, make in variants.items() if not only or name in only}


def with_callbacks(made: Workload, callbacks: Any) -> tuple[fx.TrainState, Any]:
    state, step = pieces(made, donate=True, callbacks=callbacks)
    return fx.attach(state, callbacks), step


class Clocked(fx.data.Source):
    """Batches in a list, which writes down when each was asked for."""

    def __init__(self, batches: list[Any], average: Average) -> None:
        super().__init__()
        self.batches, self.epoch_length, self.average = batches, len(batches), average
        self.asked: list[float] = []

    def __getitem__(self, position: int) -> Any:
        self.asked.append(time.perf_counter())
        return self.batches[position % self.epoch_length]

    def seconds(self) -> float:
        """From one batch to the next, on average, since this was last called."""
        asked, self.asked = self.asked, []
        return self.average([after - before for before, after in itertools.pairwise(asked)])


def bare(state: fx.TrainState, step: Any, batches: Clocked, steps: int) -> Turn:
    def turn() -> float:
        nonlocal state
        state = state.copy()  # as fit does, so that where its memory lies is left to chance in both
        for position in range(steps):
            state, _ = step(state, batches[position])
        return batches.seconds()

    turn()
    return turn


def fitted(
    state: fx.TrainState,
    step: Any,
    batches: Clocked,
    steps: int,
    callbacks: Any,
    observers: Callable[[], list[Any]],
) -> Turn:
    def turn() -> float:
        nonlocal state
        until = int(state.step) + steps
        result = fx.fit(state, step, batches, steps=until, callbacks=callbacks, observers=observers())
        state = result.last
        return batches.seconds()

    turn()
    return turn


def counter(index: int) -> Any:
    def update(state: fx.TrainState, event: fx.Updated, memory: Any) -> tuple[Any, fx.Control]:
        return memory + 1, fx.Control()

    return fx.stateful(f"counter{index}", lambda state: torch.tensor(0), update)


def glance() -> Any:
    def callback(state: fx.TrainState, event: fx.StepEnd) -> tuple[fx.TrainState, fx.Control]:
        return state, fx.Control(stop=event.step < 0, reason="before the beginning")

    return callback


def sleeper() -> Any:
    def callback(state: fx.TrainState, event: fx.EvalEnd) -> tuple[fx.TrainState, fx.Control]:
        return state, fx.Control()

    return callback


def verdicts(found: dict[str, Seconds]) -> list[Verdict]:
    """Differences within each round, in microseconds; and ``fit`` over the bare loop, as a ratio."""
    tiny, longer, logged = (found[name] for name in ("tiny_mlp", "about a millisecond", "about five milliseconds"))

    def added(name: str, to: str) -> list[float]:
        return [1e6 * (a - b) for a, b in zip(tiny[name], tiny[to], strict=True)]

    noise = 1e6 * statistics.median(tiny[FIT]) * 0.02
    of_callbacks = (
        "In a loop whose step does nothing it is 9.5: 2.5 for the event, which without anybody to see it is not made, "
        "0.65 for each callback (0.4 the Control that it makes, 0.2 the fold) and 1 for the writer. Beside a step, "
        "which takes the first caches for itself, it is half as much again."
    )
    of_fit = (
        "A step of fit takes 6 us more than its step where that does nothing, and twice that beside one that goes "
        "through megabytes: the loop's code and data have gone from the first caches then, and some of the step's."
    )
    return [
        Verdict("Ten stateful callbacks on Updated add", added(IN_STEP, BARE), 10.0, unit=" us"),
        Verdict(
            "Ten callbacks on StepEnd and a writer (each 100th step) add",
            added(ON_STEP_END, FIT),
            15.0,
            of_callbacks,
            " us",
        ),
        Verdict(
            "Callbacks that are not subscribed add, 2 % taken as noise,", added(UNSUBSCRIBED, FIT), noise, unit=" us"
        ),
        Verdict(
            f"`fit` over a bare loop, of steps of {1e3 * statistics.median(longer[BARE]):.2f} ms",
            ratios(longer[FIT], longer[BARE]),
            1.02,
            of_fit,
        ),
        Verdict(
            "JSON lines and TensorBoard at each step, over none, of steps of "
            f"{1e3 * statistics.median(logged[FIT]):.1f} ms",
            ratios(logged[LOGGED], logged[FIT]),
            1.02,
            "In a loop whose step does nothing it is 41 us for one metric: 24 for each writer, which share the event.",
        ),
    ]
