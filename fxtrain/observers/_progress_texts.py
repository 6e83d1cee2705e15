"""Texts of the progress display."""

from __future__ import annotations

import torch

from fxtrain.core import Restored, format_bytes, format_duration, format_scaled
from fxtrain.observers._display import EvaluationFrame
from fxtrain.observers._machine import device_memory, host_memory


def describe_restored(event: Restored) -> str:
    """Returns the differences of the restored state from the expected one, in one line."""
    new = [f"slot {name!r} is initialized" for name in event.missing]
    kept = [f"slot {name!r} belongs to no callback" for name in event.extra]
    changed = [f"results may differ in the last bits: {line}" for line in event.environment_changes]
    return "; ".join([*new, *kept, *changed])


def evaluation_frame(done: int, count: int | None, since: tuple[int, float], time: float) -> EvaluationFrame:
    """Returns the texts about an evaluation.

    Args:
        done: Number of batches done.
        count: Number of all batches; None if it is unknown.
        since: Number of batches done and time, from which the speed is measured.
        time: The current time, in seconds.
    """
    first, began = since
    rate = (done - first) / (time - began) if done > first and time > began else None
    parts = [f"batch {done}" + (f"/{count}" if count else "")]
    if rate is not None:
        parts.append(f"{format_scaled(rate)} batches/s")
        if count and count > done:
            parts.append(f"{format_duration((count - done) / rate)} left")
    return EvaluationFrame(min(done / count, 1.0) if count else None, parts)


def memory_text(device: torch.device) -> str:
    """Returns the memory of tensors on an accelerator and its peak or, for the CPU, those of the process."""
    on_device, on_host = device_memory(device), host_memory()
    now, peak = (
        on_device.get(f"device_{of_device}") or on_host.get(f"host_{of_host}", 0)
        for of_device, of_host in (("allocated", "resident"), ("peak", "peak"))
    )
    # The system counts the peak of the process less precisely than its current memory.
    return f"{format_bytes(now)}, peak {format_bytes(max(now, peak))}"
