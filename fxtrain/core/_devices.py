"""Properties of devices."""

from __future__ import annotations

import torch


def wide_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype for sums and comparisons of scalars: float64, or float32 on a device without float64.

    Example:
        >>> wide_dtype(torch.device("cpu"))
        torch.float64
    """
    return torch.float32 if device.type == "mps" else torch.float64


def device_name(device: torch.device) -> str:
    """Returns the product name of a CUDA device, and the type of any other.

    Example:
        >>> device_name(torch.device("cpu"))
        'cpu'
    """
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
