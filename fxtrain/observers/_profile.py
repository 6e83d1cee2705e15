"""Traces of the time and memory of a few steps."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Protocol, overload

import torch

from fxtrain._torch_internals.memory import start_memory_history, stop_memory_history, write_memory_snapshot
from fxtrain.core import Control, FitBegin, StepBegin, StepEnd, TrainState, check_int, describe, warn
from fxtrain.core._rank import rank
from fxtrain.disk import make_folder
from fxtrain.fold import When, as_trigger
from fxtrain.observers._profile_schedule import GivenSteps, Schedule, Triggered

_MAX_TABLE_ROWS = 40  # of the table of operations
_MAX_SNAPSHOT_ENTRIES = 100_000  # allocations in a memory snapshot; each takes a few kilobytes of host memory
_WAIT = 5  # steps, the default

Seen = FitBegin | StepBegin | StepEnd


class Profiler(Protocol):
    """A profiler with a method to call after each step, such as ``torch.profiler.profile``."""

    def __enter__(self) -> object: ...
    def __exit__(self, *error: Any) -> bool | None: ...
    def step(self) -> object: ...


@overload
def profile(
    folder: str | os.PathLike[str],
    *,
    wait: int = _WAIT,
    warmup: int = 2,
    active: int = 5,
    repeat: int = 1,
    skip_first: int = 0,
    at: When | Collection[int] | None = None,
    memory: bool = False,
) -> Profile: ...
@overload
def profile(*, profiler: Callable[[], Profiler]) -> CustomProfile: ...
def profile(
    folder: str | os.PathLike[str] | None = None,
    *,
    wait: int = _WAIT,
    warmup: int = 2,
    active: int = 5,
    repeat: int = 1,
    skip_first: int = 0,
    at: When | Collection[int] | None = None,
    memory: bool = False,
    profiler: Callable[[], Profiler] | None = None,
) -> Profile | CustomProfile:
    """Profiles a few steps of each session with ``torch.profiler``.

    A recording of the steps 8 to 12 writes ``rank0.8.pt.trace.json``, and ``rank0.8.operations.txt``, a table of the
    most expensive operations. The trace opens in https://ui.perfetto.dev and chrome://tracing. TensorBoard's profiler
    plugin finds it if ``folder`` is TensorBoard's folder or one in it. It shows each rank as a worker, and each
    recording as a span.

    In both, ``train step`` is the time from ``StepBegin`` to ``StepEnd``. ``ProfilerStep`` is the time from one
    ``StepEnd`` to the next, so it includes waiting for data, callbacks, observers and evaluations. On CPU, kernels
    fused by Inductor appear as a single row, the call of the graph. Recording makes steps slower.

    If a session ends while recording, the steps recorded so far are written. With several processes, each one records.

    Args:
        folder: The folder to write to. It is created if it does not exist.
        wait: Number of steps to skip before each recording, such as the one that compiles.
        warmup: Number of following steps in which the profiler runs but its results are discarded; at least 1.
        active: Number of following steps to record; at least 1.
        repeat: Number of recordings, each after ``wait`` and ``warmup`` steps. 0 repeats until the session ends.
        skip_first: Number of steps to skip at the beginning of a session, before the first ``wait``.
        at: When to record instead: the numbers of the first step of each recording, such as ``(100, 5000)``, or a
            trigger, evaluated at ``StepEnd``, at which the warm-up begins. An int n is a trigger at multiples of n.
        memory: Whether to record the memory allocated by operations. For a state on CUDA, this also writes
            ``rank0.8.memory.pickle`` with every allocation, for https://docs.pytorch.org/memory_viz.
        profiler: Instead of all other arguments, a function without arguments that returns a profiler, such as
            ``lambda: torch.profiler.profile(schedule=..., on_trace_ready=...)``. It is entered when a session begins,
            its ``step()`` is called after each step, and it is exited when the session ends.

    Raises:
        TypeError: A number of steps is not an int, ``at`` is not one of these types, or ``profiler`` returns no
            profiler, which is raised when a session begins.
        ValueError: A number of steps is out of range, ``at`` is given with a schedule, or not exactly one of ``folder``
            and ``profiler`` is given.

    Example:
        >>> import tempfile, torch, fxtrain as fx
        >>> tx = fx.optim.sgd(0.1)
        >>> step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx)
        >>> recorded = profile(tempfile.mkdtemp(), wait=1, warmup=1, active=2)
        >>> data = [torch.ones(4, 1)]
        >>> result = fx.fit(fx.init(torch.nn.Linear(1, 1), tx), step, data, steps=9, observers=[recorded])
        >>> [path.name for path in recorded.files]
        ['rank0.3.pt.trace.json', 'rank0.3.operations.txt']
    """
    if (folder is None) == (profiler is None):
        raise ValueError(
            f"expected either a folder or a profiler, got {'neither' if folder is None else 'both'}. Pass the folder "
            "for traces of torch.profiler, or a function that returns your profiler."
        )
    if profiler is not None:
        if not callable(profiler):
            raise TypeError(
                f"expected profiler to be a function that returns a profiler, got {describe(profiler)}. Pass "
                "lambda: torch.profiler.profile(...), because each session needs a new one."
            )
        return CustomProfile(profiler)
    assert folder is not None
    minima = {"wait": (wait, 0), "warmup": (warmup, 1), "active": (active, 1)}
    for name, (value, least) in (minima | {"repeat": (repeat, 0), "skip_first": (skip_first, 0)}).items():
        check_int(name, value, minimum=least)
    if at is not None and (wait, repeat, skip_first) != (_WAIT, 1, 0):
        raise ValueError(
            "expected either at or a schedule of wait, repeat and skip_first, got both. Remove the schedule."
        )
    if at is None:
        return Profile(Path(folder), Schedule(wait, repeat, skip_first), warmup, active, memory)
    if isinstance(at, Collection):
        for number in at:
            check_int("a step of at", number, minimum=2)  # one step to warm up before it
        return Profile(Path(folder), GivenSteps(frozenset(at)), warmup, active, memory)
    return Profile(Path(folder), Triggered(as_trigger(at, "at")), warmup, active, memory)


class Profile:
    """Profiles a few steps of each session. Created by ``profile``."""

    def __init__(
        self, folder: Path, plan: Schedule | GivenSteps | Triggered, warmup: int, active: int, memory: bool
    ) -> None:
        self.files: tuple[Path, ...] = ()  # written by the last session
        self._folder, self._plan = folder, plan
        self._warmup, self._active, self._memory = warmup, active, memory
        self._profiler: Any = None  # None while not running
        self._on_cuda = False
        self._reset()

    def _reset(self) -> None:
        self._plan.reset()
        self._steps_taken = 0  # in this session
        self._first = 0  # step of the current recording, warm-up included
        self._warmup_left = 0
        self._recorded: list[int] = []  # numbers of the steps of the current recording
        self._done = False
        self._contexts = contextlib.ExitStack()  # closes the memory history and the profiler
        self._step_range = contextlib.ExitStack()  # the profiler range of the current step

    def __call__(self, state: TrainState | None, event: Seen, control: Control) -> None:
        try:
            match event:
                case FitBegin():
                    self._stop()
                    self._reset()
                    self.files = ()
                    make_folder(self._folder)
                case StepBegin() if not self._done:
                    self._step_begins(state, event.step)
                case StepEnd() if not self._done:
                    self._step_ends(event)
        except BaseException:
            self._stop()  # the loop drops a failing observer, but its profiler would keep running
            raise

    def close(self) -> None:
        """Stops recording and writes the recorded steps. Warns if the session was too short to record any."""
        if self._done:
            return
        self._done = True
        if self._recorded:
            self._write()
        elif self._steps_taken and not self.files and (warning := self._plan.missed(self._steps_taken, self._warmup)):
            warn(warning, RuntimeWarning)
        self._stop()

    def _step_begins(self, state: TrainState | None, step: int) -> None:
        if self._profiler is None and (warmup := self._plan.begins(step, self._warmup)):
            self._first, self._warmup_left = step, warmup
            self._start(state)
        if self._profiler is not None:
            self._step_range.close()  # still open if the previous batch was skipped
            self._step_range.enter_context(torch.profiler.record_function("train step"))

    def _step_ends(self, event: StepEnd) -> None:
        self._steps_taken += 1
        self._plan.ended(event)
        if self._profiler is None or event.step < self._first:
            return
        self._step_range.close()
        if self._warmup_left:
            self._warmup_left -= 1
        else:
            self._recorded.append(event.step)
        if len(self._recorded) < self._active:
            self._profiler.step()
        else:
            self._write()
            self._stop()
            self._plan.recorded()

    def _start(self, state: TrainState | None) -> None:
        self._on_cuda = state is not None and state.step.device.type == "cuda"
        if self._memory and self._on_cuda:
            start_memory_history(_MAX_SNAPSHOT_ENTRIES)
            self._contexts.callback(stop_memory_history)
        schedule = torch.profiler.schedule(wait=0, warmup=self._warmup_left, active=self._active, repeat=1)
        profiler = torch.profiler.profile(schedule=schedule, profile_memory=self._memory)
        self._profiler = self._contexts.enter_context(profiler)

    def _write(self) -> None:
        """Stops recording and writes the files."""
        self._step_range.close()
        profiler = self._profiler
        first, last = self._recorded[0], self._recorded[-1]
        # TensorBoard's plugin reads <worker>.<span>.pt.trace.json, where the span is a number.
        trace, table, snapshot = (
            self._folder / f"rank{rank()}.{first}.{end}" for end in ("pt.trace.json", "operations.txt", "memory.pickle")
        )
        with_snapshot = self._memory and self._on_cuda
        if with_snapshot:
            write_memory_snapshot(snapshot)
        self._stop()
        profiler.export_chrome_trace(str(trace))
        if not trace.is_file() or not trace.stat().st_size:  # the profiler only logs a failed write, if at all
            raise OSError(
                f"expected a folder for the profile that can be written to, got {self._folder}, where {trace.name} is "
                "missing or empty. Check its permissions and free disk space."
            )
        by = "self_device_time_total" if self._on_cuda else "self_cpu_time_total"
        operations = profiler.key_averages().table(sort_by=by, row_limit=_MAX_TABLE_ROWS)
        table.write_text(f"Steps {first} to {last}\n\n{operations}\n", encoding="utf-8")
        self.files = (*self.files, trace, table, *([snapshot] if with_snapshot else []))

    def _stop(self) -> None:
        """Stops the profiler if it is running."""
        self._profiler, self._recorded = None, []
        self._step_range.close()
        self._contexts.close()


class CustomProfile:
    """Runs another profiler in each session. Created by ``profile(profiler=...)``."""

    def __init__(self, make: Callable[[], Profiler]) -> None:
        self._make = make
        self._profiler: Profiler | None = None
        self._context = contextlib.ExitStack()

    def __call__(self, state: TrainState | None, event: FitBegin | StepEnd, control: Control) -> None:
        try:
            if isinstance(event, FitBegin):
                self.close()
                self._profiler = _checked_profiler(self._make())
                self._context.enter_context(self._profiler)
            elif self._profiler is not None:
                self._profiler.step()
        except BaseException:
            self.close()  # the loop drops a failing observer, but its profiler would keep running
            raise

    def close(self) -> None:
        """Exits the profiler."""
        self._profiler = None
        self._context.close()


def _checked_profiler(made: Any) -> Profiler:
    missing = [name for name in ("__enter__", "__exit__", "step") if not hasattr(made, name)]
    if missing:
        raise TypeError(
            f"expected profiler to return a context manager with step(), got {describe(made)} without "
            f"{', '.join(missing)}. Return a profiler such as torch.profiler.profile(...)."
        )
    return made
