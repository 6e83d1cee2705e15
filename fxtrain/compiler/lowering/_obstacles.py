"""Decides whether the uncompiled step can run beside the compiled one, to check or to recognize it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxtrain.core._available_memory import available_bytes

_STATES = 3
"""States besides that of the run: the result of the uncompiled step, its gradients, and its updates."""


def obstacle(leaves: Sequence[Tensor], is_in_place: bool, *, has_mesh: bool = False) -> str | None:
    """Returns why the uncompiled step cannot run beside the compiled one, as a clause, or None if it can.

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
        available = available_bytes(device)
        if available is not None and count > available:
            return f"this takes about {count / 1e9:.1f} GB on {device}, of which {available / 1e9:.1f} GB are free"
    return None


def _processes() -> int:
    distributed: Any = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
