"""How much memory of a device is free."""

from __future__ import annotations

import pathlib

import psutil
import torch

_CGROUP = pathlib.Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int | None:
    """Returns how many bytes new tensors on a device can take, or None if that is unknown.

    On a CPU, this is what the machine and the control group of the process leave, before other memory is swapped out.

    Example:
        >>> available_bytes(torch.device("cpu")) > 0
        True
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    available = psutil.virtual_memory().available
    try:
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        return min(available, limit - used)
    except (OSError, ValueError):
        # Not Linux, or no limit.
        return available
