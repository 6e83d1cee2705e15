"""Decides whether a compiled step can be checked: whether the uncompiled step can run beside it."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import psutil
import torch
from torch import Tensor

_STATES = 3
"""States besides that of the run: the result of the uncompiled step, its gradients, and its updates."""
_CGROUP = pathlib.Path("/sys/fs/cgroup")


def obstacle(leaves: Sequence[Tensor], is_in_place: bool, *, has_mesh: bool = False) -> str | None:
    """Returns why a step cannot be checked, as a clause, or None if it can.

    Args:
        leaves: The leaves of the state.
        is_in_place: Whether the compiled step overwrites them, so that a copy is needed too.
        has_mesh: Whether the ranks decide together how often the uncompiled step runs.

    Example:
        >>> obstacle([torch.ones(3)], is_in_place=True) is None
        True
    """
    if _processes() > 1 and not has_mesh:
        # One process may need more calls than another, and their collectives would wait forever.
        return "torch.distributed runs several processes"
    needed: dict[torch.device, int] = {}
    for leaf in leaves:
        needed[leaf.device] = needed.get(leaf.device, 0) + leaf.nbytes * (_STATES + is_in_place)
    for device, count in needed.items():
        available = _available_bytes(device)
        if available is not None and count > available:
            return f"this takes about {count / 1e9:.1f} GB on {device}, of which {available / 1e9:.1f} GB are free"
    return None


def _processes() -> int:
    distributed: Any = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _available_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    available = psutil.virtual_memory().available
    try:
        limit, used = ((_CGROUP / name).read_text() for name in ("memory.max", "memory.current"))
        return min(available, int(limit) - int(used))
    except (OSError, ValueError):
        # Not Linux, or no limit.
        return available
