"""Measures the overhead of callbacks and of the loop, in microseconds per step.

All loops run in one process, to keep other differences small. Turns last a tenth of a second, because the speed of a
shared machine changes quickly. Each loop has a thread, which blocks on its next batch until its turn. A step lasts from
one batch to the next, and is averaged over a turn. Memory placement is random and changes the step time by some
percent, so all loops are recreated in each round, and loops with longer steps several times per round.
"""

from __future__ import annotations

import itertools
import math
import os
import pathlib
import statistics
import tempfile
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

import fxtrain as fx
from benchmarks.bars import Verdict
from benchmarks.contestants import ENDLESS
from benchmarks.contestants.fxtrain import pieces
from benchmarks.feed import End, in_turns
from benchmarks.measure import Seconds, alternate, ratios
from benchmarks.workloads import Workload, workload
from benchmarks.workloads.workload import squared_error

Loop = Callable[["Turns"], Any]

BARE = "bare loop"
IN_STEP = "bare loop, ten stateful callbacks on Updated"
FIT = "fit"
ON_STEP_END = "fit, ten callbacks on StepEnd"
SELDOM_WRITTEN = "fit, ten callbacks on StepEnd, a writer every 100 steps"
WRITTEN = "fit, ten callbacks on StepEnd, a writer every step"
UNSUBSCRIBED = "fit, ten callbacks on other events"
LOGGED = "fit, JSON lines and TensorBoard every step"


def main(*, rounds: int, quick: bool) -> tuple[dict[str, Seconds], list[Verdict]]:
    """Returns seconds per step of the tiny MLP and of two slower models, and the verdicts."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    torch.set_num_threads(1)
    found: dict[str, Seconds] = {}
    try:
        with tempfile.TemporaryDirectory(prefix="benchmarks-") as parent:
            for name, made, steps, times, begin, only in (
                ("tiny_mlp", workload("tiny_mlp", quick=quick), 300, 30, 1, ()),
                ("4 x Linear(64), batch 1280", slower(1280), 100, 6, 14, (BARE, FIT)),
                # 64 steps, because writers write the events of 64 steps together.
                ("4 x Linear(64), batch 7000", slower(7000), 64, 2, 8, (FIT, LOGGED)),
            ):
                for index in range(rounds if quick else begin * rounds):
                    folder = pathlib.Path(parent, f"{name} {index}")
                    folder.mkdir()
                    seconds = measured(loops(made, folder, only), made.batches, steps, 3 if quick else times)
                    for loop, values in seconds.items():
                        found.setdefault(name, {}).setdefault(loop, []).extend(values)
    finally:
        os.sched_setaffinity(0, cores)
    return found, verdicts(found)


def measured(made: Mapping[str, Loop], batches: list[Any], steps: int, times: int) -> Seconds:
    """Returns seconds per step by loop, one value per turn, for ``times`` turns of ``steps`` steps."""
    turns = {name: Turns(loop, batches, steps) for name, loop in made.items()}
    try:
        alternate(turns, 2)  # compiles and warms up
        return alternate(turns, times)
    finally:
        for each in turns.values():
            each.close()


class Turns(fx.data.Source):
    """A data source that repeats batches for a loop in another thread, and blocks it between turns.

    Args:
        loop: A function that takes batches from this source without end.
        batches: The batches to repeat.
        steps: Number of batches of a turn.
    """

    def __init__(self, loop: Loop, batches: list[Any], steps: int) -> None:
        super().__init__()
        self.epoch_length = 64 * len(batches)  # long, like real epochs
        self._loop, self._steps = loop, steps
        self._feed = iter(in_turns(batches, 0, steps, self._end_turn))
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._over = False
        self._error: BaseException | None = None
        self._seconds = float("nan")
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def __call__(self) -> float:
        """Runs one turn, and returns its seconds per step."""
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error
        return self._seconds / self._steps

    def __getitem__(self, position: int) -> Any:
        return next(self._feed)

    def close(self) -> None:
        """Ends the loop."""
        self._over = True
        self._go.release()
        self._thread.join()

    def _run(self) -> None:
        torch.set_num_threads(1)  # MKL has a setting per thread
        try:
            self._loop(self)
        except End:
            pass
        except BaseException as error:
            self._error = error
            self._done.release()

    def _end_turn(self, seconds: float) -> None:
        """Ends a turn of ``seconds``, NaN before the first turn, and returns when the next turn starts."""
        if not math.isnan(seconds):
            self._seconds = seconds
            self._done.release()
        self._go.acquire()
        if self._over:
            raise End


def slower(batch: int) -> Workload:
    """Returns a workload with longer steps and few weights.

    Few, because the placement of many weights is random, fixed for a whole process, and changed the step time by 5 %.
    """
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


def loops(made: Workload, folder: pathlib.Path, only: tuple[str, ...]) -> dict[str, Loop]:
    """Returns the loops by name. ``only`` selects some of them; an empty tuple selects all."""
    watched = fx.compose(*[glance() for _ in range(10)])
    asleep = fx.compose(*[sleeper() for _ in range(10)])
    seen = fx.compose(*[counter(index) for index in range(10)])

    def writing(every: int) -> Any:
        return fx.observers.write(fx.writers.jsonl(folder / f"{every}.jsonl"), every=every)

    def logging() -> Any:
        return fx.observers.write(fx.writers.jsonl(folder / "all.jsonl"), fx.writers.tensorboard(folder / "all"))

    # All loops but one share a graph, because callbacks of the loop are not part of it.
    state, step = pieces(made, donate=True)
    found: dict[str, Loop] = {
        BARE: bare(state, step),
        FIT: fit(state, step),
        ON_STEP_END: fit(state, step, watched),
        SELDOM_WRITTEN: fit(state, step, watched, lambda: [writing(100)]),
        WRITTEN: fit(state, step, watched, lambda: [writing(1)]),
        UNSUBSCRIBED: fit(state, step, asleep),
        LOGGED: fit(state, step, observers=lambda: [logging()]),
    }
    if not only:
        with_callbacks, traced = pieces(made, donate=True, callbacks=seen)
        found[IN_STEP] = bare(fx.attach(with_callbacks, seen), traced)
    return {name: loop for name, loop in found.items() if not only or name in only}


def bare(state: fx.TrainState, step: Any) -> Loop:
    def loop(batches: Turns) -> None:
        current = state.copy()
        for position in itertools.count():
            current, _ = step(current, batches[position])

    return loop


def fit(state: fx.TrainState, step: Any, callbacks: Any = (), observers: Callable[[], list[Any]] = list) -> Loop:
    return lambda batches: fx.fit(state, step, batches, steps=ENDLESS, callbacks=callbacks, observers=observers())


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
    """Returns verdicts on differences of step times in microseconds and on ratios, taken within each round."""
    names = ("tiny_mlp", "4 x Linear(64), batch 1280", "4 x Linear(64), batch 7000")
    tiny, longer, logged = (found[name] for name in names)

    def added(name: str, to: str) -> list[float]:
        return [1e6 * (a - b) for a, b in zip(tiny[name], tiny[to], strict=True)]

    noise = 1e6 * statistics.median(tiny[FIT]) * 0.02
    of_callbacks = (
        "Measured between steps, which evict the loop from the first-level caches: 9.5 us for the callbacks and for "
        "the event, which is not created without subscribers, and 6 us for the observer and the writer. A callback "
        "takes 0.4 us to create a Control, of which Python's call of a class takes half, and 0.3 us for the rest. The "
        "overhead depends on the machine and on its other load: 37 us of processor time where the tiny MLP takes 136 "
        "us in a bare loop."
    )
    of_fit = (
        "`fit` adds 3.5 us to an empty step, and twice as much to a step that accesses megabytes, because such a step "
        "evicts the loop's code and data from the first-level caches. The time from the end of a step to the start of "
        "the next one is 9.5 us, and 2.3 us in a bare loop (with steps of 1.7 ms, of which the difference is 0.4 %). "
        "The rest is drift of the machine's speed, as the quartiles show."
    )
    return [
        Verdict("Overhead of ten stateful callbacks on Updated", added(IN_STEP, BARE), 10.0, unit=" us"),
        Verdict("Overhead of ten callbacks on StepEnd", added(ON_STEP_END, FIT), 15.0, of_callbacks, " us"),
        Verdict(
            "Overhead of ten callbacks on StepEnd and a writer (every 100 steps)",
            added(SELDOM_WRITTEN, FIT),
            15.0,
            of_callbacks,
            " us",
        ),
        Verdict(
            "Overhead of ten callbacks on other events (limit: 2 % of a step, for noise)",
            added(UNSUBSCRIBED, FIT),
            noise,
            unit=" us",
        ),
        Verdict(
            f"`fit` relative to a bare loop, steps of {1e3 * statistics.median(longer[BARE]):.2f} ms",
            ratios(longer[FIT], longer[BARE]),
            1.02,
            of_fit,
        ),
        Verdict(
            "JSON lines and TensorBoard every step, relative to none, steps of "
            f"{1e3 * statistics.median(logged[FIT]):.1f} ms",
            ratios(logged[LOGGED], logged[FIT]),
            1.02,
            "With an empty step, one metric takes 41 us: 24 us for each writer, which share the event.",
        ),
    ]
