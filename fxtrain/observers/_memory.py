"""Memory: what a run takes of the host's and of the device's memory, as curves beside the loss."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch

from fxtrain.core import TrainState
from fxtrain.observers._gauge import Gauge

_MIB = 2**20
_RESIDENT = Path("/proc/self/statm")  # in pages; the second number
_COUNTS = {
    "device_allocated": "allocated_bytes.all.current",
    "device_peak": "allocated_bytes.all.peak",
    "device_reserved": "reserved_bytes.all.current",
}


def memory(*writers: Any, every: int = 100) -> Gauge:
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
        >>> from fxtrain import Control, StepEnd, writers
        >>> path = pathlib.Path(tempfile.mkdtemp(), "metrics.jsonl")
        >>> observer = memory(writers.jsonl(path), every=2)
        >>> for step in (1, 2, 3, 4):
        ...     observer(None, StepEnd(step=step, metrics={}), Control())
        >>> observer.close()
        >>> len(path.read_text().splitlines()), "memory/host_peak_mib" in path.read_text()
        (2, True)
    """
    if not _host():
        raise OSError(f"What a process holds of the memory is not known on {sys.platform}: leave memory(...) out.")
    return Gauge("memory", writers, every, _read)


def _read(state: TrainState | None) -> dict[str, float]:
    found = {**_host(), **({} if state is None else _device(state.step.device))}
    return {f"memory/{name}_mib": size / _MIB for name, size in found.items()}


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
