"""The dtype in which scalars are accumulated."""

from __future__ import annotations

import torch


def wide_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype for sums and comparisons of scalars: float64, or float32 on a device without float64.

    Example:
        >>> wide_dtype(torch.device("cpu"))
        torch.float64
    """
    return torch.float32 if device.type == "mps" else torch.float64
