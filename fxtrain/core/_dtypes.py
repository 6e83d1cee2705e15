"""Dtypes of scalars."""

from __future__ import annotations

import torch


def wide_dtype(device: torch.device) -> torch.dtype:
    """The floating dtype to sum and compare scalars in: float64, or float32 on a device that has no float64.

    Example:
        >>> wide_dtype(torch.device("cpu"))
        torch.float64
    """
    return torch.float32 if device.type == "mps" else torch.float64
