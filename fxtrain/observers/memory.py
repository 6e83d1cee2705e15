"""Memory: what a run takes of the host's and of the device's memory, as curves beside the loss."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch

from fxtrain.core import (
    Control,
    FitBegin,
    FitEnd,
    Interrupted,
    LoopEvent,
    Rewound,
    StepEnd,
    TrainState,
    refuse_unless_whole,
)
from fxtrain.values import hand_over, take_back, try_all

_MIB = 2**20
_RESIDENT = Path("/proc/self/statm")  # in pages; the second number
_COUNTS = {
    "device_allocated": "allocated_bytes.all.current",
    "device_peak": "allocated_bytes.all.peak",
    "device_reserved": "reserved_bytes.all.current",
}

Seen = FitBegin | StepEnd | Rewound | Interrupted | FitEnd


def memory(*writers: Any, every: int = 100) -> Memory:
    """Writes how much memory the process holds.

    - ``memory/host_resident_mib``: the host memory that the process holds now. Linux only.
    - ``memory/host_peak_mib``: the most it has held since it began.
    - ``memory/device_allocated_mib``: the memory of tensors on the state's accelerator now.
    - ``memory/device_peak_mib``: the most of it since the process began, or since somebody reset torch's count.
    - ``memory/device_reserved_mib``: what torch holds of the accelerator, for tensors now and later.

    A MiB is 2**20 bytes. Of a state on the CPU there are the first two. A reading takes some microseconds, and does
    not wait for the device.

    Args:
        writers: From ``fxtrain.writers``, or clu's. They may be those of ``observers.write``, which then comes first
            in the list of observers.
        every: Write at the multiples of so many steps, and at the end.

    Raises:
        ValueError: If there is no writer, or ``every`` is out of its range.
        OSError: If this system tells nothing of the memory of its processes, as Windows.

    Example:
        >>> import pathlib, tempfile
        >>> from fxtrain import tree, writers
        >>> path = pathlib.Path(tempfile.mkdtemp(), "metrics.jsonl")
        >>> observer = memory(writers.jsonl(path), every=2)
        >>> for step in (1, 2, 3, 4):
        ...     observer(None, StepEnd(step=step, metrics={}), Control())
        >>> observer.close()
        >>> len(path.read_text().splitlines()), "memory/host_peak_mib" in path.read_text()
        (2, True)
    """
    if not writers:
        raise ValueError("memory() has nothing to write to: give it a writer, fxtrain.writers.tensorboard(folder) say.")
    refuse_unless_whole("every", every, "steps")
    if not _host():
        raise OSError(f"What a process holds of the memory is not known on {sys.platform}: leave memory(...) out.")
    return Memory(writers, every)


class Memory:
    """Writes how much memory the process holds; made by ``memory``."""

    def __init__(self, writers: tuple[Any, ...], every: int) -> None:
        self._writers = writers
        self._every = every
        self._step = 0  # of the last reading, and of the beginning

    def __call__(self, state: TrainState | None, event: Seen, control: Control) -> None:
        match event:
            case FitBegin():
                self._go_back(event.step)
            case Rewound():
                self._go_back(event.to_step)
            case StepEnd() if event.step % self._every == 0:
                self._read(state, event)
            case Interrupted() | FitEnd() if event.step > self._step:
                self._read(state, event)

    def close(self) -> None:
        """Closes every writer; then the first error is raised."""
        try_all(*(writer.close for writer in self._writers))

    def _go_back(self, step: int) -> None:
        self._step = step
        for writer in self._writers:
            take_back(writer, step)

    def _read(self, state: TrainState | None, event: LoopEvent) -> None:
        self._step = event.step
        found = {**_host(), **({} if state is None else _device(state.step.device))}
        for writer in self._writers:
            hand_over(writer, event, {f"memory/{name}_mib": size / _MIB for name, size in found.items()})


def _host() -> dict[str, int]:
    """Bytes of the process."""
    found: dict[str, int] = {}
    if _RESIDENT.exists():
        found["host_resident"] = int(_RESIDENT.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if importlib.util.find_spec("resource"):
        import resource

        # In bytes on macOS, and in units of 1024 elsewhere.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found["host_peak"] = peak if sys.platform == "darwin" else peak * 1024
    return found


def _device(device: torch.device) -> dict[str, int]:
    """Bytes of an accelerator whose allocator counts."""
    if device.type == "cpu":
        return {}
    counts = torch.accelerator.memory_stats(device)
    return {name: counts[count] for name, count in _COUNTS.items() if count in counts}
