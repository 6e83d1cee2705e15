"""Profile: where the time of some steps goes, and their memory, written to files that tools open."""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from fxtrain.core import Control, FitBegin, StepBegin, StepEnd, TrainState, check_int
from fxtrain.disk import make_folder

_ROWS = 40  # of the table
_ENTRIES = 100_000  # allocations that a memory snapshot goes back; each takes some kilobytes of the host's memory

Seen = FitBegin | StepBegin | StepEnd


def profile(
    folder: str | os.PathLike[str], *, wait: int = 5, warmup: int = 2, active: int = 5, memory: bool = False
) -> Profile:
    """Records some steps of each session by ``torch.profiler``, and then is out of the way.

    It writes ``steps-6-to-10.trace.json``, which https://ui.perfetto.dev and chrome://tracing open, and
    ``steps-6-to-10.operations.txt``, a table of the costliest operations. In both, ``train step`` is what lies between
    ``StepBegin`` and ``StepEnd``, and ``ProfilerStep`` that and what comes before the next: the wait for data,
    callbacks, observers and evaluations. On a CPU what Inductor fuses is one row, the call of the graph. Recorded
    steps are slower than others.

    A run that ends while it records leaves what was recorded until then.

    Args:
        folder: Where to write. It is made if need be.
        wait: Steps at the beginning of a session that are left alone, compilation among them.
        warmup: Steps after these in which the profiler runs and what it sees is dropped, 1 or more.
        active: Steps after these that are recorded, 1 or more.
        memory: Whether to record what operations allocate. For a state on CUDA, ``steps-6-to-10.memory.pickle`` is
            then each allocation, for https://docs.pytorch.org/memory_viz.

    Raises:
        ValueError: If a number of steps is out of its range.

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
    """Records some steps of each session; made by ``profile``."""

    def __init__(self, folder: Path, wait: int, warmup: int, active: int, memory: bool) -> None:
        self.files: tuple[Path, ...] = ()  # what the last session wrote
        self._folder = folder
        self._wait, self._warmup, self._active, self._memory = wait, warmup, active, memory
        self._profiler: Any = None  # while it runs
        self._on_cuda = False
        self._begin()

    def _begin(self) -> None:
        self._taken = 0  # steps of this session
        self._recorded: list[int] = []  # the numbers of those that were recorded
        self._done = False
        self._opened = contextlib.ExitStack()  # what has to be ended: the memory history, the profiler
        self._step = contextlib.ExitStack()  # the range of the step under way

    def __call__(self, state: TrainState | None, event: Seen, control: Control) -> None:
        try:
            match event:
                case FitBegin():
                    self._end()
                    self._begin()
                    self.files = ()
                    make_folder(self._folder)
                case StepBegin() if not self._done:
                    self._step_begins(state)
                case StepEnd() if not self._done:
                    self._step_ends(event)
        except BaseException:
            self._end()  # the loop drops an observer that fails, and the profiler must not run on
            raise

    def close(self) -> None:
        """Ends the recording. What was recorded is written; where the run was too short for any, a warning says so."""
        if self._done:
            return
        taken, self._done = self._taken, True
        if self._recorded:
            self._write()
        elif taken:
            warnings.warn(
                f"The profile recorded nothing: the session ended after {taken} step{'s' if taken != 1 else ''}, and "
                f"recording begins after {self._wait + self._warmup}. Give profile(...) a smaller wait.",
                RuntimeWarning,
                stacklevel=2,
            )
        self._end()

    def _step_begins(self, state: TrainState | None) -> None:
        if self._profiler is None and self._taken >= self._wait:
            self._start(state)
        if self._profiler is not None:
            self._step.close()  # of a batch that was skipped
            self._step.enter_context(torch.profiler.record_function("train step"))

    def _step_ends(self, event: StepEnd) -> None:
        self._taken += 1
        if self._profiler is None:
            return
        self._step.close()
        if self._taken > self._wait + self._warmup:
            self._recorded.append(event.step)
        if len(self._recorded) < self._active:
            self._profiler.step()
        else:
            self._done = True
            self._write()
            self._end()

    def _start(self, state: TrainState | None) -> None:
        self._on_cuda = state is not None and state.step.device.type == "cuda"
        if self._memory and self._on_cuda:
            torch.cuda.memory._record_memory_history(max_entries=_ENTRIES)
            self._opened.callback(torch.cuda.memory._record_memory_history, None)
        profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=0, warmup=self._warmup, active=self._active, repeat=1),
            profile_memory=self._memory,
        )
        self._opened.enter_context(profiler)
        self._profiler = profiler

    def _write(self) -> None:
        """Ends the recording, and writes it."""
        self._step.close()
        profiler = self._profiler
        name = f"steps-{self._recorded[0]}-to-{self._recorded[-1]}"
        trace, table, snapshot = (
            self._folder / f"{name}.{end}" for end in ("trace.json", "operations.txt", "memory.pickle")
        )
        with_snapshot = self._memory and self._on_cuda
        if with_snapshot:
            torch.cuda.memory._dump_snapshot(str(snapshot))
        self._end()
        profiler.export_chrome_trace(str(trace))
        if not trace.is_file() or not trace.stat().st_size:  # the profiler says so in a log at most
            raise OSError(f"{trace} could not be written: give a folder that you may write to, on a disk with room.")
        by = "self_device_time_total" if self._on_cuda else "self_cpu_time_total"
        table.write_text(f"{profiler.key_averages().table(sort_by=by, row_limit=_ROWS)}\n", encoding="utf-8")
        self.files = (trace, table, *([snapshot] if with_snapshot else []))

    def _end(self) -> None:
        """Whatever happened, the profiler runs no more."""
        self._profiler = None
        self._step.close()
        self._opened.close()
