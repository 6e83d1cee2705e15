"""System: what the machine does while a run goes, as curves beside the loss."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from fxtrain.core import TrainState
from fxtrain.observers._gauge import Gauge

_GIB = 2**30


def system(*writers: Any, every: int = 100) -> Gauge:
    """Writes how busy the machine is.

    - ``system/cpu_percent``: of all cores, by all processes, since the last reading.
    - ``system/process_cpu_percent``: of one core, by this process; four busy threads are 400.
    - ``system/memory_percent``: of the machine's memory, by all processes.
    - ``system/disk_read_gib``, ``system/disk_written_gib``: by this process since it began. Not on macOS.
    - ``system/gpu_percent``, ``system/gpu_memory_percent``, ``system/gpu_watts``, ``system/gpu_celsius``: of the
      state's GPU, where NVIDIA's library can be asked (``pip install nvidia-ml-py``).

    A reading takes about a tenth of a millisecond. What the process itself holds of memory ``observers.memory`` writes.

    Args:
        writers: From ``fxtrain.writers``, or clu's. They may be those of ``observers.write``, which then comes first
            in the list of observers.
        every: Write at the multiples of so many steps, and at the end.

    Raises:
        ValueError: If there is no writer, or ``every`` is out of its range.

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
    # The first answer covers the time since this.
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

    return Gauge("system", writers, every, read)


def _gpu(device: torch.device) -> dict[str, float]:
    # Without NVIDIA's library, or on a card that does not tell, there is nothing to say.
    with contextlib.suppress(Exception):
        return {
            "gpu_percent": torch.cuda.utilization(device),
            "gpu_memory_percent": torch.cuda.memory_usage(device),
            "gpu_watts": torch.cuda.power_draw(device) / 1000,
            "gpu_celsius": torch.cuda.temperature(device),
        }
    return {}
