"""Utilization of the machine: CPU, memory, disk and GPU."""

from __future__ import annotations

import contextlib

import torch

from fxtrain.core import TrainState
from fxtrain.fold import When
from fxtrain.observers._periodic import PeriodicReadings
from fxtrain.writers import Writer

_GIB = 2**30


def system(*writers: Writer, every: When = 100) -> PeriodicReadings:
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

    return PeriodicReadings("system", writers, every, read)


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
