"""Observers that write readings of the machine at regular steps: the memory use of the process, and utilization."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from fxtrain.core import Control, FitBegin, FitEnd, Interrupted, LoopEvent, Rewound, StepEnd, TrainState
from fxtrain.core._rank import rank
from fxtrain.fold import When, as_trigger
from fxtrain.writers import Writer
from fxtrain.writers._multi import MultiWriter

_MIB = 2**20
_GIB = 2**30
_STATM = Path("/proc/self/statm")  # sizes in pages; the second is the resident set
_DEVICE_STATISTICS = {
    "device_allocated": "allocated_bytes.all.current",
    "device_peak": "allocated_bytes.all.peak",
    "device_reserved": "reserved_bytes.all.current",
}

Seen = FitBegin | StepEnd | Rewound | Interrupted | FitEnd
Read = Callable[[TrainState | None], Mapping[str, float]]


class PeriodicReadings:
    """Writes readings at the steps of ``every`` and at the end of each session.

    Args:
        what: The observer's name in errors.
        writers: Writers from ``fxtrain.writers`` or clu.
        every: When to read: a number of steps, or a trigger, evaluated at ``StepEnd``.
        every_rank: Whether every process writes, and not rank 0 alone.
        read: Returns the readings by name. Uses only the device of the state that it is called with.

    Raises:
        TypeError: ``every`` is neither an int nor a trigger.
        ValueError: There is no writer, or ``every`` is smaller than 1.
    """

    def __init__(self, what: str, writers: tuple[Writer, ...], every: When, every_rank: bool, read: Read) -> None:
        self._log = MultiWriter(what, writers)
        self._due = as_trigger(every)
        self._read_values = read
        self._every_rank = every_rank
        self._is_silent = not every_rank and rank() != 0
        self._step = 0  # of the last reading or the beginning of the session

    def __call__(self, state: TrainState | None, event: Seen, control: Control) -> None:
        if isinstance(event, FitBegin):
            self._is_silent = not self._every_rank and rank() != 0
        if self._is_silent:
            return
        match event:
            case FitBegin():
                self._drop_after(event.step)
            case Rewound():
                self._drop_after(event.to_step)
            case StepEnd() if self._due(event):
                self._read(state, event)
            case Interrupted() | FitEnd() if event.step > self._step:
                self._read(state, event)

    def close(self) -> None:
        """Closes every writer, then raises the first error."""
        self._log.close()

    def take_failure(self) -> Exception | None:
        """Returns the first error of a writer since the last call."""
        return self._log.take_failure()

    def _drop_after(self, step: int) -> None:
        self._step = step
        self._log.purge(step)

    def _read(self, state: TrainState | None, event: LoopEvent) -> None:
        self._step = event.step
        self._log.flush_deferred()
        self._log.put(event.step, self._read_values(state), event)


def memory(*writers: Writer, every: When = 100, every_rank: bool = False) -> PeriodicReadings:
    """Writes the memory use of the process, in MiB (2**20 bytes).

    - ``memory/host_resident_mib``: resident host memory. Linux only.
    - ``memory/host_peak_mib``: its peak since the process started.
    - ``memory/device_allocated_mib``: memory of tensors on the state's accelerator.
    - ``memory/device_peak_mib``: its peak since the process started, or since torch's peak statistics were reset.
    - ``memory/device_reserved_mib``: accelerator memory reserved by torch's allocator.

    For a state on the CPU, only the host values are written. A reading causes no host-device synchronization.

    Args:
        writers: Writers from ``fxtrain.writers`` or clu. Writers can be shared with ``observers.write``, which must
            then come first in the list of observers.
        every: When to read: a number of steps, or a trigger, evaluated at ``StepEnd``. Each session also ends with a
            reading.
        every_rank: Whether every process writes. By default, only rank 0 does. Give each its own writers.

    Raises:
        TypeError: ``every`` is neither an int nor a trigger.
        ValueError: There is no writer, or ``every`` is smaller than 1.
        OSError: The platform does not report the memory use of processes. Windows does not.

    Example:
        >>> import pathlib, tempfile
        >>> from fxtrain import Control, StepEnd, writers
        >>> path = pathlib.Path(tempfile.mkdtemp(), "metrics.jsonl")
        >>> observer = memory(writers.jsonl(path), every=2)
        >>> for step in (1, 2, 3, 4):
        ...     observer(None, StepEnd(step=step, metrics={}), Control())
        >>> observer.close()
        >>> len(path.read_text().splitlines()), "memory/host_peak_mib" in path.read_text()
        (2, True)
    """
    check_memory_is_known("the observer memory(...)")
    return PeriodicReadings("memory", writers, every, every_rank, _read_memory)


def _read_memory(state: TrainState | None) -> dict[str, float]:
    found = {**host_memory(), **({} if state is None else device_memory(state.step.device))}
    return {f"memory/{name}_mib": size / _MIB for name, size in found.items()}


def check_memory_is_known(what: str) -> None:
    """Raises an error on a platform that does not report the memory use of processes.

    Args:
        what: What to remove, for the error.
    """
    if not host_memory():
        raise OSError(
            f"expected a platform that reports the memory use of processes, got {sys.platform}. Remove {what}."
        )


def host_memory() -> dict[str, int]:
    """Returns the host memory of the process, in bytes."""
    found: dict[str, int] = {}
    if _STATM.exists():
        found["host_resident"] = int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if importlib.util.find_spec("resource"):
        import resource

        # Bytes on macOS, KiB elsewhere.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found["host_peak"] = peak if sys.platform == "darwin" else peak * 1024
    return found


def device_memory(device: torch.device) -> dict[str, int]:
    """Returns the memory of an accelerator in bytes, as far as its allocator reports it."""
    if device.type == "cpu":
        return {}
    counts = torch.accelerator.memory_stats(device)
    return {name: counts[count] for name, count in _DEVICE_STATISTICS.items() if count in counts}


def system(*writers: Writer, every: When = 100, every_rank: bool = False) -> PeriodicReadings:
    """Writes the utilization of the machine.

    - ``system/cpu_percent``: of all cores, by all processes, since the previous reading.
    - ``system/process_cpu_percent``: of one core, by this process. Four busy threads are 400.
    - ``system/memory_percent``: of the host's memory, by all processes.
    - ``system/disk_read_gib``, ``system/disk_written_gib``: by this process since it started. Not on macOS.
    - ``system/gpu_percent``, ``system/gpu_memory_percent``, ``system/gpu_watts``, ``system/gpu_celsius``: of the
      state's GPU, if NVIDIA's library is installed (``pip install nvidia-ml-py``).

    ``observers.memory`` writes the memory use of the process itself.

    Args:
        writers: Writers from ``fxtrain.writers`` or clu. Writers can be shared with ``observers.write``, which must
            then come first in the list of observers.
        every: When to read: a number of steps, or a trigger, evaluated at ``StepEnd``. Each session also ends with a
            reading.
        every_rank: Whether every process writes. By default, only rank 0 does. Give each its own writers.

    Raises:
        TypeError: ``every`` is neither an int nor a trigger.
        ValueError: There is no writer, or ``every`` is smaller than 1.

    Example:
        >>> import pathlib, tempfile
        >>> from fxtrain import Control, StepEnd, writers
        >>> path = pathlib.Path(tempfile.mkdtemp(), "metrics.jsonl")
        >>> observer = system(writers.jsonl(path), every=1)
        >>> observer(None, StepEnd(step=1, metrics={}), Control())
        >>> observer.close()
        >>> "system/cpu_percent" in path.read_text()
        True
    """
    import psutil

    process = psutil.Process()
    # The first reading covers the time since these calls.
    psutil.cpu_percent()
    process.cpu_percent()

    def read(state: TrainState | None) -> dict[str, float]:
        found = {
            "cpu_percent": psutil.cpu_percent(),
            "process_cpu_percent": process.cpu_percent(),
            "memory_percent": psutil.virtual_memory().percent,
        }
        with contextlib.suppress(AttributeError, psutil.Error):
            counters = process.io_counters()
            found |= {"disk_read_gib": counters.read_bytes / _GIB, "disk_written_gib": counters.write_bytes / _GIB}
        if state is not None and state.step.is_cuda:
            found |= _gpu(state.step.device)
        return {f"system/{name}": float(value) for name, value in found.items()}

    return PeriodicReadings("system", writers, every, every_rank, read)


def _gpu(device: torch.device) -> dict[str, float]:
    # NVIDIA's library may be missing, and not every GPU reports these values.
    with contextlib.suppress(Exception):
        return {
            "gpu_percent": torch.cuda.utilization(device),
            "gpu_memory_percent": torch.cuda.memory_usage(device),
            "gpu_watts": torch.cuda.power_draw(device) / 1000,
            "gpu_celsius": torch.cuda.temperature(device),
        }
    return {}
