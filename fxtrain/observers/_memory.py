"""Memory use of the process, on the host and on the device."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import torch

from fxtrain.core import TrainState
from fxtrain.fold import When
from fxtrain.observers._periodic import PeriodicReadings
from fxtrain.writers import Writer

_MIB = 2**20
_STATM = Path("/proc/self/statm")  # sizes in pages; the second is the resident set
_DEVICE_STATISTICS = {
    "device_allocated": "allocated_bytes.all.current",
    "device_peak": "allocated_bytes.all.peak",
    "device_reserved": "reserved_bytes.all.current",
}


def memory(*writers: Writer, every: When = 100) -> PeriodicReadings:
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
    if not _host():
        raise OSError(
            f"expected a platform that reports the memory use of processes, got {sys.platform}. Remove the observer "
            "memory(...)."
        )
    return PeriodicReadings("memory", writers, every, _read)


def _read(state: TrainState | None) -> dict[str, float]:
    found = {**_host(), **({} if state is None else _device(state.step.device))}
    return {f"memory/{name}_mib": size / _MIB for name, size in found.items()}


def _host() -> dict[str, int]:
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


def _device(device: torch.device) -> dict[str, int]:
    """Returns the memory of an accelerator in bytes, as far as its allocator reports it."""
    if device.type == "cpu":
        return {}
    counts = torch.accelerator.memory_stats(device)
    return {name: counts[count] for name, count in _DEVICE_STATISTICS.items() if count in counts}
