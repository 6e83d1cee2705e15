"""Names for the values that annotations alone cannot describe: pytrees, batches and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypeAliasType

Tree = TypeAliasType("Tree", Any)
"""A pytree of tensors: a tensor, or nested dicts, lists, tuples and registered dataclasses of tensors.

Static type checkers treat it as ``Any``, because the structure is known at run time only.
"""

Scalar = float | Tensor
"""A Python number, or a tensor of shape []."""

Batch = TypeAliasType("Batch", Any)
"""One element of a data source: usually a dict of tensors, but any pytree of tensors or arrays."""

Metrics = TypeAliasType("Metrics", Mapping[str, Any])
"""Metrics by name: 0-d tensors, Python scalars or ``fxtrain.metrics`` values."""


def wide_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype for sums and comparisons of scalars: float64, or float32 on a device without float64.

    Example:
        >>> wide_dtype(torch.device("cpu"))
        torch.float64
    """
    return torch.float32 if device.type == "mps" else torch.float64
