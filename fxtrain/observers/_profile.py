"""Traces of the time and memory of a few steps."""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from fxtrain._torch_internals.memory import start_memory_history, stop_memory_history, write_memory_snapshot
from fxtrain.core import Control, FitBegin, StepBegin, StepEnd, TrainState, check_int
from fxtrain.disk import make_folder

_MAX_TABLE_ROWS = 40  # of the table of operations
_MAX_SNAPSHOT_ENTRIES = 100_000  # allocations in a memory snapshot; each takes a few kilobytes of host memory

Seen = FitBegin | StepBegin | StepEnd


def profile(
    folder: str | os.PathLike[str], *, wait: int = 5, warmup: int = 2, active: int = 5, memory: bool = False
) -> Profile:
    """Profiles a few steps of each session with ``torch.profiler``.

    Writes ``steps-8-to-12.trace.json``, which opens in https://ui.perfetto.dev and chrome://tracing, and
    ``steps-8-to-12.operations.txt``, a table of the most expensive operations. In both, ``train step`` is the time
    from ``StepBegin`` to ``StepEnd``. ``ProfilerStep`` is the time from one ``StepEnd`` to the next, so it includes
    waiting for data, callbacks, observers and evaluations. On CPU, kernels fused by Inductor appear as a single row,
    the call of the graph. Recording makes steps slower.

    If a session ends while recording, the steps recorded so far are written.

    Args:
        folder: The folder to write to. It is created if it does not exist.
        wait: Number of steps to skip at the beginning of a session, such as the one that compiles.
        warmup: Number of following steps in which the profiler runs but its results are discarded; at least 1.
        active: Number of following steps to record; at least 1.
        memory: Whether to record the memory allocated by operations. For a state on CUDA, this also writes
            ``steps-8-to-12.memory.pickle`` with every allocation, for https://docs.pytorch.org/memory_viz.

    Raises:
        TypeError: ``wait``, ``warmup`` or ``active`` is not an int.
        ValueError: One of them is out of range.

    Example:
        >>> import tempfile, torch, fxtrain as fx
        >>> tx = fx.optim.sgd(0.1)
        >>> step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx)
        >>> recorded = profile(tempfile.mkdtemp(), wait=1, warmup=1, active=2)
        >>> data = [torch.ones(4, 1)]
        >>> result = fx.fit(fx.init(torch.nn.Linear(1, 1), tx), step, data, steps=9, observers=[recorded])
        >>> [path.name for path in recorded.files]
        ['steps-3-to-4.trace.json', 'steps-3-to-4.operations.txt']
    """
    for name, value, least in (("wait", wait, 0), ("warmup", warmup, 1), ("active", active, 1)):
        check_int(name, value, minimum=least)
    return Profile(Path(folder), wait, warmup, active, memory)


class Profile:
    """Profiles a few steps of each session. Created by ``profile``."""

    def __init__(self, folder: Path, wait: int, warmup: int, active: int, memory: bool) -> None:
        self.files: tuple[Path, ...] = ()  # written by the last session
        self._folder = folder
        self._wait, self._warmup, self._active, self._memory = wait, warmup, active, memory
        self._profiler: Any = None  # None while not running
        self._on_cuda = False
        self._reset()

    def _reset(self) -> None:
        self._steps_taken = 0  # in this session
        self._recorded: list[int] = []  # their step numbers
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
                    self._step_begins(state)
                case StepEnd() if not self._done:
                    self._step_ends(event)
        except BaseException:
            self._stop()  # the loop drops a failing observer, but its profiler would keep running
            raise

    def close(self) -> None:
        """Stops recording and writes the recorded steps. Warns if the session was too short to record any."""
        if self._done:
            return
        taken, self._done = self._steps_taken, True
        if self._recorded:
            self._write()
        elif taken:
            warnings.warn(
                f"expected a session of more than {self._wait + self._warmup} steps to profile, got {taken}, so "
                "nothing was recorded. Pass profile() a smaller wait.",
                RuntimeWarning,
                stacklevel=2,
            )
        self._stop()

    def _step_begins(self, state: TrainState | None) -> None:
        if self._profiler is None and self._steps_taken >= self._wait:
            self._start(state)
        if self._profiler is not None:
            self._step_range.close()  # still open if the previous batch was skipped
            self._step_range.enter_context(torch.profiler.record_function("train step"))

    def _step_ends(self, event: StepEnd) -> None:
        self._steps_taken += 1
        if self._profiler is None:
            return
        self._step_range.close()
        if self._steps_taken > self._wait + self._warmup:
            self._recorded.append(event.step)
        if len(self._recorded) < self._active:
            self._profiler.step()
        else:
            self._done = True
            self._write()
            self._stop()

    def _start(self, state: TrainState | None) -> None:
        self._on_cuda = state is not None and state.step.device.type == "cuda"
        if self._memory and self._on_cuda:
            start_memory_history(_MAX_SNAPSHOT_ENTRIES)
            self._contexts.callback(stop_memory_history)
        schedule = torch.profiler.schedule(wait=0, warmup=self._warmup, active=self._active, repeat=1)
        profiler = torch.profiler.profile(schedule=schedule, profile_memory=self._memory)
        self._profiler = self._contexts.enter_context(profiler)

    def _write(self) -> None:
        """Stops recording and writes the files."""
        self._step_range.close()
        profiler = self._profiler
        name = f"steps-{self._recorded[0]}-to-{self._recorded[-1]}"
        trace, table, snapshot = (
            self._folder / f"{name}.{end}" for end in ("trace.json", "operations.txt", "memory.pickle")
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
        table.write_text(f"{profiler.key_averages().table(sort_by=by, row_limit=_MAX_TABLE_ROWS)}\n", encoding="utf-8")
        self.files = (trace, table, *([snapshot] if with_snapshot else []))

    def _stop(self) -> None:
        """Stops the profiler if it is running."""
        self._profiler = None
        self._step_range.close()
        self._contexts.close()
