"""Tensors from Python values, on a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def tensor_on(device: torch.device, value: float | Sequence[float], dtype: torch.dtype | None = None) -> Tensor:
    """Returns a tensor of a Python value, without host-device synchronization.

    ``torch.tensor(value, device=device)`` waits until the device has computed all that was launched before.

    Args:
        device: The device.
        value: A number, or numbers.
        dtype: The dtype, inferred by default.

    Example:
        >>> tensor_on(torch.device("cpu"), [1, 2])
        tensor([1, 2])
    """
    # A default device may be set.
    return torch.tensor(value, dtype=dtype, device="cpu").to(device, non_blocking=True)
